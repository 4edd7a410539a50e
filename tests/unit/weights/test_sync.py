"""A push, its proof and what fails on the way, with a generator in this process that installs as vLLM's worker does on a CPU."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from otj_runtime.api import DType
from otj_runtime.weights import sync as sync_module
from otj_runtime.weights.borrowed import BorrowedStaging
from otj_runtime.weights.composed import Composed
from otj_runtime.weights.errors import MailboxError, WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.layout import Ticket
from otj_runtime.weights.loan import Loan, lendable
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.probe import trainer_scores
from otj_runtime.weights.staging import HostStaging, Staging
from otj_runtime.weights.sync import WeightSync
from otj_runtime.weights.tensors import policy_tensors
from tests.unit.weights.test_tensors import tiny_model

SEQUENCES = [[1, 2, 3, 4], [5, 6, 7]]


class LoadingGenerator:
    """A generator's control whose worker stages from the mailbox and loads what it staged.

    Attributes:
        lame: installations that are acknowledged and do nothing.
        corrupting: installations after which a parameter does not hold what was staged, by too little for the probe.
        lent: the trainer's tensors, as a worker finds them.
        far: whether on another GPU.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.lame = 0
        self.corrupting = 0
        self.lent: list[torch.Tensor] = []
        self.far = False
        self.restart()

    def restart(self) -> None:
        self.version = "default"
        torch.manual_seed(1)
        self.model: Any = tiny_model(tied=True)
        self.from_trainer: BorrowedStaging | None = None
        self.staging: Staging | None = None
        self.open = False

    def healthy(self) -> bool:
        return True

    def wait_healthy(self, *, deadline_s: float) -> None:
        pass

    def wait_returned(self) -> None:
        pass

    def weight_version(self) -> str:
        return self.version

    def init_transfer(self, path: str, staging_bytes: int | None, loan: Loan | None) -> None:
        self.calls.append("init")
        if loan is not None and not self.lent:
            raise WeightSyncFailed("init: no handle can be opened", phase="init")
        self.staging = self.from_slots = HostStaging(MailboxReader(Path(path)), worker=0)
        self.from_trainer = (
            BorrowedStaging(MailboxReader(Path(path)), 0, device=torch.device("cpu"), lent=self.lent, far=self.far) if loan else None
        )

    def workers(self) -> int:
        return 1

    def start(self) -> None:
        if self.open:
            raise WeightSyncFailed("start: already active", phase="start")
        self.open = True

    def give_up(self) -> None:
        self.open = False

    def update(self, ticket: Ticket) -> None:
        if self.staging is None or not self.open:
            self.open = False
            raise WeightSyncFailed("update: nothing is open", phase="update")
        self.calls.append(f"update {ticket.version}")
        if self.from_trainer is not None:  # a GPU's reads both itself
            self.staging.stop()
            self.staging = self.from_trainer if ticket.lent else self.from_slots
        self.staging.begin(ticket)

    def install(self, version: int) -> float:
        assert self.staging is not None
        ticket = self.staging.take()
        try:
            self.staging.wait()
        except MailboxError as error:
            raise WeightSyncFailed(f"install: {error}", phase="install") from error
        self.open = False
        self.version = str(version)
        if self.lame:
            self.lame -= 1
            self._confirm(ticket, [])
            return 0.0
        names = (entry.name for entry in self.staging.reader.layout.tensors)
        self.model.load_state_dict(dict(zip(names, self.staging.content(ticket), strict=True)), strict=False)
        self._confirm(ticket, ["norm.weight"] if self.corrupting else [])
        self.corrupting = max(0, self.corrupting - 1)
        return 0.001

    def _confirm(self, ticket: Ticket, differing: list[str]) -> None:
        assert self.staging is not None
        self.staging.confirm(ticket, lambda: differing)

    def score(self, sequences: list[list[int]]) -> list[list[list[float]]]:
        return [trainer_scores(self.model, sequences, DType.FLOAT32).logprobs]


@pytest.fixture
def generator() -> LoadingGenerator:
    return LoadingGenerator()


@pytest.fixture
def policy() -> Any:
    torch.manual_seed(0)
    return tiny_model(tied=True)


def _sync(policy: Any, folder: Path, generator: LoadingGenerator, *, delta: bool = False) -> WeightSync:
    control: Any = generator
    return WeightSync(model=policy, directory=folder, control=control, dtype=DType.FLOAT32, prompts=SEQUENCES, delta=delta)


