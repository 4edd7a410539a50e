"""vLLM's own nccl: what goes over the wire, in which order, and what becomes of one that fails; and the choice of a way. No GPU: NCCL is left out,
the rest of vLLM's trainer half is its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine

from otj_runtime.api import DType
from otj_runtime.pod.errors import GeneratorLost, Stalled
from otj_runtime.pod.transfer import Sight, Transfer
from otj_runtime.weights import control as control_module
from otj_runtime.weights import direct as direct_module
from otj_runtime.weights.chosen import ChosenSync
from otj_runtime.weights.direct import DirectSync
from otj_runtime.weights.errors import WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.probe import trainer_scores
from otj_runtime.weights.tensors import policy_tensors
from tests.unit.weights.fake_generator import FakeGenerator, serving
from tests.unit.weights.test_tensors import tiny_model

SEQUENCES = [[1, 2, 3, 4], [5, 6, 7]]
HERE = Sight(device="a", listed=("a", "b"), peers=("b",))
THERE = Sight(device="b", listed=("a", "b"), peers=("a",))
SAME = Sight(device="a", listed=("a",))

UPDATE = ["/otj/hold", "/start_weight_update", "/update_weights", "/otj/install"]
INIT = "/init_weight_transfer_engine"


class Server(FakeGenerator):
    """A generator that answers as vLLM does, and scores the probe with `policy`.

    Attributes:
        calls: routes that changed something, with what was sent.
        failing: routes that are answered with an error.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.calls: list[tuple[str, Any]] = []
        self.failing: set[str] = set()
        self.version = "default"
        self.lame = 0
        self.sight = THERE

    @property
    def routes(self) -> list[str]:
        return [route for route, _ in self.calls]

    def note(self, method: str, path: str, body: Any) -> None:
        if method == "POST" and path != "/v1/completions":
            self.calls.append((path, body))

    def answer(self, path: str, body: Any) -> tuple[int, object]:
        if path in self.failing:
            return 500, {"error": {"message": "out of luck"}}
        return 200, self._said(path, body)

    def _said(self, route: str, body: Any) -> Any:
        if route == "/otj/install":
            self.version = body["version"]
            return {"paused_s": 0.001}
        if route == "/v1/completions":
            scores = trainer_scores(self.policy, body["prompt"], DType.FLOAT32).logprobs
            if self.lame:
                self.lame -= 1
                scores = [[value - 1 for value in row] for row in scores]
            return {"choices": [_choice(index, *pair) for index, pair in enumerate(zip(body["prompt"], scores, strict=True))]}
        known = {"/weight_info": {"weight_version": self.version}, "/get_world_size": {"world_size": 2}, "/otj/devices": [vars(self.sight)]}
        return known.get(route, {})


def _choice(index: int, tokens: list[int], scores: list[float]) -> Any:
    logprobs = [None, *({str(token): {"logprob": score}} for token, score in zip(tokens[1:], scores, strict=True))]
    return {"index": index, "prompt_logprobs": logprobs}


@pytest.fixture
def policy() -> Any:
    torch.manual_seed(0)
    return tiny_model(tied=True)


@pytest.fixture
def server(policy: Any) -> Iterator[Server]:
    with serving(Server(policy)) as started:
        yield started


@pytest.fixture
def broadcast(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor]]:
    """vLLM's engine without NCCL; what it would have sent."""
    sent: list[tuple[str, torch.Tensor]] = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: SimpleNamespace(destroy=lambda: None, disabled=False))
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **_: sent.extend(iterator))
    return sent


def _sync(server: Server, *, dtype: DType = DType.FLOAT32) -> DirectSync:
    return DirectSync(model=server.policy, control=server.control, dtype=dtype, ready_timeout_s=5.0, prompts=SEQUENCES)


def _perturb(policy: Any) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)


def test_nccl_is_vllms_two_halves_with_decoding_held_from_start_to_install(
    policy: Any, server: Server, broadcast: list[tuple[str, torch.Tensor]]
) -> None:
    sync = _sync(server, dtype=DType.BFLOAT16)
    report = sync.push(0)
    assert server.routes == [INIT, *UPDATE]
    told = server.calls[0][1]["init_info"]
    assert told["backend"] == "nccl"
    assert told["init_info"] | {"master_port": 0} == {
        "master_address": "127.0.0.1",
        "master_port": 0,
        "rank_offset": 1,
        "world_size": 3,  # rank 0 and two workers
        "packed": True,
        "packed_buffer_size_bytes": 1 << 30,
        "packed_num_buffers": 2,
    }
    tensors = policy_tensors(policy)
    update = server.calls[3][1]["update_info"]
    assert update["names"] == list(tensors) == [name for name, _ in broadcast]
    assert update["shapes"] == [list(tensor.shape) for tensor in tensors.values()]
    assert set(update["dtype_names"]) == {"bfloat16"}
    assert all(torch.equal(sent, tensors[name].bfloat16()) for name, sent in broadcast)
    assert server.calls[4][1] == {"version": "0"}
    assert report.bytes == 2 * sum(tensor.numel() for tensor in tensors.values())
    assert report.phases["paused"] > 0


