"""The plugin as vLLM finds it."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import ModuleSource, WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader import reload

from otj_runtime.weights.errors import MailboxError, UnsupportedVLLM
from otj_runtime.weights.layout import Layout
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.vllm_plugin import MailboxEngine, MailboxInitInfo, MailboxUpdateInfo, register, require_supported
from otj_runtime.weights.vllm_trainer import BACKEND, MailboxTrainerEngine, MailboxTrainerInitInfo
from tests.unit.weights.test_plan import SHAPES, Computing, Sharded, staged_tensors


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1", "0.32.0+cpu"])
def test_versions_in_range_are_taken(version: str) -> None:
    require_supported(version)


@pytest.mark.parametrize("version", ["0.17.1", "0.31.0", "0.33.0", "1.0.0", "dev"])
def test_versions_outside_the_range_are_refused_by_name(version: str) -> None:
    with pytest.raises(UnsupportedVLLM, match=f"vLLM {version} is not supported"):
        require_supported(version)


def test_vllm_finds_the_backend_and_may_register_it_twice() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name=BACKEND)
    assert found.load() is register
    register()
    register()
    assert WeightTransferEngineFactory._registry[BACKEND]() is MailboxEngine
    assert WeightTransferTrainerFactory._registry[BACKEND]() is MailboxTrainerEngine


def test_the_engines_leave_nothing_of_vllms_interface_open() -> None:
    assert not MailboxEngine.__abstractmethods__
    assert not MailboxTrainerEngine.__abstractmethods__


class Client:
    """A generator that reads the mailbox when an update is finished, as a worker does, by vLLM's protocol."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.open = False
        self.seen: dict[str, torch.Tensor] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.reader = MailboxReader(Path(MailboxInitInfo(**init_info).path))

    def start_weight_update(self) -> None:
        if self.open:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self.open = True
        self.calls.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = MailboxUpdateInfo(**update_info)
        if info.version < 0:
            self.open = False
            raise RuntimeError("the update was given up")
        self.calls.append(f"update {info.version}")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.open = False
        self.calls.append(f"finish {weight_version}")
        with self.reader.reading(int(weight_version or -1)) as found:
            self.seen = {name: tensor.clone() for name, tensor in found}


def test_a_trainer_that_speaks_vllms_interface_sends_through_the_mailbox(tmp_path: Path) -> None:
    register()
    client, model = Client(), torch.nn.Linear(3, 5)
    info = {"path": str(tmp_path / "policy.mailbox"), "dtype": "bfloat16"}
    sender, other = (
        WeightTransferTrainerFactory.trainer_init(MailboxTrainerInitInfo(**info, rank=rank), client=client, source=ModuleSource(model))
        for rank in (0, 1)
    )
    for version in ("1", "2"):
        for rank in (other, sender):
            rank.send_weights()
        assert client.calls[-3:] == ["start", f"update {version}", f"finish {version}"]
        assert all(torch.equal(client.seen[name], value.bfloat16()) for name, value in model.named_parameters())
        with torch.no_grad():
            model.weight += 1
    assert len(client.calls) == 6


def test_an_update_that_another_trainer_left_open_is_given_up(tmp_path: Path) -> None:
    client, model = Client(), torch.nn.Linear(3, 5)
    info = MailboxTrainerInitInfo(path=str(tmp_path / "policy.mailbox"), dtype="float32", rank=0)
    sender = MailboxTrainerEngine.trainer_init(info, client=client, source=ModuleSource(model))
    client.start_weight_update()
    sender.send_weights()
    assert client.calls == ["start", "start", "update 1", "finish 1"]


def test_a_trainer_without_a_source_or_with_integers_is_refused(tmp_path: Path) -> None:
    info = MailboxTrainerInitInfo(path=str(tmp_path / "policy.mailbox"), dtype="float32", rank=0)
    with pytest.raises(ValueError, match="give trainer_init a WeightSource"):
        MailboxTrainerEngine.trainer_init(info, client=Client())
    model = torch.nn.Module()
    model.register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(MailboxError, match=r"parameter packed is torch\.int8"):
        MailboxTrainerEngine.trainer_init(info, client=Client(), source=ModuleSource(model))


