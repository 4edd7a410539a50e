"""Seconds of a GRPO step: our trainer against TRL, on one machine, with one model and one batch.

    python -m tests.bench.step --device cpu --bf16 --model build/models/SmolLM2-135M-Instruct     # bar: 2 x TRL
    python -m tests.bench.step --device cuda                                               # one card, shared by both processes

Each configuration runs in a process of its own, because a vLLM in the process leaves memory behind. Without --model the parent makes
one with random weights of the 1.5B Qwen2 shape and a tokenizer of bytes; nothing is downloaded. A step is the time from the end
of one optimizer step to the end of the next: sampling, rewards, learning and the weight sync. The first steps (start, compilation) and
the last ones (nothing left to sample ahead) do not count. Rewards are random, so no group is skipped for being all equal.

TRL runs twice with vLLM in its process (at 0.3 of the memory, float32 master weights, bf16 autocast): with checkpointing and
micro-batch 16, and without checkpointing and micro-batch 8; larger ones run out of memory, because its logits are whole. The better one
counts. Ours needs no checkpointing at 16, because logits exist in chunks. On a CPU each side may do better with or without --bf16, and with
--attention eager; TRL generates under autocast too, which casts all weights again for each token.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.report import Bar, conclude, machine, table

PAD = 256
"""Token of the random model that fills rows; the next one ends completions."""

SHAPE_15B = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every configuration is given.

    Attributes:
        prompts, group: prompts of a step and completions of each.
        prompt_tokens, completion_tokens: lengths; completions may end earlier.
        micro_batch: completions of one forward pass.
        warm_up: steps that do not count.
        memory: share of the card's memory for vLLM.
        bf16: train under bfloat16 autocast, and let vLLM compute in bfloat16.
        attention: transformers' implementation, for training and for its generation.
    """

    device: str
    model: str
    prompts: int
    group: int
    prompt_tokens: int
    completion_tokens: int
    micro_batch: int
    steps: int
    warm_up: int = 2
    memory: float = 0.3
    bf16: bool = False
    attention: str = "sdpa"

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group

    def arguments(self) -> dict[str, Any]:
        """Arguments that both trainers know by the same name."""
        cuda = self.device == "cuda"
        return {
            "use_cpu": not cuda,
            "bf16": self.bf16,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": self.micro_batch,
            "num_generations": self.group,
            "max_completion_length": self.completion_tokens,
            "max_steps": self.steps,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "temperature": 1.0,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "model_init_kwargs": {"dtype": "float32", "attn_implementation": self.attention},
        }


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ours, vLLM": {"use_vllm": True},
    "ours, vLLM, staleness 1": {"use_vllm": True, "staleness": 1},
    "ours, transformers": {"use_vllm": False},
    "TRL, vLLM colocate": {"use_vllm": True, "gradient_checkpointing": True},
    "TRL, vLLM colocate, micro-batch 8": {"use_vllm": True, "per_device_train_batch_size": 8},
    "TRL, transformers": {"use_vllm": False, "gradient_checkpointing": True},
}
COLOCATED = [name for name in CONFIGURATIONS if name.startswith("TRL, vLLM")]


