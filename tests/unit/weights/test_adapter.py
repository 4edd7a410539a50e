"""An adapter on its way to the generator, without a generator: what is written, what is asked for, and what happens after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from otj_runtime.api import DType
from otj_runtime.train.export import save_merged
from otj_runtime.train.lora import peft_config
from otj_runtime.weights.adapter import AdapterSync
from otj_runtime.weights.errors import WeightsDiverged
from otj_runtime.weights.probe import trainer_scores
from tests.unit.weights.test_tensors import tiny_model

SEQUENCES = [[1, 2, 3, 4], [5, 6, 7]]


class LoadingGenerator:
    """A generator's control that loads the base model and the adapter folders it is given, as vLLM does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.version = "default"
        self.model: Any = base_model()

    def wait_healthy(self, *, deadline_s: float) -> None:
        pass

    def wait_returned(self) -> None:
        pass

    def weight_version(self) -> str:
        return self.version

    def drain(self) -> None:
        self.calls.append("drain")

    def load_adapter(self, path: str) -> None:
        self.calls.append("load")
        self.model = PeftModel.from_pretrained(base_model(), path)

    def label(self, version: int) -> None:
        self.version = str(version)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def resume(self) -> None:
        self.calls.append("resume")

    def score(self, sequences: list[list[int]]) -> list[list[list[float]]]:
        return [trainer_scores(self.model, sequences, DType.FLOAT32).logprobs]


def base_model() -> Any:
    torch.manual_seed(0)
    return tiny_model(tied=True)


@pytest.fixture
def policy() -> Any:
    return get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False))


def sync_of(policy: Any, folder: Path, generator: LoadingGenerator) -> AdapterSync:
    control: Any = generator
    return AdapterSync(model=policy, directory=folder, control=control, dtype=DType.FLOAT32, prompts=SEQUENCES)


def test_what_is_written_is_an_adapter_that_makes_the_generator_the_policy(policy: Any, tmp_path: Path) -> None:
    generator = LoadingGenerator()
    sync = sync_of(policy, tmp_path, generator)
    report = sync.push(7)
    assert generator.calls == ["drain", "load", "reset", "resume"]
    assert (generator.version, report.version) == ("7", 7)
    assert sync.proven(7).agreement.max_abs < 1e-5
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert report.bytes == 4 * trained


def test_folders_of_old_versions_are_removed_but_the_last_stays_for_a_restart(policy: Any, tmp_path: Path) -> None:
    generator = LoadingGenerator()
    sync = sync_of(policy, tmp_path, generator)
    for version in range(4):
        sync.push(version)
    assert len(list(tmp_path.glob("adapter-*"))) <= 2
    generator.restart()
    sync.reinstall()
    assert generator.version == "3"
    sync.reinstall()
    assert generator.calls.count("load") == 5


def test_an_adapter_that_did_not_arrive_is_noticed(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = LoadingGenerator()
    monkeypatch.setattr(generator, "load_adapter", lambda path: None)
    with pytest.raises(WeightsDiverged, match="policy version 1"):
        sync_of(policy, tmp_path, generator).push(1)


def test_a_merged_export_is_the_policy_as_a_plain_model(tmp_path: Path, policy: Any) -> None:
    class Accelerator:
        is_main_process = True

        def unwrap_model(self, model: Any) -> Any:
            return model

        def wait_for_everyone(self) -> None:
            pass

    class Saved:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").touch()

    class Trainer:
        model, accelerator, processing_class = policy, Accelerator(), Saved()

        def write_card(self, folder: Path) -> None:
            (folder / "README.md").touch()

    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    save_merged(Trainer(), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    exported = type(base_model()).from_pretrained(tmp_path)
    ours, theirs = (trainer_scores(model, SEQUENCES, DType.FLOAT32).logprobs for model in (policy, exported))
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]))
    assert {"tokenizer.json", "README.md"} <= {path.name for path in tmp_path.iterdir()}


def test_no_lora_means_no_adapter() -> None:
    assert peft_config(None) is None
