"""The next status of a job, begun from the present one: what is not said anew stays.

Keeps the rules that every status obeys: lastTransitionTime moves only with `status`, each condition carries the generation it was
said of, and `state` and `message` follow from the conditions.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from otj_operator.plan.observed import Parent
from otj_runtime.api import Condition, ConditionType, OnlineTrainingJobStatus, Progress, Reason

_WORDS: dict[str, str] = {
    Reason.TRAINING: "Running",
    Reason.STARTING: "Starting",
    Reason.JOB_SUSPENDED: "Suspended",
    Reason.RETRYING: "Retrying",
    Reason.POD_PENDING: "Pending",
}
"""`state` by the reason of the condition Running; any other reason means that the pod is on its way out."""


class Draft:
    """A status in the making."""

    def __init__(self, parent: Parent, now: datetime) -> None:
        present = known_status(parent.status)
        self._generation, self._now = parent.generation, timestamp(now)
        self._before = {condition.type: condition for condition in present.conditions}
        self._conditions = dict(self._before)
        self.job_name = present.job_name
        self.start_time = present.start_time
        self.completion_time = present.completion_time
        self.restarts = present.restarts
        self.progress = present.progress

    def say(self, kind: ConditionType, status: bool, reason: Reason, message: str = "") -> None:
        """Set a condition; without a message the reason's advice stands in for it."""
        before = self._before.get(kind)
        word = "True" if status else "False"
        self._conditions[kind] = Condition(
            type=kind,
            status="True" if status else "False",
            reason=reason,
            message=(message or reason.advice)[:32768],
            last_transition_time=before.last_transition_time if before and before.status == word else self._now,
            observed_generation=self._generation,
        )

    def keep(self, kind: ConditionType) -> None:
        """Say of the present generation what was said before."""
        self._conditions[kind] = self._before[kind].model_copy(update={"observed_generation": self._generation})

    def end(self, kind: ConditionType, reason: Reason, message: str, *, time: str | None = None) -> None:
        """Set a terminal condition, and with it everything that is over."""
        self.say(ConditionType.RUNNING, False, reason, message)
        if ConditionType.GENERATOR_READY in self._conditions:
            self.say(ConditionType.GENERATOR_READY, False, reason, message)
        self.say(kind, True, reason, message)
        self.completion_time = time or self._now

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
            start_time=self.start_time,
            completion_time=self.completion_time,
            restarts=self.restarts,
            progress=self.progress,
        ).to_wire()


def known_status(raw: dict[str, Any]) -> OnlineTrainingJobStatus:
    """The status in `raw`. Fields of another version of the operator are left out rather than fatal."""

    def known(model: type[Condition | Progress | OnlineTrainingJobStatus], values: dict[str, Any]) -> dict[str, Any]:
        names = {field.alias for field in model.model_fields.values()}
        return {name: value for name, value in values.items() if name in names}

    values = known(OnlineTrainingJobStatus, raw)
    values["conditions"] = [known(Condition, condition) for condition in raw.get("conditions", [])]
    if "progress" in values:
        values["progress"] = known(Progress, raw["progress"])
    return OnlineTrainingJobStatus.model_validate(values)


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
    running, created = conditions.get(ConditionType.RUNNING), conditions.get(ConditionType.CREATED)
    if running is not None:
        return _WORDS.get(running.reason, "Ending"), running.message
    return "Pending", created.message if created else None