@pytest.mark.usefixtures("broadcast")
def test_versions_follow_each_other_over_one_meeting_and_each_is_proven(policy: Any, server: Server) -> None:
    sync = _sync(server)
    for version in range(3):
        sync.push(version)
        proof = sync.proven(version)
        assert not proof.again
        assert proof.agreement.max_abs <= 1e-5
        assert (sync.version, server.version) == (version, str(version))
        _perturb(policy)
    assert server.routes.count(INIT) == 1


@pytest.mark.usefixtures("broadcast")
def test_weights_that_do_not_prove_right_are_sent_again_and_what_was_sampled_is_suspect(server: Server) -> None:
    server.lame = 1
    sync = _sync(server)
    sync.push(4)
    proof = sync.proven(4)
    assert proof.again
    assert server.routes == [INIT, *UPDATE, *UPDATE]
    assert sync.proven(4) == proof  # asked for once


@pytest.mark.usefixtures("broadcast")
def test_weights_that_do_not_prove_right_twice_have_diverged(server: Server) -> None:
    server.lame = 2
    sync = _sync(server)
    sync.push(4)
    with pytest.raises(WeightsDiverged, match="policy version 4"):
        sync.proven(4)


@pytest.mark.usefixtures("broadcast")
def test_a_generator_that_restarted_between_two_pushes_is_met_anew(server: Server) -> None:
    sync = _sync(server)
    sync.push(1)
    server.version = "default"
    sync.push(2)
    assert server.routes == [INIT, *UPDATE, INIT, *UPDATE]
    assert server.version == "2"


@pytest.mark.usefixtures("broadcast")
def test_a_generator_that_restarted_while_it_sampled_is_lost_because_nobody_keeps_its_weights(server: Server) -> None:
    sync = _sync(server)
    sync.push(1)
    sync.reinstall()  # an interrupted connection: it serves them still
    server.version = "default"
    with pytest.raises(GeneratorLost, match=r"serves weights default instead of 1, of which nccl keeps no copy.*weightTransfer: mailbox"):
        sync.reinstall()


@pytest.mark.parametrize("failing", UPDATE)
@pytest.mark.usefixtures("broadcast")
def test_a_phase_that_fails_is_named_and_nothing_after_it_is_asked(server: Server, failing: str) -> None:
    server.failing = {failing}
    sync = _sync(server)
    with pytest.raises(WeightSyncFailed, match="with 500: out of luck"):
        sync.push(0)
    assert server.routes[-1] == failing
    assert sync.version is None


