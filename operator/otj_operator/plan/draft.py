"""The next status of a job, begun from the present one: what is not said anew stays.

Keeps the rules that every status obeys: lastTransitionTime moves only with `status`, each condition carries the generation it was
said of, and `state` and `message` follow from the conditions.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from otj_operator.plan.parent import Parent
from otj_operator.plan.progress import at_rest
from otj_runtime.api import Condition, ConditionType, OnlineTrainingJobStatus, Reason

_WORDS: dict[str, str] = {
    Reason.TRAINING: "Running",
    Reason.STARTING: "Starting",
    Reason.JOB_SUSPENDED: "Suspended",
    Reason.SUSPENDED_ELSEWHERE: "Suspended",
    Reason.QUEUE_DEACTIVATED: "Suspended",
    Reason.SUSPENDING: "Suspending",
    Reason.WAITING_FOR_QUEUE: "Queued",
    Reason.DELETING: "Deleting",
    Reason.RETRYING: "Retrying",
    Reason.POD_PENDING: "Pending",
}
"""`state` by the reason of the condition Running; any other reason means that the pod is on its way out."""

_OVER = (ConditionType.GENERATOR_READY, ConditionType.RUNNING, ConditionType.WEIGHTS_IN_SYNC, ConditionType.PROGRESSING)
"""Conditions that are False for one and the same reason once nothing runs any more."""


class Draft:
    """A status in the making."""

    def __init__(self, parent: Parent, now: datetime) -> None:
        present = OnlineTrainingJobStatus.model_validate(parent.status)
        self._generation, self._now = parent.generation, timestamp(now)
        self.again_after: float | None = None
        self._before = {condition.type: condition for condition in present.conditions}
        self._conditions = dict(self._before)
        self.job_name = present.job_name
        self.job_uid = present.job_uid
        self.pod_name = present.pod_name
        self.start_time = present.start_time
        self.completion_time = present.completion_time
        self.restarts = present.restarts
        self.restarts_counted = present.restarts_counted
        self.progress = present.progress

    def say(self, kind: ConditionType, status: bool, reason: Reason, message: str = "") -> None:
        """Set a condition; without a message the reason's advice stands in for it."""
        self.quote(kind, status, reason, message or reason.advice)

    def quote(self, kind: ConditionType, status: bool, reason: str, message: str) -> None:
        """Set a condition in somebody else's words."""
        before = self._before.get(kind)
        word = "True" if status else "False"
        self._conditions[kind] = Condition(
            type=kind,
            status="True" if status else "False",
            reason=reason,
            message=message[:32768],
            last_transition_time=before.last_transition_time if before and before.status == word else self._now,
            observed_generation=self._generation,
        )

    def rest(self, reason: Reason, message: str = "", *, cause: tuple[Reason, str] | None = None) -> None:
        """Nothing runs: say so of everything that then cannot be. `cause` is why nothing moves, where that is more exact."""
        for kind in _OVER:
            if kind is not ConditionType.WEIGHTS_IN_SYNC or kind in self._before:
                self.say(kind, False, *((cause or (reason, message)) if kind is ConditionType.PROGRESSING else (reason, message)))
        self.progress = at_rest(self.progress)

    def keep(self, kind: ConditionType) -> None:
        """Say of the present generation what is said so far."""
        if kind in self._conditions:
            self._conditions[kind] = self._conditions[kind].model_copy(update={"observed_generation": self._generation})

    def end(self, kind: ConditionType, reason: Reason, message: str, *, time: str | None = None) -> None:
        """Set a terminal condition, and with it everything that is over."""
        told = f"The run is over; {kind} says how."  # a long message need not stand there five times
        self.rest(reason, told)
        self.say(ConditionType.SUSPENDED, False, reason, told)
        for said in (ConditionType.QUOTA_RESERVED, ConditionType.CHECKPOINT_FRESH):
            self.keep(said)
        self.say(kind, True, reason, message)
        self.completion_time = time or self._now

    def wake(self, seconds: float) -> None:
        """Decide again in `seconds` at the latest."""
        self.again_after = seconds if self.again_after is None else min(self.again_after, seconds)

    def before(self, kind: ConditionType) -> Condition | None:
        """The condition as the present status has it."""
        return self._before.get(kind)

    def to_wire(self) -> dict[str, Any]:
        """The status as the API server stores it."""
        conditions = [self._conditions[kind] for kind in ConditionType if kind in self._conditions]
        state, message = _summary(self._conditions)
        return OnlineTrainingJobStatus(
            state=state,
            message=message,
            conditions=conditions,
            observed_generation=self._generation,
            job_name=self.job_name,
            job_uid=self.job_uid,
            pod_name=self.pod_name,
            start_time=self.start_time,
            completion_time=self.completion_time,
            restarts=self.restarts,
            restarts_counted=self.restarts_counted,
            progress=self.progress,
        ).to_wire()


def finished(status: dict[str, Any]) -> bool:
    """Whether a status is terminal."""
    return any(c["type"] in (ConditionType.SUCCEEDED, ConditionType.FAILED) and c["status"] == "True" for c in status.get("conditions", []))


def timestamp(moment: datetime) -> str:
    """A time as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _summary(conditions: dict[str, Condition]) -> tuple[str, str | None]:
    """`state` and `message` that follow from `conditions`."""
    for kind, word in ((ConditionType.FAILED, "Failed"), (ConditionType.SUCCEEDED, "Succeeded")):
        if kind in conditions:
            return word, conditions[kind].message
    running, progressing = conditions.get(ConditionType.RUNNING), conditions.get(ConditionType.PROGRESSING)
    if running is not None:
        # What does not move says why; the reason of Running is the wider one, and makes the word.
        cause = progressing if progressing is not None and progressing.status == "False" else running
        return _WORDS.get(running.reason, "Ending"), cause.message
    created = conditions.get(ConditionType.CREATED)
    return "Pending", created.message if created else None
