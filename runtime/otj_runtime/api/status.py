"""`status` of an OnlineTrainingJob: conditions are the contract, everything else is for reading.

`Reason` is the one list of reasons. A reason is what a user acts on, so each says what to do; the documentation is made from it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from otj_runtime.api.base import ToldModel


class ConditionType(StrEnum):
    """Conditions, in the order in which a healthy job reaches them. `meaning` says what True stands for."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> ConditionType:
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    CREATED = "Created", "The Job that runs the pods exists."
    QUOTA_RESERVED = "QuotaReserved", "Kueue has reserved quota. Only where Kueue manages the Job; reason and message are Kueue's own."
    GENERATOR_READY = "GeneratorReady", "vLLM answers."
    RUNNING = "Running", "The trainer container runs."
    WEIGHTS_IN_SYNC = "WeightsInSync", "The generator holds the trainer's weights, proven by the probe after each sync."
    PROGRESSING = "Progressing", "Optimizer steps are made in time. While it is False the message names the one cause."
    CHECKPOINT_FRESH = "CheckpointFresh", "A checkpoint that outlives the pod is at most two intervals of output.saveSteps old."
    SUSPENDED = "Suspended", "The Job is suspended and no accelerator is held."
    SUCCEEDED = "Succeeded", "All steps were made and the model was saved. Terminal."
    FAILED = "Failed", "The run is over without success. Terminal."


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
    POD_PENDING = "PodPending", "The pod is not running yet; the message says what it waits for."
    GENERATOR_STARTING = "GeneratorStarting", "vLLM is loading; large models take minutes."
    GENERATOR_SERVING = "GeneratorServing", "vLLM answers."
    STARTING = "Starting", "The containers run; the first step has not been made yet."
    TRAINING = "Training", "Optimizer steps are being made."
    RETRYING = "Retrying", "The last pod failed in a way that is retried; the message says how."
    FINISHED = "Finished", "All steps were made and the model was saved."
    NO_SYNC_YET = "NoSyncYet", "The trainer has not reported a weight sync of this pod yet."
    WEIGHTS_PROVEN = "WeightsProven", "After the last sync the probe agreed; progress.policyVersion says which weights the generator has."
    WEIGHTS_BEHIND = "WeightsBehind", "The generator's weights are many steps old; look at progress.syncSeconds and the trainer's log."
    NO_CHECKPOINT_YET = "NoCheckpointYet", "The first checkpoint comes after output.saveSteps steps; until then a restart begins anew."
    CHECKPOINT_SAVED = "CheckpointSaved", "A restart goes on from progress.checkpointStep."
    CHECKPOINT_LATE = (
        "CheckpointLate",
        "No checkpoint was saved for two intervals: check the space on output.claimName and the trainer's log.",
    )
    OUTPUT_NOT_KEPT = (
        "OutputNotKept",
        "Checkpoints end with the pod, so a restart or resume begins anew: set output.claimName in the next run.",
    )
    NOT_SUSPENDED = "NotSuspended", "Nothing holds the Job back."
    # What holds a job back on purpose.
    JOB_SUSPENDED = "JobSuspended", "spec.suspend is true: nothing runs; set it to false to go on from the newest checkpoint."
    SUSPENDING = "Suspending", "The pod saves a checkpoint and ends; until then it holds its accelerators."
    WAITING_FOR_QUEUE = "WaitingForQueue", "Kueue has not admitted the Job; QuotaReserved says what it waits for."
    QUEUE_DEACTIVATED = "QueueDeactivated", "The Workload was deactivated in Kueue; the message says why and how to activate it."
    SUSPENDED_ELSEWHERE = "SuspendedElsewhere", "Somebody else suspended the Job; it is left so. Resume it where it was suspended."
    DELETING = "Deleting", "The run is being deleted; its pod saves a checkpoint and ends."
    # What keeps a pod from running, or a running one from moving.
    POD_REFUSED = (
        "PodRefused",
        "Kubernetes refuses to make the pod: a quota, a policy or a missing service account; the message holds its words.",
    )
    UNSCHEDULABLE = "Unschedulable", "No node fits: the message holds the scheduler's words; compare gpus and resources with the nodes."
    IMAGE_PULL_FAILED = "ImagePullFailed", "Check spec.image, its registry and the pull secrets of the service account."
    CONTAINER_REFUSED = "ContainerRefused", "The node cannot start a container: often a Secret or ConfigMap that spec.env names is missing."
    VOLUME_NOT_READY = "VolumeNotReady", "A volume cannot be bound or mounted: check output.claimName and spec.volumes."
    DEVICE_PLUGIN_REJECTED = (
        "DevicePluginRejected",
        "The node could not hand out the accelerators; if it lasts, its device plugin needs care.",
    )
    NODE_LOST = "NodeLost", "The pod does not end and its node does not answer: restore the node, or delete the pod with --force."
    GENERATOR_RESTARTED = "GeneratorRestarted", "vLLM died and is being started again; it gets the current weights before it serves."
    STEP_OVERDUE = "StepOverdue", "A step takes much longer than those before; the message says when the run gives up."
    LAUNCHER_SILENT = "LauncherSilent", "The pod runs but does not tell its progress: a network policy, or a node in trouble."
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
    NO_NEW_CHECKPOINT = (
        "NoNewCheckpoint",
        "The run failed several times at the same step without a newer checkpoint; the message holds the cause.",
    )
    # Failures that another pod may not have: retried up to backoffLimit.
    GENERATOR_NOT_READY = "GeneratorNotReady", "vLLM did not answer in time; read its log, raise generation.readyTimeoutSeconds."
    GENERATOR_LOST = "GeneratorLost", "vLLM died and did not come back in time; read its log of the previous start."
    WEIGHT_SYNC_FAILED = "WeightSyncFailed", "A weight sync did not finish; the message names the phase."
    TRAINER_CRASHED = "TrainerCrashed", "A training process ended with an error; the message holds its last lines."
    STALLED = "Stalled", "No progress within the deadline; the message names what was waited for."
    TERMINATED = "Terminated", "The pod was told to stop; a checkpoint was saved where possible. Retried and not counted."
    # What Kubernetes says.
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded", "The pod failed more often than backoffLimit allows; the message holds the last cause."
    DEADLINE_EXCEEDED = "DeadlineExceeded", "activeDeadlineSeconds passed; raise it or make the run shorter."
    POD_FAILED = "PodFailed", "The pod failed without a word from the launcher; the message holds what Kubernetes says."
    JOB_CONFLICT = "JobConflict", "A Job of this name exists and belongs to somebody else; rename one of the two."
    JOB_REJECTED = "JobRejected", "The API server refused the Job; the message holds its words."
    JOB_NOT_ADJUSTED = (
        "JobNotAdjusted",
        "The spec was changed, but the API server refused the same change of the Job; the message holds its words.",
    )
    JOB_LOST = "JobLost", "The Job was deleted by somebody else while the run was going."


