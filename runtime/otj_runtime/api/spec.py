"""`spec` of an OnlineTrainingJob: what a user may say about a run.

Every field's description is what `kubectl explain` shows; defaults and units stand in it. Pieces of a pod (env, volumes,
tolerations, ...) stay dictionaries: the API server validates them when the pod is made, and newer fields pass through.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from otj_runtime.api.base import ApiModel, Rule
from otj_runtime.api.inputs import DatasetSpec, PathText, RewardSpec, ShortText
from otj_runtime.api.lifecycle import OPERATOR
from otj_runtime.api.secrets import Variable, no_secret_in
from otj_runtime.api.training import NOT_FOR_SCRIPTS, Algorithm, check_training

PodPiece = dict[str, Any]
"""A piece of a pod in the API server's own form."""


def _named_by(key: str) -> dict[str, Any]:
    """Makes a list of pod pieces one that server-side apply merges entry by entry, and in which `key` is unique."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class Device(StrEnum):
    """What trainer and generator compute on."""

    CUDA = "cuda"
    CPU = "cpu"


class DType(StrEnum):
    """Floating point types of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ModelSpec(ApiModel):
    """The model to train: a name that the model container fetches, or a path that a volume brings."""

    name: ShortText | None = Field(
        None,
        description="Name on the model hub, or `builtin/tiny-copy` for the tiny model of the samples. It is fetched once into the "
        "output volume. Give either name or path.",
    )
    path: PathText | None = Field(
        None, description="Absolute path of a transformers model folder on a mounted volume. Give either name or path."
    )
    revision: ShortText | None = Field(None, description="Branch, tag or commit of `name` on the hub. Default: its main branch.")
    dtype: DType = Field(DType.FLOAT32, description="Type of the trainer's master weights. Default: float32.")

    rules = (
        Rule(
            cel="has(self.name) != has(self.path)",
            message="give exactly one of model.name (fetched from the hub) and model.path (a folder on a mounted volume)",
            holds=lambda m: (m.name is None) != (m.path is None),
        ),
        Rule(
            cel="!has(self.path) || self.path.startsWith('/')",
            message="path: %s must be absolute: the path inside the container at which a volume mounts the model",
            holds=lambda m: m.path is None or m.path.startswith("/"),
            values=lambda m: (m.path,),
            cel_values=("self.path",),
            field="path",
        ),
        Rule(
            cel="!has(self.revision) || has(self.name)",
            message="model.revision goes with model.name; a model.path has no revisions",
            holds=lambda m: m.revision is None or m.name is not None,
        ),
    )


def _no_argument(pattern: str, *, because: str) -> Rule:
    """A rule that vLLM is given no argument which matches; its parser takes any beginning of an option's name that is clear."""
    matching = f"self.extraArgs.filter(word, word.matches('{pattern}'))"
    return Rule(
        cel=f"!has(self.extraArgs) || {matching}.size() == 0",
        message=f"extraArgs: %s cannot be given: {because}",
        holds=lambda g: not any(re.match(pattern, word) for word in g.extra_args),
        values=lambda g: (next(word for word in g.extra_args if re.match(pattern, word)),),
        cel_values=(f"{matching}[0]",),
        field="extraArgs",
    )


