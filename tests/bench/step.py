"""Seconds of a GRPO step: our trainer against TRL, on one machine, with one model and one batch.

    python -m tests.bench.step --device cpu --bf16 --model build/models/SmolLM2-135M-Instruct     # bar: 2 x TRL
    python -m tests.bench.step --device cuda                                               # one card, shared by both processes
    python -m tests.bench.step --device cuda --generator-gpu 1                             # one card trains, the other generates

Each configuration runs in a process of its own, because a vLLM in the process leaves memory behind. Without --model the parent makes
one with random weights of the 1.5B Qwen2 shape and a tokenizer of bytes; nothing is downloaded. A step is the time from the end
of one optimizer step to the end of the next: sampling, rewards, learning and the weight sync. The first steps (start, compilation) and
the last ones (nothing left to sample ahead) do not count. Rewards are random, so no group is skipped for being all equal.

TRL runs twice with vLLM in its process (at 0.3 of the memory, float32 master weights, bf16 autocast): with checkpointing and
micro-batch 16, and without checkpointing and micro-batch 8; larger ones run out of memory, because its logits are whole. The better one
counts. Ours needs no checkpointing at 16, because logits exist in chunks. On a CPU each side may do better with or without --bf16, and with
--attention eager; TRL generates under autocast too, which casts all weights again for each token.

With a second card for the generator TRL runs in vLLM server mode, with the same two ways of training, and both sides' vLLM gets 0.8 of the card that
it has for itself. Every trainer is one process on the first card. `overlap` is a step at staleness 1 by the longer of the two sides of the
on-policy run, where neither does anything beside the other: ahead, a generation is asked for while the one before still decodes, so that its
seconds hold a wait.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.report import Bar, conclude, machine, table

if TYPE_CHECKING:  # the rest of the product is imported where it is used: `make_model` runs where neither it nor TRL is installed yet
    from tests.bench.trl_server import TRLServer

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
        generator_gpu: the card that generates; the first one, 0, trains.
        transfer: how our weights shall reach the generator, a `vllm_weight_transfer`.
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
    generator_gpu: int = 0
    transfer: str = "auto"
    bf16: bool = False
    attention: str = "sdpa"

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group

    @property
    def longest(self) -> int:
        """Tokens that vLLM has to have room for in one sequence."""
        return self.prompt_tokens + self.completion_tokens + (0 if self.device == "cuda" else 64)

    @property
    def vllm_dtype(self) -> str:
        """What vLLM computes in."""
        return "bfloat16" if self.bf16 else "float32"

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
    "TRL, vLLM server": {"use_vllm": True, "gradient_checkpointing": True},
    "TRL, vLLM server, micro-batch 8": {"use_vllm": True, "per_device_train_batch_size": 8},
    "TRL, transformers": {"use_vllm": False, "gradient_checkpointing": True},
}
COLOCATED = [name for name in CONFIGURATIONS if name.startswith("TRL, vLLM colocate")]
SERVED = [name for name in CONFIGURATIONS if name.startswith("TRL, vLLM server")]
OURS = "ours, vLLM"
AHEAD = "ours, vLLM, staleness 1"

SHARED_MEMORY, OWN_MEMORY = 0.3, 0.8
"""Shares of a card's memory for vLLM where training needs the rest, and where it has the card for itself."""


def possible(*, device: str, generator_gpu: int) -> list[str]:
    """Configurations that fit the cards. On a CPU TRL can only generate with transformers: its ways to vLLM both need a GPU."""
    without = [] if generator_gpu else SERVED
    without = without + ([] if device == "cuda" and not generator_gpu else COLOCATED)
    return [name for name in CONFIGURATIONS if name not in without]


def default_names(*, device: str, generator_gpu: int) -> list[str]:
    """Those of them that are run where none is asked for: a second card only changes those that have a generator for it."""
    return [name for name in possible(device=device, generator_gpu=generator_gpu) if not generator_gpu or CONFIGURATIONS[name]["use_vllm"]]


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


