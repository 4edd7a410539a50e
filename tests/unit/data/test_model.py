"""The model container: what ends up in the model's folder, and what it says when nothing can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from otj_runtime.api import Reason, parse_job
from otj_runtime.data.folder import MARKER, make_once
from otj_runtime.data.model import TINY, build_tiny, check_folder, main, prepare
from otj_runtime.pod.config import CONFIG_ENV, Layout, PodConfig, resolve
from otj_runtime.pod.errors import ExitCode, FailureNote, ModelNotFound


def pod_config(tmp_path: Path, model: dict[str, str]) -> PodConfig:
    spec = {"algorithm": "GRPO", "model": model, "dataset": {"task": "copy"}, "gpus": 2, "accelerator": {"device": "cpu"}}
    job = parse_job({"apiVersion": "onlinetraining.dev/v1alpha1", "kind": "OnlineTrainingJob", "metadata": {"name": "job"}, "spec": spec})
    layout = Layout(scratch=str(tmp_path / "scratch"), termination_log=str(tmp_path / "termination-log"))
    return resolve(job, layout, output=str(tmp_path / "output"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_tiny_model_loads_with_every_weight_in_its_place(tiny: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 132_800
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_tiny_model_begins_without_a_preference(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        probabilities = model(torch.tensor([[0, 2, 3, 4, 5, 1]])).logits[0, -1].softmax(-1)
    assert probabilities.min() > 0.05
    assert probabilities.max() < 0.2


def test_the_tiny_tokenizer_puts_one_beginning_before_the_characters_and_none_between_decoded_ones(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer("abcd=")["input_ids"] == [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["a", "b", "c", "d", "="])]
    assert tokenizer.decode([*tokenizer.convert_tokens_to_ids(["h", "a"]), tokenizer.eos_token_id], skip_special_tokens=True) == "ha"
    assert tokenizer.pad_token_id is not None


def test_the_tiny_model_is_made_without_torch_or_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from otj_runtime.data.model import build_tiny; build_tiny(Path(sys.argv[1]));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "tiny")], check=False).returncode == 0


def test_the_tiny_model_is_the_same_each_time(tiny: Path, tmp_path: Path) -> None:
    build_tiny(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny)


def test_a_whole_folder_is_left_alone(tmp_path: Path) -> None:
    build_tiny(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build_tiny(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_half_done_folder_is_made_whole_and_other_files_in_it_are_kept(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    build_tiny(tmp_path)
    assert contents(tmp_path) == contents(tiny) | {"notes.txt": b"mine"}


def test_a_build_that_fails_leaves_neither_marker_nor_draft(tmp_path: Path) -> None:
    def build(draft: Path) -> None:
        (draft / "config.json").write_text("{}")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        make_once(tmp_path / "model", "somewhere", build)
    assert list((tmp_path / "model").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_many_makers_at_once_leave_one_whole_folder(tiny: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(build_tiny, [tmp_path / "tiny"] * 8))
    assert contents(tmp_path / "tiny") == contents(tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_everybody_may_read_the_files(tiny: Path) -> None:
    assert {path.stat().st_mode & 0o444 for path in tiny.iterdir()} == {0o444}


def test_a_folder_made_from_something_else_is_made_again(tmp_path: Path) -> None:
    for origin in ("first", "second"):
        make_once(tmp_path / "model", origin, lambda draft, origin=origin: (draft / "config.json").write_text(origin) and None)
    assert (tmp_path / "model" / "config.json").read_text() == "second"


def test_a_mounted_model_is_taken_as_it_is(tiny: Path, tmp_path: Path) -> None:
    prepare(pod_config(tmp_path, {"path": str(tiny)}))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, ["models/x does not exist", "models does, and holds other"]),
        ([], ["no config.json", "nothing"]),
        (["weights.gguf"], ["no config.json", "weights.gguf"]),
        (["config.json", "tokenizer.json"], ["no weights", "config.json, tokenizer.json"]),
        ([f"part-{i:02}" for i in range(12)], ["part-00", "and 4 more"]),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_what_lies_there(tmp_path: Path, files: list[str] | None, words: list[str]) -> None:
    directory = tmp_path / "models" / "x"
    (tmp_path / "models" / "other").mkdir(parents=True)
    if files is not None:
        directory.mkdir()
        for name in files:
            (directory / name).touch()
    with pytest.raises(ModelNotFound) as caught:
        check_folder(directory)
    assert all(word in str(caught.value) for word in [str(directory), *words])


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(ModelNotFound, match="is a file"):
        check_folder(tmp_path / "model")


def test_an_unknown_built_in_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=TINY):
        prepare(pod_config(tmp_path, {"name": "builtin/huge"}))


def test_a_hub_that_cannot_be_reached_is_named_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"some/model \(revision v2\).*HF_TOKEN"):
        prepare(pod_config(tmp_path, {"name": "some/model", "revision": "v2"}))


def test_the_container_makes_the_named_model(tmp_path: Path) -> None:
    config = pod_config(tmp_path, {"name": TINY})
    environment = os.environ | {CONFIG_ENV: config.model_dump_json(by_alias=True, exclude_none=True)}
    command = [sys.executable, "-m", "otj_runtime.data.model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (Path(config.model_path) / MARKER).is_file()


def test_a_failure_is_left_in_the_run_directory_the_termination_log_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pod_config(tmp_path, {"path": "/no/such/model"})
    monkeypatch.setenv(CONFIG_ENV, config.model_dump_json(by_alias=True, exclude_none=True))
    assert main() == ExitCode.MODEL_NOT_FOUND
    note = FailureNote.first(Path(config.run_directory))
    assert note is not None
    assert note.reason is Reason.MODEL_NOT_FOUND
    assert json.loads((tmp_path / "termination-log").read_text()) == note.to_wire()
    assert "/no/such/model" in capsys.readouterr().err


def test_a_container_without_its_configuration_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    assert main() == ExitCode.INVALID_SPEC
    assert CONFIG_ENV in capsys.readouterr().err