class Recorder(WeightTransferEngine):  # type: ignore[misc]
    """Another backend, which notes what it is asked."""

    init_info_cls = MailboxInitInfo
    update_info_cls = MailboxUpdateInfo
    calls: ClassVar[list[str]] = []

    def init_transfer_engine(self, init_info: MailboxInitInfo) -> None:
        self.calls.append(f"init {init_info.path}")

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append(f"update {update_info['version']}")

    def receive_weights(self, update_info: MailboxUpdateInfo) -> None:
        raise AssertionError("update_weights is the backend's own")

    def finish_weight_update(self) -> None:
        self.calls.append("finish")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class Unwired(NCCLWeightTransferEngine):  # type: ignore[misc]  # vLLM is not typed
    """vLLM's nccl on GPUs, without GPUs: what it would have received lies in `brought`."""

    brought: ClassVar[list[torch.Tensor]] = []

    def init_transfer_engine(self, init_info: Any) -> None:
        """There is nobody to meet."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.model.load_weights(list(zip(update_info["names"], self.brought, strict=True)))


def _engine(model: torch.nn.Module | None = None, device: str = "cpu") -> MailboxEngine:
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=0, world_size=1, rank=0), model_config=SimpleNamespace())
    return MailboxEngine(WeightTransferConfig(backend=BACKEND), config, torch.device(device), model or torch.nn.Linear(3, 5))


def _tell(engine: MailboxEngine, info: dict[str, Any]) -> None:
    """As vLLM's worker does."""
    engine.init_transfer_engine(engine.parse_init_info(info))


def test_a_worker_is_handed_over_to_another_backend_of_vllm_and_back(tmp_path: Path) -> None:
    if "recorder" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("recorder", Recorder)
    engine = _engine()
    _tell(engine, {"backend": "recorder", "init_info": {"path": "there"}})
    engine.start_weight_update()
    engine.update_weights({"version": 7})
    engine.finish_weight_update()
    assert Recorder.calls == ["init there", "start", "update 7", "finish"]
    path = tmp_path / "policy.mailbox"
    MailboxWriter.create(path, Layout.of([("weight", (5, 3)), ("bias", (5,))], torch.float32))
    _tell(engine, {"path": str(path)})
    engine.start_weight_update()
    assert Recorder.calls[-1] == "shutdown"
    engine.shutdown()


class Reloads:
    """Counts how often vLLM's reload has opened and closed a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: self.steps.append("open"))
        monkeypatch.setattr(reload, "finalize_layerwise_reload", lambda model, config: self.steps.append("close"))


def _handed_to_nccl(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> MailboxEngine:
    monkeypatch.setitem(WeightTransferEngineFactory._registry, "nccl", lambda: Unwired)
    engine = _engine(model, "cuda")
    init = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}
    _tell(engine, {"backend": "nccl", "init_info": init})
    return engine


def _update(engine: MailboxEngine, tensors: list[torch.Tensor]) -> None:
    Unwired.brought[:] = tensors
    engine.start_weight_update()
    engine.update_weights({"names": list(SHAPES)})
    engine.finish_weight_update()


def test_what_nccl_brings_is_copied_as_the_models_own_loader_did_and_nothing_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    reloads, model = Reloads(monkeypatch), Sharded(0)
    engine = _handed_to_nccl(model, monkeypatch)
    for version in range(3):
        _update(engine, staged_tensors(version))
        assert torch.equal(model.embed, staged_tensors(version)[0])
    assert reloads.steps == []


def test_a_model_that_computes_goes_through_vllms_reload_from_the_second_update_of_nccl_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reloads, model = Reloads(monkeypatch), Computing(0)
    engine = _handed_to_nccl(model, monkeypatch)
    _update(engine, staged_tensors(0))
    assert reloads.steps == []
    assert "this model's loader does more than copy (norm)" in caplog.text
    _update(engine, staged_tensors(1))
    assert reloads.steps == ["open", "close"]
    assert torch.equal(model.norm, -staged_tensors(1)[-1].float())


def test_a_backend_that_vllm_does_not_have_is_refused_and_leaves_the_mailbox_possible() -> None:
    engine = _engine()
    with pytest.raises(ValueError, match="Invalid weight transfer backend: carrier-pigeon"):
        _tell(engine, {"backend": "carrier-pigeon", "init_info": {}})
    with pytest.raises(MailboxError, match="no mailbox was opened"):
        engine.finish_weight_update()
