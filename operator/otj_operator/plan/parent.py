"""What the operator sees of an OnlineTrainingJob: what the user wants, and the status that was written last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from otj_operator.plan.sharing import share_strings
from otj_runtime.api.lifecycle import OPERATOR
from otj_runtime.pod import names

Object = dict[str, Any]


class Key(NamedTuple):
    """Names one OnlineTrainingJob; its Job has the same name, its pods carry the name as a label."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What Kubernetes lets change of a Job that exists; as the spec names them, and the Job too."""

    backoff_limit: int
    active_deadline_seconds: int | None
    ttl_seconds_after_finished: int | None

    @classmethod
    def of(cls, spec: Object) -> Limits:
        """The limits in the spec of an OnlineTrainingJob or of a Job."""
        return cls(
            backoff_limit=spec.get("backoffLimit", 3),
            active_deadline_seconds=spec.get("activeDeadlineSeconds"),
            ttl_seconds_after_finished=spec.get("ttlSecondsAfterFinished"),
        )

    def to_wire(self) -> Object:
        """The fields, None where there is no limit."""
        return {
            "backoffLimit": self.backoff_limit,
            "activeDeadlineSeconds": self.active_deadline_seconds,
            "ttlSecondsAfterFinished": self.ttl_seconds_after_finished,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An OnlineTrainingJob. `document` is what the user wrote, unparsed: it may be anything that an older CRD let pass."""

    key: Key
    uid: str
    generation: int
    resource_version: str
    created: str
    deleting: bool
    document: Object
    status: Object

    def age(self, now: datetime) -> float:
        """Seconds since its creation, which Kubernetes tells in whole seconds, cut off."""
        return max(0.0, (now - datetime.fromisoformat(self.created)).total_seconds())

    @classmethod
    def of(cls, raw: Object) -> Parent:
        """The view of an object as the API server sends it."""
        metadata = raw["metadata"]
        carried = {name: metadata[name] for name in ("name", "namespace", "uid", "generation", "labels", "annotations") if name in metadata}
        carried.get("annotations", {}).pop("kubectl.kubernetes.io/last-applied-configuration", None)
        return cls(
            key=Key(metadata["namespace"], metadata["name"]),
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            resource_version=metadata["resourceVersion"],
            created=metadata["creationTimestamp"],
            deleting="deletionTimestamp" in metadata,
            document=share_strings({"apiVersion": raw["apiVersion"], "kind": raw["kind"], "metadata": carried, "spec": raw.get("spec")}),
            status=share_strings(raw.get("status") or {}),
        )

    @property
    def spec(self) -> Object:
        """The spec as it was written."""
        return self.document["spec"] or {}

    @property
    def paused(self) -> bool:
        """Whether the user wants it suspended."""
        return self.spec.get("suspend") is True

    @property
    def ours(self) -> bool:
        """Whether it is this operator's to act on."""
        return bool(self.spec.get("managedBy", OPERATOR) == OPERATOR)

    @property
    def queue(self) -> str:
        """The Kueue queue that it asks for, or nothing."""
        return str(self.document["metadata"].get("labels", {}).get(names.QUEUE_LABEL, ""))

    @property
    def keeps_output(self) -> bool:
        """Whether its checkpoints outlive a pod."""
        return bool((self.spec.get("output") or {}).get("claimName"))

    @property
    def save_steps(self) -> int:
        """Steps between two checkpoints."""
        return int((self.spec.get("output") or {}).get("saveSteps", 50))
