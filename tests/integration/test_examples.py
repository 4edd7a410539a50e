"""The examples as their readers run them: a bare machine, real vLLM as a child of rank 0, no pod."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from otj_runtime.pod.metrics import read_metrics
from tests.cluster.host import REPOSITORY
from tests.integration.conftest import VLLM_CACHE
from tests.integration.deadlines import HANG_SECONDS

pytestmark = pytest.mark.integration

PYTHON = [sys.executable]
TWO_RANKS = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights that knows the words of the examples."""
    folder = tmp_path_factory.mktemp("sums")
    words = ["<s>", "</s>", *map(str, range(20)), "+", "="]
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    return folder


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("otj-generator-*")}


@pytest.mark.parametrize(
    ("example", "launcher", "ranks", "paper"), [("grpo", TWO_RANKS, 2, "2402.03300"), ("online_dpo", PYTHON, 1, "2402.04792")]
)
def test_an_example_trains_and_leaves_nothing_behind(
    example: str, launcher: list[str], ranks: int, paper: str, sums: Path, tmp_path: Path
) -> None:
    before = shared_memory()
    environment = os.environ | {"VLLM_CACHE_ROOT": str(VLLM_CACHE), "ACCELERATE_USE_CPU": "true", "OTJ_TEST": str(tmp_path)}
    command = [*launcher, str(REPOSITORY / "examples" / f"{example}.py"), str(sums)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    output = next(tmp_path.glob("out-*"))
    steps = [line for line in read_metrics(output / "metrics.jsonl")[0] if line.metrics]
    assert [line.step for line in steps] == [1, 2, 3, 4, 5]
    assert steps[-1].metrics["world_size"] == ranks
    assert steps[-1].metrics["sync/max_abs_logprob_diff"] < 1e-4
    assert paper in (output / "model" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(output / "model").generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(output / "model").decode([7]) == "5"
    assert not _alive(tmp_path)
    assert shared_memory() <= before


def _alive(marker: Path) -> list[str]:
    """Processes that inherited the environment of the example."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"OTJ_TEST={marker}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
        except OSError:  # it ended meanwhile
            continue
    return found