def build_trainer(name: str, work: Workload, output: Path, *, server: TRLServer | None) -> Any:
    """The trainer of configuration `name`; `server` generates for those of `SERVED`."""
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

        if server is not None:
            arguments |= server.arguments()
        elif arguments["use_vllm"]:
            arguments |= {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": work.memory}
        data = Dataset.from_list(rows)
        return TheirTrainer(
            model=work.model, reward_funcs=random_reward, args=TheirConfig(**arguments), train_dataset=data, processing_class=tokenizer
        )
    from otj_runtime.train.config import GRPOConfig
    from otj_runtime.train.grpo import GRPOTrainer

    if arguments["use_vllm"] and cuda:
        arguments |= {"vllm_device": f"cuda:{work.generator_gpu}", "vllm_gpu_memory_utilization": work.memory}
    if arguments["use_vllm"]:
        arguments |= {"vllm_dtype": work.vllm_dtype, "vllm_max_model_len": work.longest, "vllm_weight_transfer": work.transfer}
    return GRPOTrainer(
        model=work.model, reward_funcs=random_reward, args=GRPOConfig(**arguments), train_dataset=rows, processing_class=tokenizer
    )


def run_child(name: str, work: Workload, result: Path, *, server: TRLServer | None) -> None:
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
        trainer = build_trainer(name, work, Path(output), server=server)
        trainer.add_callback(Clock())
        trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    result.write_text(json.dumps({"ends": ends, "logs": logs, "trainer_gib": memory}))


# -- in the parent ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One configuration's figures; seconds, and all that the trainer logged, are medians over the steps that count. `transfer` is
    the way that its weights took, in our trainer's words."""

    step: float
    generate: float | None
    sync: float | None
    tokens: float
    trainer_gib: float
    logged: dict[str, float]
    transfer: str | None = None

    def cell(self, metric: str) -> str:
        """A logged metric for the table."""
        return f"{self.logged[metric]:.3g}" if metric in self.logged else "-"

    def longer_side(self) -> float | None:
        """Seconds of the longer one of generation and training; None where the trainer logs only one of them, or neither."""
        train = self.logged.get("time/train")
        return None if self.generate is None or train is None else max(self.generate, train)


def measure(name: str, work: Workload, *, timeout_s: float) -> Measured | None:
    """Run one configuration; None, with the end of its logs, if it failed."""
    from otj_runtime.pod.errors import GeneratorNotReady
    from tests.bench.trl_server import rendezvous_environment, serving

    with tempfile.TemporaryDirectory() as folder:
        result, log, server_log = (Path(folder) / file for file in ("result.json", "log", "server.log"))
        command = [sys.executable, "-m", "tests.bench.step", "--child", name, "--work", json.dumps(asdict(work)), "--result", str(result)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if name.startswith("TRL") and work.device == "cuda":
            # TRL refuses to train where it sees more than one GPU; our trainer takes the first by itself.
            environment |= {"CUDA_VISIBLE_DEVICES": visible_gpu(0)}
        try:
            with ExitStack() as stack:
                if name in SERVED:
                    server = stack.enter_context(
                        serving(
                            model=work.model,
                            visible=visible_gpu(work.generator_gpu),
                            memory=work.memory,
                            max_model_len=work.longest,
                            dtype=work.vllm_dtype,
                            log=server_log,
                        )
                    )
                    command += ["--server", json.dumps(asdict(server))]
                    environment |= rendezvous_environment()
                out = stack.enter_context(log.open("w"))
                subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, timeout=timeout_s, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired, GeneratorNotReady) as error:
            print(f"{name}: {type(error).__name__}{f': {error}' if isinstance(error, GeneratorNotReady) else ''}", file=sys.stderr)
            for side, file in (("trainer", log), ("server", server_log)):
                if file.exists():
                    print(f"the end of the {side}'s log:\n{file.read_text(errors='replace')[-3000:]}", file=sys.stderr)
            return None
        found = summarize(json.loads(result.read_text()), work, ahead=int(CONFIGURATIONS[name].get("staleness", 0)))
        return replace(found, transfer=chosen_transfer(log.read_text(errors="replace")))


def visible_gpu(gpu: int) -> str:
    """CUDA_VISIBLE_DEVICES that leaves one GPU, by its number among those that this process sees."""
    from otj_runtime.train.devices import Placement, visible_devices

    return visible_devices(Placement((gpu,)), inherited=os.environ.get("CUDA_VISIBLE_DEVICES"))


def chosen_transfer(log: str) -> str | None:
    """What our trainer printed last of the weights' way. Transformers' progress bars begin with "Loading weights: ", on a line that may not end."""
    found = re.findall(r"weights: ((?:mailbox|delta|adapter|nccl|ipc)\b.*)", log)
    return str(found[-1]) if found else None


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
            found.cell("time/train"),
            "-" if found.sync is None else f"{found.sync:.3g}",
            found.cell("idle/trainer"),
            found.cell("idle/generator"),
            found.tokens,
            found.trainer_gib,
        ]
        for name, found in results.items()
    ]
    cards = f", GPU 0 trains and GPU {work.generator_gpu} generates" if work.generator_gpu else ""
    print(f"{machine()}{cards}")
    print(f"{work.completions} completions of up to {work.completion_tokens} tokens after {work.prompt_tokens}, {work.device}")
    header = [
        "configuration",
        "s/step",
        "samples/s",
        "generate s",
        "train s",
        "sync s",
        "trainer idle",
        "generator idle",
        "tokens",
        "trainer GiB",
    ]
    print(table(header, rows))
    for name, found in results.items():
        if name in (OURS, AHEAD):  # the trainer of a bare machine says nothing where it takes the mailbox without trying another way
            print(f"{name}: weights: {found.transfer or 'mailbox (the trainer printed nothing)'}")
    ours = [results[name].step for name in (OURS, AHEAD) if name in results]
    figures = {f"step_s[{name}]": found.step for name, found in results.items()}
    bars = []
    for names, figure, limit in (
        ([*COLOCATED, *SERVED], "times_trl_vllm", 1.5),
        (["TRL, transformers"], "times_trl_transformers", 3.5 if work.device == "cuda" else 2.0),
    ):
        theirs = [results[name].step for name in names if name in results]
        if theirs and ours:
            figures[figure] = min(theirs) / min(ours)
            bars.append(Bar(figure, limit, at_least=True))
    longer = results[OURS].longer_side() if OURS in results else None
    if AHEAD in results and longer is not None:
        figures["overlap"] = results[AHEAD].step / longer
        if work.generator_gpu:  # on a shared card the two sides take each other's time
            bars.append(Bar("overlap", 1.10, at_least=False))
    return conclude("step", figures, bars, json_file=json_file, workload=asdict(work), results={n: asdict(r) for n, r in results.items()})


