"""What Prometheus is told of one run, and that the documentation names it."""

from __future__ import annotations

import re
import urllib.request

import pytest

from otj_runtime.pod.ports import free_port
from tests.cluster.host import REPOSITORY
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import Kubelet
from tests.contract.launcher import launcher
from tests.contract.operator_process import eventually, running_operator
from tests.contract.runs import Run

pytestmark = pytest.mark.integration

FOLLOWED = {
    *("otj_job_created_seconds_count", "otj_pod_ready_seconds_count", "otj_first_step_seconds_count"),
    *("otj_reconcile_seconds_count", "otj_api_calls_total", "otj_progress_pulls_total", "otj_watch_events_total"),
    *("otj_jobs", "otj_watch_age_seconds"),
}
"""Series that a run which makes a step must have raised above nothing."""


def test_a_run_is_measured_from_its_creation_to_its_first_step(server: ApiServer, kubelet: Kubelet) -> None:
    port = free_port()
    with running_operator(server, name="measured", port=port), launcher() as progress:
        run = Run(server, "measured")
        run.created()
        kubelet.start_pod("measured", name="measured-1", launcher=progress.address)
        run.wait("GeneratorReady")
        progress.tell(1, 9, "0.5")
        eventually("every one of them", lambda: _raised(port) >= FOLLOWED)
        assert 'code="201",verb="create"' in _text(port)
        documented = set(re.findall(r"otj_\w+", (REPOSITORY / "docs" / "operations.md").read_text())) - {"otj_operator"}
        assert documented == {name for name in re.findall(r"^# TYPE (otj_\w+)", _text(port), flags=re.MULTILINE) if name[-8:] != "_created"}


def _raised(port: int) -> set[str]:
    values = (line.rsplit(" ", 1) for line in _text(port).splitlines() if line.startswith("otj_"))
    return {name.split("{")[0] for name, value in values if float(value) > 0}


def _text(port: int) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text: str = direct.open(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    return text
