"""PodConfig: the spec of a job, every default resolved, as the containers read it from the environment variable OTJ_CONFIG.

The operator (or `otj run`) makes it once with `resolve`; no container looks at the spec again, so two containers cannot resolve a
default differently. Secrets stay out: a user's `env` goes to the container directly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from otj_runtime.api import Algorithm, ApiModel, Device, DType, OnlineTrainingJob
from otj_runtime.api.inputs import DatasetSpec, RewardSpec
from otj_runtime.api.spec import AccelerateSpec, LoRASpec, RolloutSpec
from otj_runtime.pod.errors import InvalidSpec

CONFIG_ENV = "OTJ_CONFIG"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things are inside a pod. `otj run` uses folders and free ports of the machine instead."""

    shared_memory: str = "/dev/shm"
    scratch: str = "/tmp"
    generator_port: int = 8000
    progress_port: int = 8081
    rendezvous_port: int = 29500
    host: str = "127.0.0.1"
    progress_host: str = "0.0.0.0"
    termination_log: str = "/dev/termination-log"


class PodConfig(ApiModel):
    """What the launcher, the training ranks and the generator need to know of the job."""

    name: str
    namespace: str
    uid: str = Field("", description="Identity of the OnlineTrainingJob; empty in a run that is no pod.")
    algorithm: Algorithm
    model_path: str = Field(description="Folder of the model; the model container fills it when the job names a model.")
    model_name: str | None = None
    model_revision: str | None = None
    model_dtype: DType
    dataset: DatasetSpec | None = Field(None, description="None if a script of the user's own trains.")
    rewards: list[RewardSpec]
    training: dict[str, Any]
    script: list[str] = Field(default_factory=list, description="The user's own script and its arguments; empty for the built-in trainer.")
    lora: LoRASpec | None = None
    accelerate: AccelerateSpec
    rollout: RolloutSpec = Field(default_factory=RolloutSpec)
    device: Device
    training_ranks: int
    generator_gpus: int
    generator_engines: int = Field(1, description="Copies of the model in the generator, each on tensorParallelSize accelerators.")
    generator_dtype: DType
    weight_transfer: Literal["auto", "mailbox", "delta", "nccl", "ipc"] = Field(
        "auto", description="What is asked for; `transfer` chooses."
    )
    generator_url: str
    generator_max_model_len: int | None = None
    generator_ready_timeout_seconds: int
    mailbox: str = Field(description="Folder of the weights mailbox, in memory that both containers share.")
    output: str = Field(description="Folder of checkpoints, the final model and caches.")
    save_steps: int
    run_directory: str = Field(description="Scratch folder of this pod: failure notes, the launcher's token, generated configuration.")
    progress_host: str
    progress_port: int
    rendezvous_port: int
    termination_log: str

    @property
    def prompts(self) -> DatasetSpec:
        """The dataset of the built-in trainer.

        Raises:
            InvalidSpec: if there is none, because a script of the user's own trains.
        """
        if self.dataset is None:
            raise InvalidSpec("spec.dataset is missing: the built-in trainer has nothing to train on")
        return self.dataset

    @property
    def adapter(self) -> LoRASpec | None:
        """The adapter that the generator gets instead of weights; None where all weights are sent."""
        return self.lora if self.lora is not None and self.lora.sync == "adapter" else None

    @classmethod
    def from_environment(cls) -> PodConfig:
        """The configuration in OTJ_CONFIG.

        Raises:
            InvalidSpec: if the variable is missing or no valid configuration.
        """
        text = os.environ.get(CONFIG_ENV)
        if text is None:
            raise InvalidSpec(f"{CONFIG_ENV} is not set: start this through the operator or `otj run`")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InvalidSpec(f"{CONFIG_ENV} is no valid configuration: {error}") from error


def resolve(job: OnlineTrainingJob, layout: Layout = Layout(), *, output: str | None = None) -> PodConfig:
    """The configuration of `job` in a pod laid out as `layout`; `output` replaces the mount path of the output volume."""
    spec = job.spec
    output = output or spec.output.path
    return PodConfig(
        name=job.metadata.name,
        namespace=job.metadata.namespace,
        uid=job.metadata.uid or "",
        algorithm=spec.algorithm,
        model_path=spec.model.path or f"{output}/.cache/models/{_folder(spec.model.name, spec.model.revision)}",
        model_name=spec.model.name,
        model_revision=spec.model.revision,
        model_dtype=spec.model.dtype,
        dataset=spec.dataset,
        rewards=spec.rewards,
        training=spec.training,
        script=[] if spec.trainer is None else spec.trainer.command[1:],
        lora=spec.lora,
        accelerate=spec.accelerate,
        rollout=spec.rollout,
        device=spec.accelerator.device,
        training_ranks=spec.training_ranks,
        generator_gpus=spec.generation.gpus,
        generator_engines=spec.generation.engines,
        generator_dtype=spec.generator_dtype,
        weight_transfer=spec.generation.weight_transfer,
        generator_url=f"http://{layout.host}:{layout.generator_port}",
        generator_max_model_len=spec.generation.max_model_len,
        generator_ready_timeout_seconds=spec.generation.ready_timeout_seconds,
        mailbox=f"{layout.shared_memory}/otj",
        output=output,
        save_steps=spec.output.save_steps,
        run_directory=f"{layout.scratch}/otj",
        progress_host=layout.progress_host,
        progress_port=layout.progress_port,
        rendezvous_port=layout.rendezvous_port,
        termination_log=layout.termination_log,
    )


def _folder(name: str | None, revision: str | None) -> str:
    """Folder name of a hub model: slashes would make subfolders that another model could share."""
    return str(name).replace("/", "--") + (f"@{revision}" if revision else "")