def make_model(folder: Path) -> None:
    """A Qwen2 of 1.54B random weights in bfloat16 (3.1 GB) and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # One token a byte: the class that transformers and vLLM choose for a Qwen2 reads such a file as its own.
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = Tokenizer(models.BPE(vocabulary | {"<pad>": PAD, "<eos>": PAD + 1}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE_15B, eos_token_id=PAD + 1, pad_token_id=PAD, bos_token_id=None))
    model.to(torch.bfloat16).save_pretrained(folder)


def make_prompts(tokenizer: Any, work: Workload) -> list[dict[str, str]]:
    """Prompts of exactly `prompt_tokens` tokens where letters are tokens, about as many elsewhere."""
    draw = random.Random(0)
    letters = len(tokenizer) < 1000
    words = list("abcdefghijklmnopqrstuvwxyz") if letters else ["red", "blue", "cat", "dog", "sun", "sea", "tree", "road"]
    separator = "" if letters else " "
    rows = [separator.join(draw.choice(words) for _ in range(work.prompt_tokens)) for _ in range(work.prompts * work.steps)]
    return [{"prompt": row} for row in rows]


# -- in the child ----------------------------------------------------------------------------------------------------------------


def random_reward(completions: list[Any], **_: Any) -> list[float]:
    """Rewards that no group shares."""
    return [random.random() for _ in completions]


def build_trainer(name: str, work: Workload, output: Path) -> Any:
    """The trainer of configuration `name`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = make_prompts(tokenizer, work)
    arguments = work.arguments() | CONFIGURATIONS[name] | {"output_dir": str(output)}
    arguments["gradient_accumulation_steps"] = work.completions // arguments["per_device_train_batch_size"]
    cuda = work.device == "cuda"
    if name.startswith("TRL"):
        from datasets import Dataset
        from trl import GRPOConfig as TheirConfig
        from trl import GRPOTrainer as TheirTrainer

        if arguments["use_vllm"]:
            arguments |= {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": work.memory}
        data = Dataset.from_list(rows)
        return TheirTrainer(
            model=work.model, reward_funcs=random_reward, args=TheirConfig(**arguments), train_dataset=data, processing_class=tokenizer
        )
    from otj_runtime.train.config import GRPOConfig
    from otj_runtime.train.grpo import GRPOTrainer

    if arguments["use_vllm"] and cuda:
        arguments |= {"vllm_device": "cuda:0", "vllm_gpu_memory_utilization": work.memory}
    if arguments["use_vllm"]:
        arguments |= {"vllm_dtype": "bfloat16" if work.bf16 else "float32"}
        arguments |= {"vllm_max_model_len": work.prompt_tokens + work.completion_tokens + (0 if cuda else 64)}
    return GRPOTrainer(
        model=work.model, reward_funcs=random_reward, args=GRPOConfig(**arguments), train_dataset=rows, processing_class=tokenizer
    )


def run_child(name: str, work: Workload, result: Path) -> None:
    """Train, and write when each step ended and what the trainer logged."""
    import torch
    from transformers import TrainerCallback

    random.seed(0)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(name, work, Path(output))
        trainer.add_callback(Clock())
        trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    result.write_text(json.dumps({"ends": ends, "logs": logs, "trainer_gib": memory}))


# -- in the parent ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One configuration's figures; seconds, and all that the trainer logged, are medians over the steps that count."""

    step: float
    generate: float | None
    sync: float | None
    tokens: float
    trainer_gib: float
    logged: dict[str, float]


def measure(name: str, work: Workload, *, timeout_s: float) -> Measured | None:
    """Run one configuration; None, with the end of its log, if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, "-m", "tests.bench.step", "--child", name, "--work", json.dumps(asdict(work)), "--result", str(result)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        try:
            with log.open("w") as out:
                subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, timeout=timeout_s, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{name}: {type(error).__name__}; the end of its log:\n{log.read_text()[-3000:]}", file=sys.stderr)
            return None
        return summarize(json.loads(result.read_text()), work, ahead=int(CONFIGURATIONS[name].get("staleness", 0)))


def summarize(found: dict[str, Any], work: Workload, *, ahead: int) -> Measured:
    """Medians over the steps that count."""
    counted = slice(work.warm_up, work.steps - ahead)
    steps = [later - earlier for earlier, later in zip(found["ends"], found["ends"][1:], strict=False)]
    logs = found["logs"][counted]

    def median(metric: str) -> float | None:
        values = [float(line[metric]) for line in logs if metric in line]
        return statistics.median(values) if values else None

    return Measured(
        step=statistics.median(steps[work.warm_up - 1 : work.steps - ahead - 1]),
        generate=median("time/generate"),
        sync=median("sync/total_s"),
        tokens=median("completions/mean_length") or float("nan"),
        trainer_gib=float(found["trainer_gib"]),
        logged={metric: value for metric in logs[-1] if (value := median(metric)) is not None} if logs else {},
    )


def report(work: Workload, results: dict[str, Measured], json_file: Path | None) -> bool:
    """The table, the ratios and the bars."""
    rows = [
        [
            name,
            found.step,
            work.completions / found.step,
            "-" if found.generate is None else f"{found.generate:.3g}",
            "-" if found.sync is None else f"{found.sync:.3g}",
            found.tokens,
            found.trainer_gib,
        ]
        for name, found in results.items()
    ]
    print(f"{machine()}\n{work.completions} completions of up to {work.completion_tokens} tokens after {work.prompt_tokens}, {work.device}")
    print(table(["configuration", "s/step", "samples/s", "generate s", "sync s", "tokens", "trainer GiB"], rows))
    ours = [results[name].step for name in ("ours, vLLM", "ours, vLLM, staleness 1") if name in results]
    figures = {f"step_s[{name}]": found.step for name, found in results.items()}
    bars = []
    for names, figure, limit in (
        (COLOCATED, "times_trl_vllm", 1.5),
        (["TRL, transformers"], "times_trl_transformers", 3.5 if work.device == "cuda" else 2.0),
    ):
        theirs = [results[name].step for name in names if name in results]
        if theirs and ours:
            figures[figure] = min(theirs) / min(ours)
            bars.append(Bar(figure, limit, at_least=True))
    return conclude("step", figures, bars, json_file=json_file, workload=asdict(work), results={n: asdict(r) for n, r in results.items()})


def main() -> int:
    """0 if every bar was reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="folder of a model and its tokenizer; default: a random 1.5B Qwen2")
    parser.add_argument(
        "--only", action="append", choices=list(CONFIGURATIONS), help="may be repeated; default: all that the device can run"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--completion-tokens", type=int)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast on a CPU as well; a GPU always trains so")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="transformers' implementation of attention")
    parser.add_argument("--memory", type=float, default=0.3, help="share of the card's memory for vLLM")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one configuration")
    parser.add_argument("--json", type=Path)
    for name in ("--child", "--work", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child, Workload(**json.loads(options.work)), Path(options.result))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:  # in a process of its own, which gives the card's memory back
            maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(Path(folder),))
            maker.start()
            maker.join()
        cuda = options.device == "cuda"
        work = Workload(
            device=options.device,
            model=options.model or folder,
            prompts=options.prompts or (16 if cuda else 4),
            group=options.group,
            prompt_tokens=options.prompt_tokens or (128 if cuda else 32),
            completion_tokens=options.completion_tokens or (256 if cuda else 64),
            micro_batch=options.micro_batch,
            steps=options.steps,
            memory=options.memory,
            bf16=cuda or options.bf16,
            attention=options.attention,
        )
        # vLLM inside the trainer's process needs a GPU: on a CPU, TRL can only generate with transformers.
        names = options.only or [name for name in CONFIGURATIONS if cuda or name not in COLOCATED]
        results = {name: found for name in names if (found := measure(name, work, timeout_s=options.timeout)) is not None}
    return 0 if report(work, results, options.json) and len(results) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
