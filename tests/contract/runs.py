"""One OnlineTrainingJob of a test: applied, looked at and waited for."""

from __future__ import annotations

import json
from typing import Any

from tests.contract.apiserver import ApiServer
from tests.contract.operator_process import eventually
from tests.unit.api.specs import changed

Object = dict[str, Any]


class Run:
    """One job of a test, by its name."""

    def __init__(self, server: ApiServer, name: str, changes: dict[str, Any] | None = None, **metadata: Object) -> None:
        self.server, self.name = server, name
        document = changed(changes or {}, name=name)
        document["metadata"] |= metadata
        server.kubectl("create", "-f", "-", stdin=json.dumps(document))

    def object(self) -> Object:
        """The job as it is now."""
        found: Object = json.loads(self.server.kubectl("get", "otj", self.name, "-o", "json"))
        return found

    def condition(self, kind: str) -> Object | None:
        """One condition, if the status has it."""
        return next((c for c in self.object().get("status", {}).get("conditions", []) if c["type"] == kind), None)

    def wait(self, kind: str, *, status: str = "True", reason: str | None = None) -> Object:
        """Wait for a condition to have `status`, and `reason` if one is given."""

        def look() -> Object | None:
            found = self.condition(kind)
            return found if found and found["status"] == status and reason in (None, found["reason"]) else None

        return eventually(f"{self.name}: {kind}={status} {reason or ''}, but {self.condition(kind)}", look)

    def change(self, spec: Object) -> None:
        """Merge `spec` into the job's."""
        self.server.kubectl("patch", "otj", self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def created(self) -> Object:
        """Wait for the Job, and return it."""
        self.wait("Created")
        job: Object = json.loads(self.server.kubectl("get", "job", self.name, "-o", "json"))
        return job

    def events(self) -> list[tuple[str, str]]:
        """Type and reason of every event about the job."""
        found = self.server.kubectl("get", "events", "--field-selector", f"involvedObject.name={self.name}", "-o", "json")
        return [(event["type"], event["reason"]) for event in json.loads(found)["items"]]
