"""What the control client does when the generator does not do its part. What it does otherwise is tested on a real vLLM."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from otj_runtime.pod.errors import GeneratorLost, GeneratorNotReady
from otj_runtime.weights import control as control_module
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.errors import WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.install import Installer, Phases, only_one
from otj_runtime.weights.layout import Layout, Ticket
from otj_runtime.weights.receipts import Receipt, Receipts, State
from tests.unit.weights.fake_generator import FakeGenerator, serving

ROUTES = {
    "init": "/init_weight_transfer_engine",
    "start": "/start_weight_update",
    "update": "/update_weights",
    "install": "/otj/install",
}
TICKET = Ticket(version=3, slot=1, sequence=7)


class Server(FakeGenerator):
    """A generator that answers every route, except as `answers` says."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.answers: dict[str, tuple[int, object]] = {
            "/otj/install": (200, {"paused_s": 0.003}),
            "/get_world_size": (200, {"world_size": 2}),
        }

    def note(self, method: str, path: str, body: Any) -> None:
        self.calls.append(path.split("?")[0])

    def answer(self, path: str, body: Any) -> tuple[int, object]:
        return self.answers.get(path.split("?")[0], (200, {}))


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as started:
        yield started


@pytest.fixture
def receipts() -> Receipts:
    layout = Layout.of([("one", (1,))], torch.float32)
    return Receipts(memoryview(bytearray(layout.file_bytes)), layout)


def _install(server: Server, receipts: Receipts, phases: Phases) -> None:
    installer = Installer(server.control, Path("/mailbox"))
    installer.begin(TICKET, phases)
    for worker in range(2):
        receipts.put(worker, Receipt(TICKET.sequence, State.STAGED))
    installer.end(TICKET, receipts, phases)


def test_an_installation_goes_through_its_phases_in_order(server: Server, receipts: Receipts) -> None:
    phases = Phases()
    _install(server, receipts, phases)
    assert server.calls == [ROUTES["init"], "/get_world_size", *(ROUTES[phase] for phase in ("start", "update", "install"))]
    assert set(phases.seconds) == {"init", "start", "update", "stage", "paused", "install"}
    assert phases.seconds["paused"] == 0.003


@pytest.mark.parametrize("failing", list(ROUTES))
def test_a_failing_phase_is_named_and_nothing_after_it_is_asked(server: Server, receipts: Receipts, failing: str) -> None:
    server.answers[ROUTES[failing]] = (500, {"error": {"message": "out of luck"}})
    with pytest.raises(WeightSyncFailed, match=f"{failing}: .* with 500: out of luck") as caught:
        _install(server, receipts, Phases())
    assert caught.value.phase == failing
    assert server.calls[-1] == ROUTES[failing]


def test_an_update_that_is_open_still_is_given_up_first(server: Server) -> None:
    server.answers[ROUTES["start"]] = (500, {"error": {"message": "already active"}})
    with pytest.raises(WeightSyncFailed, match="already active"):
        Installer(server.control, Path("/mailbox")).begin(TICKET, Phases())
    assert server.calls[-3:] == [ROUTES["start"], ROUTES["update"], ROUTES["start"]]


@pytest.mark.parametrize(
    ("receipt", "words"),
    [
        (Receipt(7, State.FAILED, "tensor norm does not fit"), "worker 1: tensor norm does not fit"),
        (Receipt(6, State.STAGED), "worker 1 did not stage the weights in 0 s"),
        (Receipt(8, State.STAGED), "worker 1 went on to another version, it did not stage the weights"),
    ],
)
def test_a_worker_that_fails_or_keeps_silent_is_named(receipts: Receipts, receipt: Receipt, words: str) -> None:
    receipts.put(0, Receipt(7, State.STAGED))
    receipts.put(1, receipt)
    with pytest.raises(WeightSyncFailed, match=words):
        receipts.wait_staged(sequence=7, workers=2, deadline_s=0.05)


@pytest.mark.parametrize(
    ("receipt", "error", "words"),
    [
        (Receipt(7, State.FAILED, "norm does not hold"), WeightsDiverged, "worker 1 of the generator: norm does not hold"),
        (Receipt(7, State.STAGED), WeightSyncFailed, "proof: worker 1 did not check what it installed in 0 s"),
        (Receipt(6, State.INSTALLED), WeightSyncFailed, "proof: worker 1 did not check"),
        (Receipt(8, State.STAGED), WeightSyncFailed, "proof: worker 1 went on to another version"),
    ],
)
def test_a_worker_that_does_not_hold_what_it_staged_has_diverged(
    receipts: Receipts, receipt: Receipt, error: type[Exception], words: str
) -> None:
    receipts.put(0, Receipt(7, State.INSTALLED))
    receipts.put(1, receipt)
    with pytest.raises(error, match=words):
        receipts.wait_installed(sequence=7, workers=2, deadline_s=0.05)


def test_a_generator_that_keeps_silent_meets_the_deadline_of_its_phase(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(control_module.DEADLINES, "update", 0.2)
    server.silent.add("/update_weights")
    with pytest.raises(WeightSyncFailed, match="update: the generator did not answer POST /update_weights in 0 s"):
        server.control.update(TICKET)
    assert server.calls == ["/update_weights"]


def test_an_absent_generator_is_not_ready_and_serves_no_version() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        absent = GeneratorControl(f"http://127.0.0.1:{probe.getsockname()[1]}")
        assert absent.weight_version() is None
        with pytest.raises(GeneratorNotReady, match=r"did not answer within 0 s.*readyTimeoutSeconds"):
            absent.wait_healthy(deadline_s=0.01)


def test_a_generator_whose_engine_is_dead_is_not_healthy(server: Server) -> None:
    assert server.control.healthy()
    server.answers["/health"] = (503, {})
    assert not server.control.healthy()


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "127.0.0.1:1", "http://127.0.0.1"])
def test_a_url_that_is_no_loopback_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must look like http://host:port"):
        GeneratorControl(url)


def test_only_one_rank_brings_the_generator_back_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "policy.lock"
    with only_one(lock, deadline_s=1), pytest.raises(GeneratorLost, match="another rank"), only_one(lock, deadline_s=0.01):
        pass
    with only_one(lock, deadline_s=1):
        pass