def test_a_send_whose_other_half_was_refused_does_not_wait_for_nccl(
    server: Server, broadcast: list[tuple[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.failing = {"/update_weights"}
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **_: time.sleep(60))
    began = time.monotonic()
    with pytest.raises(WeightSyncFailed, match=r"update: .* out of luck"):
        _sync(server).push(0)
    assert time.monotonic() - began < 30


def test_a_meeting_that_never_comes_about_ends_at_its_deadline_with_the_fix(
    server: Server, broadcast: list[tuple[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_module, "OPEN_SECONDS", 0.3)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: time.sleep(60))
    with pytest.raises(Stalled, match=r"init: nccl did not meet the generator in 0 s; say generation\.weightTransfer: mailbox"):
        _sync(server).open()


@pytest.mark.usefixtures("broadcast")
def test_a_generator_that_does_not_answer_the_meeting_is_not_asked_for_another(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(control_module.DEADLINES, "init", 0.3)
    server.silent = {INIT}
    with pytest.raises(Stalled, match=r"did not answer POST .*; say generation\.weightTransfer: mailbox"):
        _sync(server).open()


class Mailbox:
    """Stands in for the way that is always possible."""

    def __init__(self, *, room: bool = True, stingy: bool = False) -> None:
        self.room = room
        self.stingy = stingy
        self.garbled = False
        self.lends = False
        self.version: int | None = None

    def has_room(self) -> bool:
        return self.room

    def lend(self) -> None:
        if self.stingy:
            raise WeightSyncFailed("lend: bias is made for each push", phase="lend")
        self.lends = True

    def take_back(self) -> None:
        self.lends = False

    def push(self, version: int) -> str:
        if self.lends and self.garbled:
            raise WeightSyncFailed("update: worker 0: tensor norm of version 0 does not fit its checksum", phase="update")
        self.version = version
        return "by mailbox"


def _chosen(wish: str, server: Server, mailbox: Mailbox, *, look: Any = lambda *_: HERE) -> tuple[ChosenSync, list[Transfer]]:
    told: list[Transfer] = []
    way: Any = mailbox
    chosen = ChosenSync(
        wish,
        mailbox=way,
        nccl=lambda: _sync(server),
        model=server.policy,
        control=server.control,
        ready_timeout_s=5.0,
        tell=told.append,
        look=look,
    )
    return chosen, told


@pytest.mark.usefixtures("broadcast")
@pytest.mark.parametrize(("wish", "room"), [("nccl", True), ("auto", False)])
def test_nccl_is_taken_where_the_probe_finds_it_possible(server: Server, wish: str, room: bool) -> None:
    chosen, told = _chosen(wish, server, mailbox := Mailbox(room=room))
    for version in range(2):
        chosen.push(version)
        assert not chosen.proven(version).again
    assert [transfer.kind for transfer in told] == ["nccl"]
    assert (chosen.version, mailbox.version, server.version) == (1, None, "1")


def test_on_a_gpu_that_both_sides_share_the_mailbox_lends_the_weights(server: Server) -> None:
    server.sight = SAME
    chosen, told = _chosen("ipc", server, mailbox := Mailbox())
    chosen.push(0)
    assert (mailbox.lends, mailbox.version) == (True, 0)
    assert [transfer.describe(400.0) for transfer in told] == [
        "ipc, 400 GB/s: ipc was asked for; trainer and generator share their GPU, and the weights are read where the trainer has them"
    ]


def test_weights_that_cannot_be_lent_go_through_the_mailbox(server: Server) -> None:
    server.sight = SAME
    chosen, told = _chosen("ipc", server, mailbox := Mailbox(stingy=True))
    chosen.push(0)
    assert (mailbox.lends, mailbox.version) == (False, 0)
    assert told[0].reason == "ipc was asked for, but ipc is not possible: lend: bias is made for each push"


@pytest.mark.parametrize("good", [0, 1])
def test_a_link_that_passes_wrong_bytes_is_given_up_for_the_mailbox(server: Server, good: int) -> None:
    server.sight = THERE
    chosen, told = _chosen("ipc", server, mailbox := Mailbox())
    for version in range(3):
        mailbox.garbled = version >= good
        chosen.push(version)
        assert mailbox.lends is (version < good)
    assert mailbox.version == 2
    assert [transfer.kind for transfer in told] == ["ipc", "mailbox"]
    assert told[1].reason.startswith("a push by ipc failed: update: worker 0: tensor norm")


def test_auto_asks_nothing_where_the_mailbox_fits(server: Server) -> None:
    chosen, told = _chosen("auto", server, mailbox := Mailbox())
    chosen.push(0)
    assert (mailbox.version, told, server.calls) == (0, [], [])


@pytest.mark.parametrize(
    ("wish", "there", "reason"),
    [
        ("nccl", SAME, "both on GPU a"),
        ("ipc", Sight(device="c", listed=("c",)), "the trainer's container does not see the generator's GPU c"),
        ("nccl", Sight(device=""), "one side computes on a CPU"),
    ],
)
def test_a_way_that_the_probe_finds_impossible_is_not_tried(server: Server, wish: str, there: Sight, reason: str) -> None:
    server.sight = there
    chosen, told = _chosen(wish, server, mailbox := Mailbox())
    chosen.push(0)
    assert (mailbox.version, server.calls) == (0, [])
    (transfer,) = told
    assert transfer.kind == "mailbox"
    assert transfer.reason.startswith(f"{wish} was asked for, but {wish} is not possible: ")
    assert reason in transfer.reason


def test_a_meeting_that_the_generator_refuses_leaves_the_mailbox(server: Server, broadcast: list[tuple[str, torch.Tensor]]) -> None:
    server.failing = {INIT}
    chosen, told = _chosen("nccl", server, mailbox := Mailbox())
    chosen.push(0)
    assert (mailbox.version, server.routes) == (0, [INIT])
    assert "nccl is not possible: init: the generator answered" in told[0].reason


def test_an_nccl_that_does_not_come_up_leaves_the_mailbox(
    server: Server, broadcast: list[tuple[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("NCCL error: unhandled cuda error")

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", refuse)
    chosen, told = _chosen("nccl", server, mailbox := Mailbox())
    chosen.push(0)
    assert mailbox.version == 0
    assert "unhandled cuda error" in told[0].reason


def test_an_nccl_that_vllm_could_not_load_and_would_send_zeros_leaves_the_mailbox(
    server: Server, broadcast: list[tuple[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: SimpleNamespace(destroy=lambda: None, disabled=True))
    chosen, told = _chosen("nccl", server, mailbox := Mailbox())
    chosen.push(0)
    assert (mailbox.version, broadcast) == (0, [])
    assert "vLLM cannot load NCCL here" in told[0].reason


def test_a_trainer_without_vllm_takes_the_mailbox(server: Server) -> None:
    def look(*_: Any) -> Sight:
        raise ModuleNotFoundError("No module named 'vllm'")

    chosen, told = _chosen("nccl", server, mailbox := Mailbox(), look=look)
    chosen.push(0)
    assert mailbox.version == 0
    assert "No module named 'vllm'" in told[0].reason
