"""Loading prompts from every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.data.jsonl import JsonLines
from otj_runtime.data.load import Stream, held_out_prompts, load_prompts
from otj_runtime.pod.errors import DatasetInvalid

ROWS = [{"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "2"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_one(folder: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)


def save_splits(folder: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)


def save_parquet(folder: Path) -> None:
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")


def save_csv(folder: Path) -> None:
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_csv(folder / "train.csv")


def save_jsonl(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", ROWS)


@pytest.mark.parametrize("save", [save_one, save_splits, save_parquet, save_jsonl])
def test_a_folder_that_datasets_knows_is_loaded(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "data")
    assert load_prompts(DatasetSpec(path=str(tmp_path / "data")), seed=0)[:] == ROWS


@pytest.mark.parametrize("name", ["train.parquet", "train.csv", "train.jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_single_file_is_loaded_and_streamed(name: str, streaming: bool, tmp_path: Path) -> None:
    {"train.parquet": save_parquet, "train.csv": save_csv, "train.jsonl": save_jsonl}[name](tmp_path / "data")
    found = load_prompts(DatasetSpec(path=str(tmp_path / "data" / name), streaming=streaming), seed=0)
    rows = list(found.open(0)) if isinstance(found, Stream) else found[:]
    assert sorted((row["prompt"], str(row["answer"])) for row in rows) == sorted((row["prompt"], row["answer"]) for row in ROWS)


def test_a_saved_dataset_can_be_streamed_with_its_columns_renamed(tmp_path: Path) -> None:
    save_splits(tmp_path / "data")
    spec = DatasetSpec(path=str(tmp_path / "data"), streaming=True, columns={"truth": "answer"})
    found = load_prompts(spec, seed=0)
    assert isinstance(found, Stream)
    assert {frozenset(row) for row in found.open(0)} == {frozenset({"prompt", "truth"})}
    with pytest.raises(DatasetInvalid, match="no column nothing"):
        load_prompts(DatasetSpec(path=str(tmp_path / "data"), streaming=True, columns={"truth": "nothing"}), seed=0)


def test_the_eval_split_is_held_out(tmp_path: Path) -> None:
    save_parquet(tmp_path / "data")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "data" / "test.parquet")
    assert held_out_prompts(DatasetSpec(path=str(tmp_path / "data"), eval_split="test"))[:] == ROWS[:1]


def test_rows_that_are_trained_on_are_not_taken_for_an_eval_split(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in (file, tmp_path / "saved"):
        with pytest.raises(DatasetInvalid, match=f"evalSplit: {path} is one split.*test.jsonl"):
            held_out_prompts(DatasetSpec(path=str(path), eval_split="test"))


def test_of_a_large_jsonl_file_the_first_rows_can_be_checked_alone(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert len(load_prompts(DatasetSpec(path=str(path)), seed=0, limit=2)) == 2  # type: ignore[arg-type]


def test_a_jsonl_file_is_loaded(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    prompts = load_prompts(DatasetSpec(path=str(path)), seed=0)
    assert len(prompts) == 2
    assert list(prompts) == ROWS


def test_a_conversation_comes_back_as_messages(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    for source in (tmp_path / "saved", path):
        assert load_prompts(DatasetSpec(path=str(source)), seed=0)[0] == rows[0]


@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_columns_are_renamed(kind: str, tmp_path: Path) -> None:
    rows = [{"question": "q", "prompt": "hidden", "solution": "s", "level": 3}]
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    else:
        write_jsonl(tmp_path / "data", rows)
    spec = DatasetSpec(path=str(tmp_path / "data"), columns={"prompt": "question", "answer": "solution"})
    assert load_prompts(spec, seed=0)[0] == {"prompt": "q", "answer": "s", "level": 3}


def test_columns_may_be_swapped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "p"}])
    spec = DatasetSpec(path=str(path), columns={"prompt": "answer", "answer": "prompt"})
    assert load_prompts(spec, seed=0)[0] == {"prompt": "p", "answer": "a"}


def test_a_tasks_columns_can_be_renamed_too() -> None:
    spec = DatasetSpec(task="copy", columns={"solution": "answer"})
    assert set(load_prompts(spec, seed=0)[0]) == {"prompt", "solution"}
    assert set(held_out_prompts(spec)[0]) == {"prompt", "solution"}


def test_a_task_takes_its_seed_from_the_run() -> None:
    spec = DatasetSpec(task="copy", args={"length": 3})
    first, same, other = (load_prompts(spec, seed=seed)[:] for seed in (1, 1, 2))
    assert first == same != other


def test_held_out_prompts_come_with_tasks_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert len(held_out_prompts(DatasetSpec(task="addition"))) == 36
    assert held_out_prompts(DatasetSpec(path=str(path))) == []


def test_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert list(JsonLines(path)) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_column_that_a_line_lacks_is_none_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "b", "answer": 1}])
    assert list(JsonLines(path)) == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": 1}]


@given(texts=st.lists(st.text(), min_size=1))
def test_any_text_survives_a_jsonl_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "train.jsonl"
    path.write_bytes("".join(json.dumps({"prompt": text}, ensure_ascii=True) + "\n" for text in texts).encode())
    assert [row["prompt"] for row in JsonLines(path)] == texts


def test_separators_inside_strings_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c"}\n')
    assert list(JsonLines(path)) == [{"prompt": "a\u2028b\u0085c"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        (b'{"prompt": "a"}\n["b"]\n', "line 2 is a list, not an object"),
        (b"prompt,answer\na,b\n", "line 1 is no JSON"),
        (b"PAR1\xff\xfe\x00", "no UTF-8 text"),
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (b'{"question": "a", "answer": "b"}\n', "no column prompt; it has question, answer: name the one with the prompts"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_or_columns(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetInvalid) as caught:
        load_prompts(DatasetSpec(path=str(path)), seed=0)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_renamed_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DatasetInvalid, match=r"no column solution, which dataset\.columns\.answer names; it has prompt, answer"):
        load_prompts(DatasetSpec(path=str(path), columns={"answer": "solution"}), seed=0)


def test_a_path_that_does_not_exist_is_named() -> None:
    with pytest.raises(DatasetInvalid, match=r"/no/such/file\.jsonl does not exist"):
        load_prompts(DatasetSpec(path="/no/such/file.jsonl"), seed=0)


@pytest.mark.parametrize(("save", "words"), [(save_splits, "no split test; it has train"), (save_parquet, "test")])
def test_a_split_that_does_not_exist_is_named(save: Any, words: str, tmp_path: Path) -> None:
    save(tmp_path / "data")
    with pytest.raises(DatasetInvalid, match=words):
        load_prompts(DatasetSpec(path=str(tmp_path / "data"), split="test"), seed=0)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DatasetInvalid, match=str(tmp_path / "data")):
        load_prompts(DatasetSpec(path=str(tmp_path / "data")), seed=0)


def test_an_unreachable_hub_is_named_with_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetInvalid, match="some/dataset"):
        load_prompts(DatasetSpec(name="some/dataset"), seed=0)