def check_generator_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message if the machine has no such GPU, or a configuration does not fit it."""
    gpu = options.generator_gpu
    if gpu:
        import torch

        found = torch.cuda.device_count() if options.device == "cuda" else 0
        if not 0 <= gpu < found:
            parser.error(f"--generator-gpu {gpu}: --device {options.device} has {found} GPU{'s' * (found != 1)} here, numbered from 0")
    fitting = possible(device=options.device, generator_gpu=gpu)
    for name in options.only or []:
        if name not in fitting:
            parser.error(f"--only {name!r} does not run with --device {options.device} --generator-gpu {gpu}")


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
    parser.add_argument("--generator-gpu", type=int, default=0, help="the GPU that generates; the first one, 0, trains")
    parser.add_argument(
        "--transfer", choices=["auto", "mailbox", "nccl", "ipc"], default="auto", help="how our weights reach the generator"
    )
    parser.add_argument(
        "--memory",
        type=float,
        help=f"share of the card's memory for vLLM; default: {SHARED_MEMORY}, and {OWN_MEMORY} where the generator has a GPU for itself",
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one configuration")
    parser.add_argument("--json", type=Path)
    for name in ("--child", "--work", "--result", "--server"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        from tests.bench.trl_server import TRLServer

        server = TRLServer(**json.loads(options.server)) if options.server else None
        run_child(options.child, Workload(**json.loads(options.work)), Path(options.result), server=server)
        return 0
    check_generator_gpu(parser, options)
    names = options.only or default_names(device=options.device, generator_gpu=options.generator_gpu)
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
            memory=options.memory or (OWN_MEMORY if options.generator_gpu else SHARED_MEMORY),
            generator_gpu=options.generator_gpu,
            transfer=options.transfer,
            bf16=cuda or options.bf16,
            attention=options.attention,
        )
        results = {name: found for name in names if (found := measure(name, work, timeout_s=options.timeout)) is not None}
    return 0 if report(work, results, options.json) and len(results) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