def _perturb(policy: Any, *, every: int = 1) -> None:
    """Change one element of so many."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.view(-1)[::every] *= 1.05


def _lose_and_bring_back(policy: Any, generator: LoadingGenerator, sync: WeightSync, *, version: int) -> None:
    """A generator that restarts after the trainer has moved on gets what was pushed, and not what the trainer has by then."""
    sync.push(version)
    sync.proven(version)
    pushed = copy.deepcopy(policy.state_dict())
    _perturb(policy)
    generator.restart()
    sync.reinstall()
    assert generator.version == str(version)
    assert all(torch.equal(tensor, pushed[name]) for name, tensor in generator.model.state_dict().items())


def test_pushes_arrive_bit_by_bit_and_are_proven_and_the_mailbox_is_introduced_once(
    policy: Any, tmp_path: Path, generator: LoadingGenerator
) -> None:
    sync = _sync(policy, tmp_path, generator)
    for version in range(3):
        report = sync.push(version)
        assert (report.version, report.attempts, generator.version) == (version, 1, str(version))
        proof = sync.proven(version)
        assert not proof.again
        assert proof.agreement.max_abs <= 1e-5
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), generator.model.parameters(), strict=True))
        _perturb(policy)
    assert generator.calls.count("init") == 1


@pytest.mark.parametrize("fault", ["lame", "corrupting"])
def test_weights_that_are_not_there_are_installed_again_and_what_was_sampled_is_suspect(
    policy: Any, tmp_path: Path, generator: LoadingGenerator, fault: str
) -> None:
    sync = _sync(policy, tmp_path, generator)
    setattr(generator, fault, 1)
    sync.push(4)
    proof = sync.proven(4)
    assert proof.again
    assert proof.agreement.max_abs <= 1e-5
    assert sync.proven(4) == proof  # asked for once


@pytest.mark.parametrize(
    ("fault", "words"),
    [("lame", "policy version 4"), ("corrupting", r"worker 0 .* sent as version 4, the first is norm\.weight")],
)
def test_weights_that_are_not_there_twice_have_diverged(
    policy: Any, tmp_path: Path, generator: LoadingGenerator, fault: str, words: str
) -> None:
    sync = _sync(policy, tmp_path, generator)
    setattr(generator, fault, 2)
    sync.push(4)
    with pytest.raises(WeightsDiverged, match=words):
        sync.proven(4)


def test_a_generator_that_was_restarted_gets_the_version_back_although_the_trainer_has_moved_on(
    policy: Any, tmp_path: Path, generator: LoadingGenerator
) -> None:
    sync = _sync(policy, tmp_path, generator)
    _lose_and_bring_back(policy, generator, sync, version=1)
    generator.restart()  # and unnoticed: the next push is made twice
    report = sync.push(2)
    assert (report.attempts, generator.version) == (2, "2")
    assert not sync.proven(2).again


def test_a_proof_is_only_of_what_was_pushed_last(policy: Any, tmp_path: Path, generator: LoadingGenerator) -> None:
    sync = _sync(policy, tmp_path, generator)
    with pytest.raises(WeightSyncFailed, match="version 0 is not the one"):
        sync.proven(0)
    with pytest.raises(WeightSyncFailed, match="nothing was pushed yet"):
        sync.reinstall()


def test_deltas_arrive_bit_by_bit_and_what_a_delta_cannot_bring_is_sent_whole(
    policy: Any, tmp_path: Path, generator: LoadingGenerator
) -> None:
    sync = _sync(policy, tmp_path, generator, delta=True)
    whole = sync.push(0).bytes
    for version, (every, patched) in enumerate([(100, True), (100, True), (1, False)], start=1):
        _perturb(policy, every=every)
        report = sync.push(version)
        assert (report.attempts, report.patched, report.bytes < whole / 10) == (1, patched, patched)
        assert not sync.proven(version).again
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), generator.model.parameters(), strict=True))


def test_a_generator_that_was_restarted_gets_a_version_back_that_was_sent_as_deltas(
    policy: Any, tmp_path: Path, generator: LoadingGenerator
) -> None:
    sync = _sync(policy, tmp_path, generator, delta=True)
    for version in range(3):
        sync.push(version)
        _perturb(policy, every=100)
    _lose_and_bring_back(policy, generator, sync, version=3)
    generator.restart()  # and unnoticed: the second attempt sends all
    report = sync.push(4)
    assert (report.attempts, report.patched, generator.version) == (2, False, "4")


def test_a_delta_that_does_not_fit_its_checksum_is_followed_by_all_weights(
    policy: Any, tmp_path: Path, generator: LoadingGenerator
) -> None:
    sync = _sync(policy, tmp_path, generator, delta=True)
    sync.push(0)
    _perturb(policy, every=100)
    sync.push(1)
    assert generator.staging is not None
    generator.staging.content(generator.staging.reader.latest(1))[0].view(-1)[1] += 1  # an element that the next delta does not bring
    _perturb(policy, every=100)
    report = sync.push(2)
    assert (report.attempts, report.patched) == (2, False)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), generator.model.parameters(), strict=True))


def test_a_delta_needs_all_weights_staged(policy: Any, tmp_path: Path, generator: LoadingGenerator) -> None:
    control: Any = generator
    with pytest.raises(ValueError, match="delta goes without staging_bytes"):
        WeightSync(model=policy, directory=tmp_path, control=control, dtype=DType.FLOAT32, staging_bytes=1 << 20, delta=True)


@pytest.fixture(params=[False, True], ids=["on-one-gpu", "between-gpus"])
def lending(
    policy: Any, tmp_path: Path, generator: LoadingGenerator, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> WeightSync:
    """A sync whose generator reads the policy's own memory: in this process a tensor is its own handle."""
    monkeypatch.setattr(sync_module, "handles", list)
    generator.lent, generator.far = lendable(policy_tensors(policy)), request.param
    sync = _sync(policy, tmp_path, generator)
    sync.lend()
    return sync