class GenerationSpec(ApiModel):
    """The generator: its share of the accelerators and vLLM's settings."""

    gpus: int = Field(1, ge=1, le=1024, description="Accelerators of the job that generate; the others train. Default: 1.")
    tensor_parallel_size: int | None = Field(
        None, ge=1, le=1024, description="Accelerators one copy of the model is spread over. Default: generation.gpus."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of each accelerator's memory that vLLM takes, above 0 and at most 1. Default: 0.9."
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus completion, in tokens. Default: the model's own limit.")
    dtype: DType | None = Field(None, description="Type of the generator's weights. Default: bfloat16 on cuda, float32 on cpu.")
    weight_transfer: Literal["auto", "mailbox", "delta", "nccl", "ipc"] = Field(
        "auto",
        description="How weights reach the generator after a step: mailbox sends all through shared memory, delta only what changed, for a "
        "copy of the weights in the training accelerators' memory; ipc lets the generator read them where the trainer has them, on a GPU that "
        "both share or that the generator's may map; nccl is vLLM's own, between GPUs. Both are tried at start, else mailbox. Of these, auto takes "
        "ipc where it can. progress.weightTransfer says what was chosen and why. Default: auto.",
    )
    enable_prefix_caching: bool = Field(True, description="Keep the keys and values of shared prompts between requests. Default: true.")
    extra_args: list[Annotated[str, Field(max_length=4096)]] = Field(
        default_factory=list, max_length=64, description="Further arguments of the vLLM server, passed as they are. Default: none."
    )
    ready_timeout_seconds: int = Field(
        900,
        ge=1,
        description="Seconds from pod start until the generator must answer; then the job fails with GeneratorNotReady. Default: 900.",
    )

    rules = (
        Rule(
            cel="!has(self.tensorParallelSize) || self.gpus % self.tensorParallelSize == 0",
            message="tensorParallelSize: %d must divide generation.gpus, which is %d: one copy of the model is spread over that many",
            holds=lambda g: g.tensor_parallel_size is None or g.gpus % g.tensor_parallel_size == 0,
            values=lambda g: (g.tensor_parallel_size, g.gpus),
            cel_values=("self.tensorParallelSize", "self.gpus"),
            field="tensorParallelSize",
        ),
        _no_argument(
            "^--(hos?t?|port?|uds?|config)(=|$)",
            because="the job decides where vLLM listens, which is on loopback, because whoever reaches its weight routes changes the model; "
            "leave it out, and give options of a configuration file one by one",
        ),
        _no_argument(
            "^(-q|--quant[a-z-]*)(=|$)",
            because="what quantising rounds away is as large as what wrong weights change, so no weight sync could be proven; leave it out, "
            "and set generation.dtype",
        ),
        no_secret_in("extraArgs", python="extra_args", reader="vLLM (VLLM_API_KEY, HF_TOKEN)"),
    )

    @property
    def engines(self) -> int:
        """Copies of the model: independent engines behind one server, each on `tensor_parallel_size` accelerators."""
        return self.gpus // (self.tensor_parallel_size or self.gpus)


class RolloutSpec(ApiModel):
    """How sampling and training overlap."""

    staleness: int = Field(
        0,
        ge=0,
        le=64,
        description="Batches that are sampled ahead of the one trained on. 0 samples, then trains; 1 samples the next batch while it "
        "trains, from weights that are one version older. Default: 0.",
    )
    straggler_factor: float | None = Field(
        None,
        ge=1,
        description="Drop the prompts of a batch that take this many times longer than three quarters of it did; at least 1. "
        "Default: every prompt is finished.",
    )


class AccelerateSpec(ApiModel):
    """How `accelerate launch` runs the training ranks."""

    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="Mixed precision of training: no, fp16 or bf16. Default: no.")
    strategy: Literal["ddp", "fsdp2", "deepspeed-zero3"] = Field(
        "ddp", description="How the model is spread over the training accelerators: ddp, fsdp2 or deepspeed-zero3. Default: ddp."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Further keys of accelerate's configuration file; they win over what is derived. Default: none."
    )


class TrainerSpec(ApiModel):
    """A training script of the user's own, in place of the built-in trainers."""

    command: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(
        min_length=2,
        max_length=128,
        description='The script and its arguments: `[python, /scripts/train.py, --beta, "0.1"]` or `[python, -m, package.module, ...]`. '
        "Each training rank runs it under `accelerate launch`, in the output folder, without a shell. $(NAME) stands for a variable "
        "of the container's environment, such as $(OTJ_MODEL_PATH).",
    )

    rules = (
        Rule(
            cel="self.command.size() < 2 || "
            "self.command[0] == 'python' && (self.command[1] == '-m' ? self.command.size() > 2 : !self.command[1].startsWith('-'))",
            message="trainer.command must be python and a script, or python, -m and a module: the launcher itself puts `accelerate launch` "
            "with the right number of processes before it, and there is no shell",
            holds=lambda t: t.command[0] == "python" and (len(t.command) > 2 if t.command[1] == "-m" else not t.command[1].startswith("-")),
        ),
        no_secret_in("command", python="command", reader="the script"),
    )