Text = Annotated[str, Field(max_length=32768)]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


Reading = Annotated[str, Field(max_length=64)] | None
"""A number for people."""


class Condition(ToldModel):
    """One observation about the job, in the form that Kubernetes uses everywhere."""

    type: Annotated[str, Field(max_length=316)] = Field(
        description="Created, QuotaReserved, GeneratorReady, Running, WeightsInSync, Progressing, CheckpointFresh, Suspended, Succeeded or Failed."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Annotated[str, Field(min_length=1, max_length=1024)] = Field(description="Why, in one CamelCase word from a fixed list.")
    message: Text = Field("", description="Why, in a sentence for a person.")
    last_transition_time: Timestamp = Field(description="When status last changed.")
    observed_generation: int | None = Field(None, ge=0, description="Generation of the spec that this was said of.")


class Progress(ToldModel):
    """How far the run is, as the launcher reports it. Numbers are text: they are for reading, and floats do not survive the wire."""

    step: int | None = Field(None, ge=0, description="Optimizer steps made.")
    total_steps: int | None = Field(None, ge=0, description="Optimizer steps to make in all.")
    steps: Annotated[str, Field(max_length=64)] | None = Field(None, description="Steps made of all steps, for reading: 12/150.")
    reward: Reading = Field(None, description="Mean reward of the last step.")
    kl: Reading = Field(None, description="Mean divergence from the reference model in the last step, where the method measures it.")
    seconds_per_step: Reading = Field(None, description="Duration of recent steps, in seconds.")
    tokens_per_second: Reading = Field(None, description="Completion tokens generated per second of recent steps.")
    sync_seconds: Reading = Field(None, description="Duration of the last weight sync, in seconds.")
    weight_transfer: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="How weights reach the generator, the speed of the last weight sync, and why this way."
    )
    staleness: Reading = Field(None, description="Weight versions between sampling and use, the mean of the last step.")
    trainer_idle: Reading = Field(None, description="Share of the last steps in which the trainer waited, 0 to 1.")
    generator_idle: Reading = Field(None, description="Share of the last steps in which the generator waited, 0 to 1.")
    advice: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="The split of accelerators that would be clearly faster, by the idle shares measured, with the estimate."
    )
    remaining_seconds: int | None = Field(None, ge=0, description="Estimated seconds to the end; only while steps are made.")
    eta: Reading = Field(None, description="Estimated time to the end, for reading: 2h05m; only while steps are made.")
    checkpoint_step: int | None = Field(None, ge=0, description="Optimizer steps in the newest complete checkpoint.")
    checkpoint_time: Timestamp | None = Field(None, description="When the newest complete checkpoint was saved.")
    policy_version: int | None = Field(
        None, ge=0, description="Weights the generator last took: optimizer steps behind them, 0 is the base model."
    )
    world_size: int | None = Field(None, ge=0, description="Training ranks that came up.")
    last_updated: Timestamp | None = Field(None, description="When the trainer last reported.")


class OnlineTrainingJobStatus(ToldModel):
    """Observed state of a job."""

    state: Annotated[str, Field(max_length=64)] | None = Field(
        None,
        description="One word for people, derived from the conditions: Pending, Queued, Suspending, Suspended, Starting, Running, Ending, "
        "Retrying, Deleting, Succeeded or Failed.",
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
    job_uid: Annotated[str, Field(max_length=64)] | None = Field(None, description="Identity of that Job, by which it is known again.")
    pod_name: Annotated[str, Field(max_length=253)] | None = Field(None, description="Name of the newest pod; none while suspended.")
    start_time: Timestamp | None = Field(None, description="When the current pod started.")
    completion_time: Timestamp | None = Field(None, description="When the job succeeded or failed.")
    restarts: int | None = Field(None, ge=0, description="Pods that ended early and were replaced; a resume is none.")
    restarts_counted: int | None = Field(None, ge=0, description="Those of them that count towards backoffLimit.")
    progress: Progress | None = Field(None, description="How far the run is.")
