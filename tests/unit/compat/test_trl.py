"""What of TRL is adapted, and what of it is refused."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import trl

from otj_runtime.api import parse_job
from otj_runtime.compat.feed import MAX_RECOVERIES, Feed, floating
from otj_runtime.compat.trl import UnsupportedTRL, _proven_before, _then_unproven, adapt, require_supported
from otj_runtime.pod.config import resolve
from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.install import Installer
from otj_runtime.weights.layout import Ticket
from tests.unit.api.specs import VALID


@pytest.mark.parametrize("version", ["1.11.0", "1.16.0", "1.16.1.dev0", trl.__version__])
def test_a_supported_version_passes(version: str) -> None:
    require_supported(version)


@pytest.mark.parametrize("version", ["0.15.2", "1.10.0", "1.17.0", "2.0.0"])
def test_another_version_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(UnsupportedTRL, match=rf"TRL {version} is not supported: .* trl >=1\.11,<1\.17"):
        require_supported(version)


def test_a_trl_of_another_shape_is_refused_by_the_names_it_lacks() -> None:
    module = ModuleType("trl.generation.vllm_generation")
    module.VLLMGeneration = type("VLLMGeneration", (), {"sync_weights": print})  # type: ignore[attr-defined]
    module.VLLMClient = type("VLLMClient", (), {})  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedTRL, match=r"has no VLLMGeneration\.generate, VLLMClient\.init_communicator"):
        adapt(module, step=lambda: 0, feed=feed_with(["0"]))


class Versions:
    """A generator's control that serves these weight versions one after the other, the last one for ever."""

    def __init__(self, versions: list[str | None]) -> None:
        self._versions = versions
        self.waited = 0

    def weight_version(self) -> str | None:
        return self._versions.pop(0) if len(self._versions) > 1 else self._versions[0]

    def wait_returned(self) -> None:
        self.waited += 1


def feed_with(versions: list[str | None], monkeypatch: pytest.MonkeyPatch | None = None, installed: list[int] | None = None) -> Feed:
    """A feed that has pushed version 3."""
    feed = Feed(resolve(parse_job(VALID)))
    feed._control = Versions(versions)  # type: ignore[assignment]
    feed._version, feed._ticket = 3, Ticket(version=3, slot=0, sequence=1)
    feed._writer = SimpleNamespace(receipts=None)  # type: ignore[assignment]
    if monkeypatch is not None and installed is not None:
        monkeypatch.setattr(Installer, "again", lambda self, ticket, receipts: installed.append(ticket.version))
    return feed


def refused() -> Any:
    raise ConnectionError("refused")


@pytest.mark.parametrize(
    ("versions", "asked", "installed"),
    [
        (["3"], 1, []),
        (["default", "default", "3"], 1, [3]),  # it had restarted before the request
        (["3", "default", "default", "default", "3"], 2, [3]),  # during it
        ([None, "3"], 1, []),  # it was away for a moment, and is the same one
    ],
)
def test_an_answer_counts_only_if_the_pushed_weights_gave_all_of_it(
    monkeypatch: pytest.MonkeyPatch, versions: list[str | None], asked: int, installed: list[int]
) -> None:
    did: list[int] = []
    answers = iter(range(1, 9))
    assert feed_with(versions, monkeypatch, did).faithfully(lambda: next(answers)) == asked
    assert did == installed


def test_an_error_of_a_generator_that_still_serves_the_weights_is_the_scripts_own() -> None:
    with pytest.raises(ConnectionError, match="refused"):
        feed_with(["3"]).faithfully(refused)


def test_a_generator_that_is_lost_again_and_again_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[int] = []
    with pytest.raises(GeneratorLost, match=f"lost {MAX_RECOVERIES + 1} times in a row with policy version 3: refused"):
        feed_with(["default"], monkeypatch, installed).faithfully(refused)
    assert len(installed) == MAX_RECOVERIES + 1


def test_a_quantized_tensor_is_refused_by_name() -> None:
    assert list(floating([("a", "bfloat16", [2, 3])])) == [("a", (2, 3))]
    with pytest.raises(WeightSyncFailed, match=r"parameter b\.weight is uint8"):
        list(floating([("b.weight", "uint8", [4])]))


def test_the_probe_is_asked_for_only_where_weights_were_pushed() -> None:
    proven: list[Any] = []
    feed = SimpleNamespace(score=lambda model, prompts: (prompts, "scores"), prove=lambda *scores, trained_in: proven.append(scores))
    generation: Any = SimpleNamespace(mode="server", accelerator=SimpleNamespace(is_main_process=True), model=torch.nn.Linear(2, 2))
    sync = _then_unproven(lambda generation: None)
    generate = _proven_before(lambda generation, prompts: "answer", feed)  # type: ignore[arg-type]
    for pushed in (True, False):
        if pushed:
            sync(generation)
        assert generate(generation, [[1, 2]]) == "answer"
    assert proven == [([[1, 2]], "scores")]