class LoRASpec(ApiModel):
    """Training of a low-rank adapter on a frozen model (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, le=512, description="Rank of the adapter's matrices. Default: 16.")
    alpha: float = Field(32, gt=0, description="The adapter is scaled by alpha / rank. Default: 32.")
    target_modules: list[Annotated[str, Field(min_length=1, max_length=253)]] = Field(
        default_factory=list,
        max_length=64,
        description="Names of the linear layers that are adapted, such as q_proj. Default: all but the output layer.",
    )
    sync: Literal["adapter", "merged"] = Field(
        "merged",
        description="What goes to the generator after every step: all weights with the adapter merged, which always works, or the adapter "
        "alone, which vLLM must support for the model and the layers. Default: merged.",
    )
    export: Literal["adapter", "merged"] = Field(
        "adapter", description="What is saved at the end: the adapter alone, or a whole model with the adapter merged. Default: adapter."
    )


class ContainerResources(ApiModel):
    """Compute resources of the two containers, besides the accelerators that the split gives them."""

    trainer: PodPiece | None = Field(None, description="Requests and limits of the trainer container, as in a pod. Default: none.")
    generator: PodPiece | None = Field(None, description="Requests and limits of the generator container, as in a pod. Default: none.")
    shared_memory: Annotated[str, Field(max_length=32)] | None = Field(
        None, description="Size limit of the /dev/shm that both containers share, such as 8Gi. Default: half the node's memory."
    )


class OutputSpec(ApiModel):
    """Where checkpoints, the final model and caches go."""

    claim_name: ShortText | None = Field(
        None, description="PersistentVolumeClaim for checkpoints and caches. Default: a folder that ends with the pod."
    )
    path: PathText = Field("/output", description="Where the output volume is mounted in the containers. Default: /output.")
    save_steps: int = Field(50, ge=1, description="Optimizer steps between checkpoints. Default: 50.")


class AcceleratorSpec(ApiModel):
    """What the job counts as a GPU."""

    device: Device = Field(Device.CUDA, description="Device to compute on: cuda or cpu; it is never guessed. Default: cuda.")
    resource_name: ShortText | None = Field(
        None, description="Extended resource each GPU requests. Default: nvidia.com/gpu on cuda, none on cpu."
    )


_CONTROLLER = "^[a-z0-9.-]+/[A-Za-z0-9._-]+$"
_TRANSFER = "(has(self.generation) && has(self.generation.weightTransfer) && self.generation.weightTransfer "
_DELTA = _TRANSFER + "== 'delta')"
_SPECIAL = _TRANSFER + "in ['delta', 'nccl', 'ipc'])"
_DIRECT = _TRANSFER + "in ['nccl', 'ipc'])"


class OnlineTrainingJobSpec(ApiModel):
    """Desired state: one training run that generates with vLLM on some accelerators and trains on the others."""

    algorithm: Algorithm = Field(description="Training method: GRPO or OnlineDPO.")
    model: ModelSpec = Field(description="The model to train.")
    dataset: DatasetSpec | None = Field(None, description="The prompts to train on. Give either dataset or trainer.command.")
    rewards: list[RewardSpec] = Field(
        default_factory=list,
        max_length=32,
        description="Reward functions; their weighted sum is the reward. Default: the reward of dataset.task.",
    )
    gpus: int = Field(
        le=1024,
        description="Accelerators of the job, at least 2: generation.gpus of them generate (default 1), the others train.",
    )
    nodes: int = Field(1, ge=1, le=1, description="Pods of the job, each with `gpus` accelerators. This version runs one. Default: 1.")
    generation: GenerationSpec = Field(default_factory=GenerationSpec, description="The generator and its share of the accelerators.")
    rollout: RolloutSpec = Field(default_factory=RolloutSpec, description="How sampling and training overlap.")
    training: dict[str, Any] = Field(default_factory=dict, description="Arguments of GRPOConfig or OnlineDPOConfig by their Python names.")
    trainer: TrainerSpec | None = Field(
        None, description="A training script of your own, such as one for TRL's GRPOTrainer. Default: the built-in trainer of `algorithm`."
    )
    lora: LoRASpec | None = Field(None, description="Train a LoRA adapter instead of all weights. Default: all weights are trained.")
    accelerate: AccelerateSpec = Field(default_factory=AccelerateSpec, description="How accelerate launches the training ranks.")
    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Runtime image of both containers. Default: the one the operator is configured with."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="When the image is pulled: Always, IfNotPresent or Never. Default: the kubelet's rule."
    )
    resources: ContainerResources = Field(default_factory=ContainerResources, description="CPU and memory of the containers.")
    env: list[Variable] = Field(
        default_factory=list,
        max_length=256,
        description="Environment of every container of the pod, as in a pod; secrets by valueFrom.secretKeyRef only. Default: none.",
        json_schema_extra=_named_by("name"),
    )
    volumes: list[PodPiece] = Field(
        default_factory=list,
        max_length=64,
        description="Further volumes of the pod. Default: none.",
        json_schema_extra=_named_by("name"),
    )
    volume_mounts: list[PodPiece] = Field(
        default_factory=list,
        max_length=64,
        description="Mounts of `volumes` in every container of the pod. Default: none.",
        json_schema_extra=_named_by("mountPath"),
    )
    node_selector: dict[str, Annotated[str, Field(max_length=63)]] = Field(
        default_factory=dict, max_length=64, description="Labels a node must have. Default: none."
    )
    tolerations: list[PodPiece] = Field(default_factory=list, max_length=64, description="Taints the pod tolerates. Default: none.")
    affinity: PodPiece | None = Field(None, description="Scheduling affinity of the pod. Default: none.")
    priority_class_name: ShortText | None = Field(None, description="Priority class of the pod. Default: the cluster's default.")
    service_account_name: ShortText | None = Field(
        None, description="Service account of the pod; its token is never mounted. Default: the namespace's default account."
    )
    output: OutputSpec = Field(default_factory=OutputSpec, description="Checkpoints, the final model and caches.")
    accelerator: AcceleratorSpec = Field(default_factory=AcceleratorSpec, description="What the job counts as a GPU.")
    suspend: bool = Field(
        False,
        description="Pause the run: its pod saves a checkpoint and frees its accelerators; false goes on from there. May change at any "
        "time. Under Kueue it deactivates the Workload. Default: false.",
    )
    backoff_limit: int = Field(
        3,
        ge=0,
        le=1000,
        description="Pod failures that are retried; errors of the user's input never are, evicted and preempted pods always. May change "
        "while the run goes. Default: 3.",
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=2147483647,
        description="Seconds the job may run before it fails, counted anew after each resume. May change while the run goes. Default: no limit.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=2147483647,
        description="Seconds after which a finished Job and its pod are removed; this object stays. May change while the run goes. "
        "Default: they are kept.",
    )
    managed_by: Annotated[str, Field(min_length=3, max_length=63)] | None = Field(
        None,
        description=f"Controller of this object, as domain/name. Any but {OPERATOR} is left alone by the operator. Default: {OPERATOR}.",
    )

    rules = (
        Rule(
            cel="self.gpus >= 2",
            message="gpus: %d is too few, it needs at least 2: one generates, the others train",
            holds=lambda s: s.gpus >= 2,
            values=lambda s: (s.gpus,),
            cel_values=("self.gpus",),
            field="gpus",
        ),
        Rule(
            cel="!has(self.generation) || !has(self.generation.gpus) || self.gpus < 2 || self.generation.gpus < self.gpus",
            message="generation.gpus: %d of gpus, which is %d, must leave at least one to train",
            holds=lambda s: s.gpus < 2 or s.generation.gpus < s.gpus,
            values=lambda s: (s.generation.gpus, s.gpus),
            cel_values=("self.generation.gpus", "self.gpus"),
            field="generation.gpus",
        ),
        Rule(
            cel="has(self.dataset) != has(self.trainer)",
            message="give either dataset, for the built-in trainer, or trainer.command, whose script loads its own",
            holds=lambda s: (s.dataset is None) != (s.trainer is None),
        ),
        Rule(
            cel="!has(self.dataset) || has(self.dataset.task) || (has(self.rewards) && self.rewards.size() > 0)",
            message="rewards: give at least one, unless dataset.task is a built-in task, which brings its own",
            holds=lambda s: s.dataset is None or s.dataset.task is not None or len(s.rewards) > 0,
        ),
        Rule(
            cel="!has(self.accelerate) || !has(self.accelerate.strategy) || self.accelerate.strategy == 'ddp' || !has(self.accelerator) "
            "|| !has(self.accelerator.device) || self.accelerator.device != 'cpu'",
            message="accelerate.strategy: on accelerator.device cpu, accelerate silently takes ddp instead; say ddp",
            holds=lambda s: s.accelerate.strategy == "ddp" or s.accelerator.device is not Device.CPU,
        ),
        Rule(
            cel="!has(self.trainer) || !has(self.lora)",
            message="lora: is for the built-in trainer; a script in trainer.command makes its own",
            holds=lambda s: s.trainer is None or s.lora is None,
        ),
        Rule(
            cel="!has(self.lora) || !has(self.lora.sync) || self.lora.sync == 'merged' || !has(self.rollout) || !has(self.rollout.staleness) "
            "|| self.rollout.staleness == 0",
            message="lora.sync: an adapter is loaded between requests, so with rollout.staleness the weights must go merged",
            holds=lambda s: s.lora is None or s.lora.sync == "merged" or s.rollout.staleness == 0,
        ),
        Rule(
            cel=f"!{_SPECIAL} || (!has(self.trainer) && (!has(self.lora) || !has(self.lora.sync) || self.lora.sync == 'merged'))",
            message="generation.weightTransfer: %s is for the built-in trainer, and for all weights; say auto",
            holds=lambda s: (
                s.generation.weight_transfer in ("auto", "mailbox") or (s.trainer is None and (s.lora is None or s.lora.sync == "merged"))
            ),
            values=lambda s: (s.generation.weight_transfer,),
            cel_values=("self.generation.weightTransfer",),
            field="generation.weightTransfer",
        ),
        Rule(
            cel=f"!{_DIRECT} || !has(self.accelerator) || !has(self.accelerator.device) || self.accelerator.device != 'cpu'",
            message="generation.weightTransfer: %s goes from GPU to GPU, and accelerator.device is cpu; say auto",
            holds=lambda s: s.generation.weight_transfer not in ("nccl", "ipc") or s.accelerator.device is not Device.CPU,
            values=lambda s: (s.generation.weight_transfer,),
            cel_values=("self.generation.weightTransfer",),
            field="generation.weightTransfer",
        ),
        Rule(
            cel=f"!{_DELTA} || (has(self.generation.dtype) ? self.generation.dtype != 'float32' : "
            "(!has(self.accelerator) || !has(self.accelerator.device) || self.accelerator.device != 'cpu'))",
            message="generation.weightTransfer: delta needs generation.dtype bfloat16 or float16, every float32 weight changes at every step",
            holds=lambda s: s.generation.weight_transfer != "delta" or s.generator_dtype is not DType.FLOAT32,
        ),
        Rule(
            cel="!has(self.trainer) || !has(self.rewards) || self.rewards.size() == 0",
            message="rewards: are for the built-in trainer; a script in trainer.command has its own",
            holds=lambda s: s.trainer is None or not s.rewards,
        ),
        Rule(
            cel=f"!has(self.managedBy) || self.managedBy.matches('{_CONTROLLER}')",
            message=f"managedBy: %s is no name of a controller; write it as domain/name, such as {OPERATOR}, or leave it out",
            holds=lambda s: s.managed_by is None or re.match(_CONTROLLER, s.managed_by) is not None,
            values=lambda s: (s.managed_by,),
            cel_values=("self.managedBy",),
            field="managedBy",
        ),
    )

    @model_validator(mode="after")
    def _check_training(self) -> OnlineTrainingJobSpec:
        if self.trainer is not None and self.training:
            raise ValueError(f"training.{next(iter(self.training))}: {NOT_FOR_SCRIPTS}")
        check_training(algorithm=self.algorithm, arguments=self.training, ranks=self.training_ranks)
        return self

    @property
    def training_ranks(self) -> int:
        """Accelerators (and processes) that train."""
        return self.gpus - self.generation.gpus

    @property
    def generator_dtype(self) -> DType:
        """Type of the generator's weights, the default resolved."""
        if self.generation.dtype is not None:
            return self.generation.dtype
        return DType.BFLOAT16 if self.accelerator.device is Device.CUDA else DType.FLOAT32

    @property
    def accelerator_resource(self) -> str | None:
        """Extended resource that each GPU requests, the default resolved; None requests nothing."""
        if self.accelerator.resource_name is not None:
            return self.accelerator.resource_name
        return "nvidia.com/gpu" if self.accelerator.device is Device.CUDA else None