def test_weights_that_are_lent_arrive_bit_by_bit_before_their_slot_is_written(
    policy: Any, generator: LoadingGenerator, lending: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = threading.Event()
    write = MailboxWriter.write

    def late(*arguments: Any) -> int:
        assert installed.wait(60)
        return write(*arguments)

    monkeypatch.setattr(MailboxWriter, "write", late)
    for version in range(3):
        installed.clear()
        report = lending.push(version)
        assert (report.attempts, generator.version, report.bytes) == (1, str(version), 4 * sum(t.numel() for t in generator.lent))
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), generator.model.parameters(), strict=True))
        installed.set()
        assert not lending.proven(version).again
        _perturb(policy)
    assert generator.calls.count("init") == 1


def test_a_generator_that_was_restarted_gets_a_lent_version_from_its_slot(
    policy: Any, generator: LoadingGenerator, lending: WeightSync
) -> None:
    _lose_and_bring_back(policy, generator, lending, version=1)
    generator.restart()  # and unnoticed
    report = lending.push(2)
    assert (report.attempts, generator.version) == (2, "2")
    assert not lending.proven(2).again
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), generator.model.parameters(), strict=True))


def test_memory_that_is_not_the_trainers_shows_before_anything_is_installed(
    policy: Any, generator: LoadingGenerator, lending: WeightSync
) -> None:
    generator.lent[:] = [tensor.clone() for tensor in generator.lent]
    generator.restart()
    _perturb(policy)
    before = copy.deepcopy(generator.model.state_dict())
    with pytest.raises(WeightSyncFailed, match=r"worker 0: .* does not fit its checksum"):
        lending.push(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.model.state_dict().items())


def test_weights_that_moved_since_they_were_lent_are_not_sent(policy: Any, lending: WeightSync) -> None:
    lending.push(0)
    lending.proven(0)
    policy.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()}, assign=True)
    with pytest.raises(MailboxError, match="have moved in memory since they were lent"):
        lending.push(1)


def test_a_worker_that_cannot_read_lent_weights_leaves_the_mailbox_as_it_was(
    policy: Any, tmp_path: Path, generator: LoadingGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "handles", list)
    sync = _sync(policy, tmp_path, generator)
    with pytest.raises(WeightSyncFailed, match="no handle can be opened"):
        sync.lend()
    sync.push(0)
    assert not sync.proven(0).again
    assert generator.version == "0"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": torch.zeros(2, 3).T}, "a is not contiguous"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)},
            r"b is torch\.bfloat16 on cpu, others are torch\.float32 on cpu",
        ),
        ({"a": Composed(shape=(2,), collective=False, make=lambda: torch.zeros(2))}, "a is made for each push"),
    ],
)
def test_only_tensors_that_lie_whole_in_memory_can_be_lent(tensors: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightSyncFailed, match=reason):
        lendable(tensors)
