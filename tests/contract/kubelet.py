"""Plays the Job controller and the kubelet on an API server that has neither: makes the pod of a Job, and writes what they would write."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from tests.contract.apiserver import ApiServer

Object = dict[str, Any]

TIME = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class Kubelet:
    """Acts on one namespace of `server`."""

    server: ApiServer
    namespace: str = "default"

    def start_pod(self, job: str, *, name: str, launcher: str = "127.0.0.1:8081", ready: bool = True) -> None:
        """The Job's pod, running on a node; `launcher` is where its progress port is."""
        ip, port = launcher.rsplit(":", 1)
        self.make_pod(job, name=name, progress_port=int(port))
        self.run_pod(name, ip=ip, ready=ready)
        self.job_status(job, active=1, startTime=TIME)

    def run_pod(self, name: str, *, ip: str = "127.0.0.1", ready: bool = True) -> None:
        """All containers of a pod run; `ready` is whether the generator answers."""
        self.pod_status(
            name,
            phase="Running",
            podIP=ip,
            podIPs=[{"ip": ip}],
            startTime=TIME,
            initContainerStatuses=[
                container("model", terminated={"exitCode": 0, "reason": "Completed"}),
                container("generator", ready=ready, running={"startedAt": TIME}),
            ],
            containerStatuses=[container("trainer", ready=True, running={"startedAt": TIME})],
        )

    def bind(self, pod: str) -> None:
        """The scheduler gives it a node: only then is it deleted with its grace period instead of at once."""
        target = {"apiVersion": "v1", "kind": "Node", "name": "node-1"}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod, "namespace": self.namespace}, "target": target}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/binding"
        self.server.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(binding))

    def start_pod_generator(self, pod: str) -> None:
        """The generator's readiness probe succeeds."""
        self.pod_status(
            pod,
            initContainerStatuses=[
                container("model", terminated={"exitCode": 0, "reason": "Completed"}),
                container("generator", ready=True, running={"startedAt": TIME}),
            ],
        )

    def make_pod(self, job: str, *, name: str, progress_port: int = 8081) -> None:
        """The pod as the Job controller makes it from the Job's template."""
        owner = self.get("job", job)
        template = copy.deepcopy(owner["spec"]["template"])
        (trainer,) = template["spec"]["containers"]
        trainer["ports"][0]["containerPort"] = progress_port
        reference = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": owner["metadata"]["uid"], "controller": True}
        metadata = {"name": name, "namespace": self.namespace, "labels": template["metadata"]["labels"], "ownerReferences": [reference]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        self.server.kubectl("create", "-f", "-", stdin=json.dumps(pod))

    def end_trainer(self, pod: str, *, exit_code: int, message: str = "", reason: str = "Error") -> None:
        """The trainer container ends, and with it the pod."""
        ended = {"exitCode": exit_code, "reason": reason, "message": message}
        phase = "Failed" if exit_code else "Succeeded"
        self.pod_status(pod, phase=phase, containerStatuses=[container("trainer", terminated=ended)])

    def end_job(self, job: str, kind: str, *, reason: str, message: str = "") -> None:
        """The Job controller's verdict: kind is Complete or Failed."""
        before = "SuccessCriteriaMet" if kind == "Complete" else "FailureTarget"
        conditions = [
            {"type": t, "status": "True", "reason": reason, "message": message, "lastProbeTime": TIME, "lastTransitionTime": TIME}
            for t in (before, kind)
        ]
        done = {"succeeded": 1, "completionTime": TIME} if kind == "Complete" else {"failed": 1}
        self.job_status(job, active=0, ready=0, terminating=0, startTime=TIME, conditions=conditions, **done)

    def pod_status(self, name: str, **status: Any) -> None:
        """Write fields of a pod's status."""
        self._patch("pod", name, status)

    def job_status(self, name: str, **status: Any) -> None:
        """Write fields of a Job's status."""
        self._patch("job", name, status)

    def get(self, kind: str, name: str) -> Object:
        """An object."""
        found: Object = json.loads(self.server.kubectl("get", kind, name, "-n", self.namespace, "-o", "json"))
        return found

    def _patch(self, kind: str, name: str, status: Object) -> None:
        patch = json.dumps({"status": status})
        self.server.kubectl("patch", kind, name, "-n", self.namespace, "--subresource=status", "--type=merge", "-p", patch)


def container(name: str, *, ready: bool = False, **state: Object) -> Object:
    """A container's status; the one keyword beside `ready` is its state."""
    return {"name": name, "ready": ready, "restartCount": 0, "image": "x", "imageID": "", "state": state}
