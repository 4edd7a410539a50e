"""Several operator processes: one leads, and the change from one to the next is not seen from outside."""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack

import pytest

from otj_operator.main import LOST_LEASE
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import Kubelet
from tests.contract.launcher import launcher
from tests.contract.operator_process import eventually, running_operator
from tests.contract.runs import Run

pytestmark = pytest.mark.integration


def test_a_restart_of_the_operator_writes_nothing(server: ApiServer, kubelet: Kubelet) -> None:
    with launcher() as port:
        with running_operator(server, name="first"):
            run = Run(server, "calm")
            run.created()
            kubelet.start_pod("calm", name="calm-1", launcher=port.address)
            port.tell(3, 9, "0.5")
            eventually("step 3 is shown", lambda: run.object()["status"].get("progress", {}).get("steps") == "3/9")
            run.wait("Running", reason="Training")
        before = _everything(server)
        answers = port.answers
        with running_operator(server, name="second"):
            eventually("the successor asks the launcher", lambda: port.answers > answers + 5)
    assert _everything(server) == before


def test_a_standby_takes_over_at_once_when_the_leader_is_told_to_stop(server: ApiServer) -> None:
    with ExitStack() as leader:
        leader.enter_context(running_operator(server, name="leader"))
        eventually("the first one leads", lambda: _holder(server) == "leader")
        with running_operator(server, name="standby"):
            time.sleep(4)  # two rounds of renewal
            assert _holder(server) == "leader", "the lease changed hands while its holder was well"
            leader.close()
            eventually("the standby leads", lambda: _holder(server) == "standby", seconds=8)


def test_a_leader_that_was_frozen_is_replaced_and_ends_when_it_wakes(server: ApiServer) -> None:
    with running_operator(server, name="frozen") as frozen:
        eventually("the first one leads", lambda: _holder(server) == "frozen")
        frozen.send_signal(signal.SIGSTOP)
        with running_operator(server, name="standby"):
            eventually("the standby leads", lambda: _holder(server) == "standby", seconds=25)
            frozen.send_signal(signal.SIGCONT)
            assert frozen.wait(timeout=15) == LOST_LEASE
            assert _holder(server) == "standby"


def test_a_job_made_while_no_operator_ran_is_taken_up(server: ApiServer) -> None:
    run = Run(server, "early")
    assert "status" not in run.object()
    with running_operator(server, name="late"):
        run.created()


def _holder(server: ApiServer) -> str:
    path = "jsonpath={.spec.holderIdentity}"
    return server.kubectl("get", "lease", "online-training-operator", "-n", "online-training-system", "-o", path, "--ignore-not-found")


def _everything(server: ApiServer) -> list[tuple[str, str, str]]:
    items = json.loads(server.kubectl("get", "otj,jobs,events", "-A", "-o", "json"))["items"]
    return [(item["kind"], item["metadata"]["name"], item["metadata"]["resourceVersion"]) for item in items]
