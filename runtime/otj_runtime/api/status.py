"""`status` of an OnlineTrainingJob: conditions are the contract, everything else is for reading.

`Reason` is the one list of reasons. A reason is what a user acts on, so each says what to do; the documentation is made from it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from otj_runtime.api.base import ApiModel


class ConditionType(StrEnum):
    """Conditions, in the order in which a healthy job reaches them."""

    CREATED = "Created"
    GENERATOR_READY = "GeneratorReady"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Reason(StrEnum):
    """Why a condition is what it is. `advice` says what a user can do about it."""

    advice: str

    def __new__(cls, value: str, advice: str) -> Reason:
        member = str.__new__(cls, value)
        member._value_ = value
        member.advice = advice
        return member

    # How a healthy job goes.
    JOB_CREATED = "JobCreated", "The Job exists; its pod follows."
    JOB_SUSPENDED = "JobSuspended", "The Job is suspended, by spec.suspend or by a queue; nothing runs until it is resumed."
    POD_PENDING = "PodPending", "The pod is not running yet; the message says what it waits for."
    GENERATOR_STARTING = "GeneratorStarting", "vLLM is loading; large models take minutes."
    GENERATOR_SERVING = "GeneratorServing", "vLLM answers."
    TRAINING = "Training", "Optimizer steps are being made."
    STARTING = "Starting", "The containers run; the first step has not been made yet."
    RETRYING = "Retrying", "The last pod failed in a way that is retried; the message says how."
    FINISHED = "Finished", "All steps were made and the model was saved."
    # What ends a job, by the launcher's exit code. User errors: never retried.
    INVALID_SPEC = "InvalidSpec", "Correct the field that the message names and apply again."
    MODEL_NOT_FOUND = "ModelNotFound", "Check model.name or model.path, and the volume that should bring it."
    DATASET_INVALID = "DatasetInvalid", "Check dataset: the message names the column, file or sample."
    REWARD_IMPORT_FAILED = "RewardImportFailed", "Check rewards[].function: it must be importable in the runtime image."
    REWARD_FAILED = "RewardFailed", "A reward raised, hung or returned the wrong thing; the message names the sample."
    WORLD_SIZE_MISMATCH = (
        "WorldSizeMismatch",
        "accelerate started another number of ranks than gpus - generation.gpus; check accelerate.config.",
    )
    WEIGHTS_DIVERGED = "WeightsDiverged", "Generator and trainer disagree on the same weights; check dtypes and the vLLM version."
    # Failures that another pod may not have: retried up to backoffLimit.
    GENERATOR_NOT_READY = "GeneratorNotReady", "vLLM did not answer in time; read its log, raise generation.readyTimeoutSeconds."
    GENERATOR_LOST = "GeneratorLost", "vLLM died and did not come back in time; read its log of the previous start."
    WEIGHT_SYNC_FAILED = "WeightSyncFailed", "A weight sync did not finish; the message names the phase."
    TRAINER_CRASHED = "TrainerCrashed", "A training process ended with an error; the message holds its last lines."
    STALLED = "Stalled", "No progress within the deadline; the message names what was waited for."
    TERMINATED = "Terminated", "The pod was told to stop; a checkpoint was saved where possible."
    # What Kubernetes says.
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded", "The pod failed more often than backoffLimit allows; the message holds the last cause."
    DEADLINE_EXCEEDED = "DeadlineExceeded", "activeDeadlineSeconds passed; raise it or make the run shorter."
    POD_FAILED = "PodFailed", "The pod failed without a word from the launcher; the message holds what Kubernetes says."
    JOB_CONFLICT = "JobConflict", "A Job of this name exists and belongs to somebody else; rename one of the two."
    JOB_REJECTED = "JobRejected", "The API server refused the Job; the message holds its words."
    JOB_LOST = "JobLost", "The Job was deleted by somebody else while the run was going."


Text = Annotated[str, Field(max_length=32768)]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Condition(ApiModel):
    """One observation about the job, in the form that Kubernetes uses everywhere."""

    type: Annotated[str, Field(max_length=316)] = Field(description="Created, GeneratorReady, Running, Succeeded or Failed.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Annotated[str, Field(min_length=1, max_length=1024)] = Field(description="Why, in one CamelCase word from a fixed list.")
    message: Text = Field("", description="Why, in a sentence for a person.")
    last_transition_time: Timestamp = Field(description="When status last changed.")
    observed_generation: int | None = Field(None, ge=0, description="Generation of the spec that this was said of.")


class Progress(ApiModel):
    """How far the run is, as the launcher reports it. Numbers are text: they are for reading, and floats do not survive the wire."""

    step: int | None = Field(None, ge=0, description="Optimizer steps made.")
    total_steps: int | None = Field(None, ge=0, description="Optimizer steps to make in all.")
    steps: Annotated[str, Field(max_length=64)] | None = Field(None, description="Steps made of all steps, for reading: 12/150.")
    reward: Annotated[str, Field(max_length=64)] | None = Field(None, description="Mean reward of the last step.")
    seconds_per_step: Annotated[str, Field(max_length=64)] | None = Field(None, description="Duration of recent steps, in seconds.")
    remaining_seconds: int | None = Field(None, ge=0, description="Estimated seconds to the end.")
    policy_version: int | None = Field(
        None, ge=0, description="Weights the generator last took: optimizer steps behind them, 0 is the base model."
    )
    world_size: int | None = Field(None, ge=0, description="Training ranks that came up.")
    last_updated: Timestamp | None = Field(None, description="When the trainer last reported.")


class OnlineTrainingJobStatus(ApiModel):
    """Observed state of a job."""

    state: Annotated[str, Field(max_length=64)] | None = Field(
        None,
        description="One word for people, derived from the conditions: Pending, Suspended, Starting, Running, Ending, Retrying, "
        "Succeeded or Failed.",
    )
    message: Text | None = Field(None, description="One sentence for people: the message of the condition that `state` comes from.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Observations about the job.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: int | None = Field(None, ge=0, description="Generation of the spec that this status describes.")
    job_name: Annotated[str, Field(max_length=253)] | None = Field(None, description="Name of the Job that runs the pods.")
    start_time: Timestamp | None = Field(None, description="When the current pod started.")
    completion_time: Timestamp | None = Field(None, description="When the job succeeded or failed.")
    restarts: int | None = Field(None, ge=0, description="Pods that failed and were replaced.")
    progress: Progress | None = Field(None, description="How far the run is.")
