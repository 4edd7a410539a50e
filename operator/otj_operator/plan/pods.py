"""What the operator sees of a pod and its containers: 10 KiB cut down to a few hundred bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from otj_operator.plan.children import owner_of
from otj_operator.plan.parent import Key
from otj_runtime.pod import names

Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerView:
    """A container's state: waiting, running, terminated, or nothing yet."""

    name: str
    state: str
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    ready: bool = False
    restarts: int = 0
    previous_end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """A pod of a Job of ours."""

    key: Key
    name: str
    uid: str
    resource_version: str
    job_uid: str
    created: str
    deleting: bool
    due: str
    """When it must have ended, once it is being deleted."""
    phase: str
    reason: str
    message: str
    ip: str
    progress_port: int | None
    start_time: str | None
    unschedulable: str
    model: ContainerView
    generator: ContainerView
    trainer: ContainerView

    @property
    def live(self) -> bool:
        """Whether it may still hold its GPUs."""
        return self.phase not in ("Succeeded", "Failed")

    @classmethod
    def of(cls, raw: Object) -> PodView:
        """The view of an object as the API server sends it."""
        metadata, status = raw["metadata"], raw.get("status") or {}
        owner = owner_of(metadata)
        containers = {c["name"]: _container(c) for kind in ("initContainerStatuses", "containerStatuses") for c in status.get(kind) or []}
        scheduled: Object = next((c for c in status.get("conditions") or [] if c["type"] == "PodScheduled"), {})
        return cls(
            key=Key(metadata["namespace"], metadata["labels"][names.JOB_LABEL]),
            name=metadata["name"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            job_uid=owner.uid if owner else "",
            created=metadata["creationTimestamp"],
            deleting="deletionTimestamp" in metadata,
            due=metadata.get("deletionTimestamp", ""),
            phase=status.get("phase", "Pending"),
            reason=status.get("reason", ""),
            message=status.get("message", ""),
            ip=status.get("podIP", ""),
            progress_port=_progress_port(raw["spec"]),
            start_time=status.get("startTime"),
            unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
            **{
                name: containers.get(name, ContainerView(name=name, state=""))
                for name in (names.MODEL_CONTAINER, names.GENERATOR_CONTAINER, names.TRAINER_CONTAINER)
            },
        )


def _container(status: Object) -> ContainerView:
    states: Object = status.get("state") or {}
    state = next(iter(states), "")
    details: Object = states.get(state) or {}
    previous = (status.get("lastState") or {}).get("terminated")
    return ContainerView(
        name=status["name"],
        state=state,
        reason=details.get("reason", ""),
        message=details.get("message", ""),
        exit_code=details.get("exitCode"),
        ready=bool(status.get("ready")),
        restarts=status.get("restartCount", 0),
        previous_end=f"{previous.get('reason', 'ended')}, exit code {previous.get('exitCode')}" if previous else "",
    )


def _progress_port(spec: Object) -> int | None:
    for container in spec.get("containers", []):
        for port in container.get("ports") or []:
            if port.get("name") == names.PROGRESS_PORT_NAME:
                return int(port["containerPort"])
    return None
