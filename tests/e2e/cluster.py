"""kubectl against the test cluster, waiting with a deadline, and what to look at when something went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.host import KUBECONFIG, REPOSITORY, tool

T = TypeVar("T")
Object = dict[str, Any]

OPERATOR = "online-training-operator"
SYSTEM = "online-training-system"
SAMPLES = REPOSITORY / "manifests" / "samples"

COMMAND_SECONDS = 120.0
SHOWN_CHARACTERS = 4000


class Cluster:
    """kubectl with one namespace as its default.

    Its kubeconfig is a copy of the cluster's, so that a command works unchanged in any namespace, and its cache of the API's
    kinds begins empty, as on a machine that has never seen this cluster.
    """

    def __init__(self, folder: Path, *, namespace: str) -> None:
        self.namespace = namespace
        self.environment = {
            **os.environ,
            "KUBECONFIG": str(folder / "kubeconfig"),
            "KUBECACHEDIR": str(folder / "cache"),
            "PATH": os.pathsep.join([str(Path(tool("kubectl")).parent), os.environ["PATH"]]),
        }
        config = json.loads(self.shell(f"kubectl --kubeconfig {KUBECONFIG} config view --raw --flatten -o json"))
        current = next(context for context in config["contexts"] if context["name"] == config["current-context"])
        current["context"]["namespace"] = namespace
        (folder / "kubeconfig").write_text(json.dumps(config))

    def shell(self, line: str, *, seconds: float = COMMAND_SECONDS) -> str:
        """Run a line as a user types it in the repository's root; what it printed."""
        return self._finish(["bash", "-c", line], seconds=seconds)

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = COMMAND_SECONDS) -> str:
        """Run kubectl to its end; what it printed."""
        return self._finish(["kubectl", *arguments], stdin=stdin, seconds=seconds)

    def refused(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl, which must fail; what it said."""
        done = self._run(["kubectl", *arguments], stdin=stdin, seconds=COMMAND_SECONDS)
        assert done.returncode != 0, f"kubectl {' '.join(arguments)} was accepted:\n{done.stdout}"
        return done.stderr

    def background(self, line: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a line as a user types it; its output goes to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(["bash", "-c", f"exec {line}"], env=self.environment, cwd=REPOSITORY, stdout=file, stderr=file)

    def get(self, kind: str, name: str, *options: str) -> Object:
        """One object."""
        found: Object = json.loads(self.kubectl("get", kind, name, "-o", "json", *options))
        return found

    def items(self, kind: str, *options: str) -> list[Object]:
        """Objects of a kind."""
        found: list[Object] = json.loads(self.kubectl("get", kind, "-o", "json", *options))["items"]
        return found

    def pods(self, job: str) -> list[Object]:
        """Pods of an OnlineTrainingJob."""
        return self.items("pods", "-l", f"onlinetraining.dev/job={job}")

    def condition(self, job: str, kind: str) -> Object | None:
        """One condition of an OnlineTrainingJob, once its status has it."""
        conditions = self.get("otj", job).get("status", {}).get("conditions", [])
        return next((found for found in conditions if found["type"] == kind), None)

    def wait_for(self, job: str, kind: str, *, seconds: float, reason: str | None = None) -> Object:
        """Wait until a condition of an OnlineTrainingJob is True, with `reason` if one is given.

        Raises:
            AssertionError: if the deadline passes, or at once if the job ends in another way.
        """

        def look() -> Object | None:
            for end in {"Failed", "Succeeded"} - {kind}:
                ended = self.condition(job, end)
                assert not ended or ended["status"] != "True", f"{job} ended as {end}: {ended['reason']}: {ended['message']}"
            found = self.condition(job, kind)
            return found if found and found["status"] == "True" and reason in (None, found["reason"]) else None

        return eventually(f"{job}: {kind} {reason or ''}", look, seconds=seconds)

    def everything(self) -> set[str]:
        """Names of all objects in the namespace, whatever their kind, but for events, which end by themselves."""
        kinds = self.kubectl("api-resources", "--verbs=list", "--namespaced", "-o", "name").split()
        wanted = ",".join(kind for kind in kinds if not kind.startswith("events"))
        return set(self.kubectl("get", wanted, "-o", "name", "--ignore-not-found").split())

    def report(self) -> str:
        """What a person would look at first, each part cut to its end."""
        looks: Iterable[tuple[str, ...]] = (
            ("get", "otj,jobs,pods,pvc", "-o", "wide"),
            ("describe", "otj"),
            ("describe", "pods"),
            ("logs", "-l", "onlinetraining.dev/job", "-c", "trainer", "--tail=40", "--prefix"),
            ("logs", "-l", "onlinetraining.dev/job", "-c", "generator", "--tail=40", "--prefix"),
            ("get", "pods", "-n", SYSTEM),
            ("logs", "-n", SYSTEM, f"deployment/{OPERATOR}", "--tail=40"),
        )
        return "\n".join(f"$ kubectl {' '.join(look)}\n{self._look(look)}" for look in looks)

    def _look(self, arguments: tuple[str, ...]) -> str:
        try:
            done = self._run(["kubectl", *arguments, "--request-timeout=10s"], stdin=None, seconds=20)
        except AssertionError as error:
            return str(error)
        return (done.stdout + done.stderr)[-SHOWN_CHARACTERS:]

    def _finish(self, command: list[str], *, seconds: float, stdin: str | None = None) -> str:
        done = self._run(command, stdin=stdin, seconds=seconds)
        assert done.returncode == 0, f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def _run(self, command: list[str], *, stdin: str | None, seconds: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, input=stdin, text=True, capture_output=True, timeout=seconds, env=self.environment, cwd=REPOSITORY
            )
        except subprocess.TimeoutExpired:
            raise AssertionError(f"`{' '.join(command)}` took longer than {seconds:.0f} s") from None


def operator_pod(admin: Cluster) -> Object:
    """The operator's pod; one that is being replaced may take a while to go, and does not count."""
    pods = admin.items("pods", "-n", SYSTEM, "-l", f"app.kubernetes.io/name={OPERATOR}")
    [pod] = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    return pod


def eventually(what: str, look: Callable[[], T | None], *, seconds: float) -> T:
    """The first true answer of `look`, which is asked once a second.

    Raises:
        AssertionError: that names `what` if the deadline passes.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what}"
        time.sleep(1)
    return found
