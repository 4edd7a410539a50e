"""Does to Jobs what Kueue does, on an API server that has no Kueue: written from its documented contract, not from its code.

webhook     a new Job that names a queue is suspended before anybody sees it
loop        every such Job gets a Workload; an admitted one is started: node selector written into the template, suspend false, whoever
            suspended it; one whose Workload is not admitted (any more), or not active, is suspended and gets its template back
the test    admits, evicts and deactivates, as quota would
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from otj_runtime.pod.names import QUEUE_LABEL
from tests.cluster.host import ClusterError
from tests.contract.apiserver import ApiServer

Object = dict[str, Any]

TIME = "2026-01-01T00:00:00Z"
FLAVOUR = {"pool": "a100"}
MANAGER = "--field-manager=kueue"
_OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}

CRD: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    # The group is one that only the Kubernetes project may define without this note.
    "metadata": {"name": "workloads.kueue.x-k8s.io"},
    "spec": {
        "group": "kueue.x-k8s.io",
        "scope": "Namespaced",
        "names": {"kind": "Workload", "listKind": "WorkloadList", "plural": "workloads", "singular": "workload", "shortNames": ["wl"]},
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": _OPEN, "status": _OPEN}}},
            }
        ],
    },
}


class Kueue:
    """The queueing system of `server`."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self._admitted: set[str] = set()
        self._stop = threading.Event()

    def admit(self, job: str) -> None:
        """There is quota for the Job's Workload."""
        self._say(job, QuotaReserved=("True", "QuotaReserved", "Quota reserved in ClusterQueue cq"), Evicted=("False", "QuotaReserved", ""))
        self._admitted.add(job)

    def deny(self, job: str, reason: str, message: str) -> None:
        """There is no quota yet."""
        self._say(job, QuotaReserved=("False", reason, message))

    def evict(self, job: str, reason: str, message: str) -> None:
        """The quota goes to somebody else."""
        self._admitted.discard(job)
        self._say(job, QuotaReserved=("False", "Pending", message), Evicted=("True", reason, message))

    def deactivate(self, job: str, reason: str, message: str) -> None:
        """Kueue gives the Workload up."""
        self.evict(job, reason, message)
        self._patch("workload", self.workload(job)["metadata"]["name"], {"spec": {"active": False}})

    def workload(self, job: str) -> Object:
        """The Workload of a Job."""
        found: Object = json.loads(self.server.kubectl("get", "workload", f"job-{job}", "-o", "json"))
        return found

    def run(self) -> None:
        """The loop."""
        while not self._stop.wait(0.3):
            with suppress(ClusterError):  # an object changed or went away meanwhile: the next round sees it
                for job in json.loads(self.server.kubectl("get", "jobs", "-l", QUEUE_LABEL, "-o", "json"))["items"]:
                    self._reconcile(job)

    def stop(self) -> None:
        """End the loop."""
        self._stop.set()

    def _reconcile(self, job: Object) -> None:
        name = job["metadata"]["name"]
        found = self.server.kubectl("get", "workload", f"job-{name}", "-o", "json", "--ignore-not-found")
        if not found or json.loads(found)["metadata"]["ownerReferences"][0]["uid"] != job["metadata"]["uid"]:
            self._make_workload(job)
            return
        workload = json.loads(found)
        if name in self._admitted and not workload["spec"]["active"]:
            self.evict(name, "Deactivated", "The workload is deactivated")
        start = name in self._admitted
        if job["spec"]["suspend"] is start:
            if not start:  # the template of a Job that runs is fixed
                self._patch("job", name, {"spec": {"suspend": True}})
                self._patch("job", name, {"status": {"startTime": None}}, "--subresource=status")
            template = {"spec": {"nodeSelector": FLAVOUR if start else dict.fromkeys(FLAVOUR)}}
            self._patch("job", name, {"spec": {"suspend": not start, "template": template}})

    def _make_workload(self, job: Object) -> None:
        metadata = job["metadata"]
        self.server.kubectl("delete", "workload", f"job-{metadata['name']}", "--ignore-not-found")
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"], "controller": True}
        workload = {
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "Workload",
            "metadata": {
                "name": f"job-{metadata['name']}",
                "namespace": metadata["namespace"],
                "labels": {"kueue.x-k8s.io/job-uid": metadata["uid"]},
                "ownerReferences": [owner],
            },
            "spec": {"queueName": metadata["labels"][QUEUE_LABEL], "active": True},
        }
        self.server.kubectl("create", "-f", "-", stdin=json.dumps(workload))

    def _say(self, job: str, **conditions: tuple[str, str, str]) -> None:
        said = [
            {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": TIME}
            for kind, (status, reason, message) in conditions.items()
        ]
        self._patch("workload", f"job-{job}", {"status": {"conditions": said}}, "--subresource=status")

    def _patch(self, kind: str, name: str, body: Object, *flags: str) -> None:
        self.server.kubectl("patch", kind, name, "--type=merge", MANAGER, *flags, "-p", json.dumps(body))


@contextmanager
def kueue(server: ApiServer) -> Iterator[Kueue]:
    """Install it, let it work, and take it away."""
    server.kubectl("create", "-f", "-", stdin=json.dumps(CRD | {"metadata": CRD["metadata"] | {"annotations": _APPROVED}}))
    server.kubectl("wait", "--for=condition=Established", "crd/workloads.kueue.x-k8s.io", "--timeout=20s")
    player = Kueue(server)
    with _webhook(server):
        loop = threading.Thread(target=player.run)
        loop.start()
        try:
            yield player
        finally:
            player.stop()
            loop.join()
            server.kubectl("delete", "crd", "workloads.kueue.x-k8s.io")


_APPROVED = {"api-approved.kubernetes.io": "unapproved, stands in for Kueue's in a test"}


class _Suspend(BaseHTTPRequestHandler):
    """Answers an AdmissionReview about a new Job: suspend it."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        patch = base64.b64encode(json.dumps([{"op": "add", "path": "/spec/suspend", "value": True}]).encode()).decode()
        answer = {"uid": review["request"]["uid"], "allowed": True, "patchType": "JSONPatch", "patch": patch}
        body = json.dumps({"apiVersion": review["apiVersion"], "kind": review["kind"], "response": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _webhook(server: ApiServer) -> Iterator[None]:
    pki = server.folder / "pki"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "api.crt", pki / "api.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Suspend) as http:
        http.socket = context.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        authority = base64.b64encode((pki / "ca.crt").read_bytes()).decode()
        hook = {
            "name": "mjob.kueue.x-k8s.io",
            "clientConfig": {"url": f"https://127.0.0.1:{http.server_address[1]}/mutate", "caBundle": authority},
            "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
            "objectSelector": {"matchExpressions": [{"key": QUEUE_LABEL, "operator": "Exists"}]},
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
        }
        configuration = {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "kueue"},
            "webhooks": [hook],
        }
        server.kubectl("create", "-f", "-", stdin=json.dumps(configuration))
        try:
            yield
        finally:
            server.kubectl("delete", "mutatingwebhookconfiguration", "kueue")
            http.shutdown()
            thread.join()
