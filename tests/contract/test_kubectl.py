"""What users see of a run through kubectl, and several people applying to one object."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from otj_runtime.api import Progress
from otj_runtime.pod.metrics import LauncherReport
from tests.cluster.host import ClusterError
from tests.contract import snapshots
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import Kubelet
from tests.contract.launcher import launcher
from tests.contract.operator_process import eventually
from tests.contract.runs import Run
from tests.unit.api.specs import changed

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("operator")]

PROGRESS = Progress(
    step=12,
    total_steps=150,
    reward="0.25",
    kl="0.0123",
    seconds_per_step="1.5",
    tokens_per_second="812",
    sync_seconds="0.5",
    weight_transfer="mailbox, 6.18 GB/s: asked for",
    staleness="1",
    trainer_idle="0.4",
    generator_idle="0.55",
    remaining_seconds=7500,
    policy_version=12,
    world_size=3,
    checkpoint_step=10,
    checkpoint_time="2026-01-01T00:00:00Z",
)


@pytest.fixture(scope="module")
def trained(server: ApiServer, operator: None) -> Iterator[Run]:
    """A run that trains, and whose launcher tells everything."""
    with launcher() as port:
        run = Run(server, "shown", {"output.claimName": "results", "output.saveSteps": 5})
        run.created()
        port.report = LauncherReport(phase="training", generator_ready=True, progress=PROGRESS)
        Kubelet(server).start_pod("shown", name="shown-1", launcher=port.address)
        run.wait("Progressing")
        eventually("progress", lambda: "12/150" in server.kubectl("get", "otj", "shown"))
        eventually("the events", lambda: {"JobCreated", "Training"} <= {reason for _, reason in run.events()})
        yield run


@pytest.mark.parametrize(("name", "flags"), [("get", ()), ("get-wide", ("-o", "wide"))])
def test_get_shows_the_run_at_a_glance(trained: Run, name: str, flags: tuple[str, ...]) -> None:
    snapshots.check(name, trained.server.kubectl("get", "otj", "shown", *flags))


def test_describe_tells_everything(trained: Run) -> None:
    snapshots.check("describe", _status(trained.server, "shown"))


def test_describe_of_an_early_failure_has_no_empty_progress(server: ApiServer) -> None:
    run = Run(server, "early-failure", {"tolerations": [{"operator": "Sometimes"}]})
    run.wait("Failed", reason="JobRejected")
    snapshots.check("describe-early-failure", _status(server, "early-failure"))


@pytest.mark.parametrize("field", ["spec.suspend", "spec.managedBy", "status.progress", "status.conditions"])
def test_explain_says_what_a_field_is(server: ApiServer, field: str) -> None:
    snapshots.check(f"explain-{field.replace('.', '-')}", server.kubectl("explain", f"otj.{field}"))


def test_wait_ends_with_the_condition(trained: Run) -> None:
    trained.server.kubectl("wait", "--for=condition=Running", "otj/shown", "--timeout=5s")
    trained.server.kubectl("wait", "--for=condition=Suspended=false", "otj/shown", "--timeout=5s")
    trained.server.kubectl("wait", "--for=jsonpath={.status.state}=Running", "otj/shown", "--timeout=5s")


def test_two_managers_apply_to_one_object_each_their_own_fields(server: ApiServer) -> None:
    """One brings the run, the other pauses it: neither undoes the other, and a claim of both on one field is refused by name."""

    def apply(manager: str, spec: dict[str, object], *flags: str) -> str:
        document = {"apiVersion": "onlinetraining.dev/v1alpha1", "kind": "OnlineTrainingJob", "metadata": {"name": "shared"}, "spec": spec}
        return server.kubectl("apply", "--server-side", f"--field-manager={manager}", *flags, "-f", "-", stdin=json.dumps(document))

    whole = changed({})["spec"]
    apply("team", whole)
    required = {name: whole[name] for name in ("algorithm", "model", "dataset", "gpus")}
    apply("on-call", required | {"suspend": True})
    apply("team", whole | {"backoffLimit": 5})
    found = json.loads(server.kubectl("get", "otj", "shared", "-o", "json"))["spec"]
    assert (found["suspend"], found["backoffLimit"]) == (True, 5)
    with pytest.raises(ClusterError, match=r'conflict with "on-call".*\n*.*\.spec\.suspend'):
        apply("team", whole | {"suspend": False})


def test_diff_shows_what_an_apply_would_change(trained: Run) -> None:
    document = trained.object()
    document["spec"]["suspend"] = True
    document.pop("status")
    for field in ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation"):
        document["metadata"].pop(field, None)
    with pytest.raises(ClusterError) as differs:
        trained.server.kubectl("diff", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(document))
    lines = [line for line in str(differs.value).splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert [line.replace(" ", "") for line in lines if "suspend" in line] == ["-suspend:false", "+suspend:true"]
    assert [line for line in lines if "generation" not in line and "suspend" not in line] == []


def _status(server: ApiServer, name: str) -> str:
    """What `kubectl describe` says of the status; the spec above it is the user's."""
    _, _, status = server.kubectl("describe", "otj", name, "--show-events=false").partition("\nStatus:\n")
    return status
