"""How long new weights take into a generator, by size of the model: python -m tests.bench.sync [--json FILE].

For each size: a model of random weights as the trainer, a real vLLM with dummy weights as the generator, the command line of the generator
container between them. Then the naive way (copy to the host, safetensors in shared memory, vLLM's reload), and pushes of ours: while the
generator is idle, and while it decodes 64 sequences. On a GPU both share the card, unless --generator-gpu says another.

With --transport ipc the generator reads the weights where the trainer has them; with nccl they go through vLLM's own engine, from one GPU to
another. Where the probe at start finds that impossible, the size fails with its reason.

With --delta only what changed is sent: float32 weights take steps of 1e-6, as Adam's are at that learning rate, and the generator computes
in bfloat16. When the log of patches is full a push sends all; the mean of the bytes counts it.

`total` is what the trainer waits for, from the call of push to its return; `paused` is what the generator's engine stands still for;
`proof` is how long after the push the proof was there, which nothing waits for but the training on what was sampled.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from otj_runtime.api import DType, OnlineTrainingJob
from otj_runtime.pod.commands import PROBE_ROOM, generator_command, generator_environment
from otj_runtime.pod.config import Layout, PodConfig, resolve
from otj_runtime.pod.ports import free_port
from otj_runtime.pod.transfer import Transfer
from otj_runtime.train.generator import Generator, make_weights
from otj_runtime.weights.chosen import Way
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.sync import WeightSync
from otj_runtime.weights.tensors import policy_tensors

SHAPES: dict[str, dict[str, Any]] = {
    # layers, width, inner width, heads, heads of keys, vocabulary, tied
    "4M": {"shape": (4, 128, 384, 4, 2, 8192, True)},
    "16M": {"shape": (8, 256, 768, 8, 4, 16384, True)},
    "60M": {"shape": (12, 512, 1536, 8, 4, 32768, True)},
    "0.1B": {"shape": (12, 640, 2560, 10, 2, 65536, True)},
    "0.5B": {"shape": (24, 896, 4864, 14, 2, 151936, True)},
    "1.54B": {"shape": (28, 1536, 8960, 12, 2, 151936, True)},
    "3B": {"shape": (36, 2048, 11008, 16, 2, 151936, True)},
    "7.6B": {"shape": (28, 3584, 18944, 28, 4, 152064, False)},
    # of each layer 32 experts, four of which a token takes
    "1.7B-MoE": {"shape": (16, 1024, 1024, 8, 2, 65536, True), "experts": 32},
}
SIZES = {"cuda": ["0.1B", "0.5B", "1.54B", "3B", "7.6B"], "cpu": ["4M", "16M", "60M"]}
SEQUENCES = 64
NAIVE_BYTES = 4e9
"""Larger models are not sent the naive way: it takes half a minute each time."""
PROMPT = list(range(100, 164))


@dataclass
class Bench:
    """What all sizes share."""

    device: str
    repeats: int
    eager: bool
    staging: list[int | None]
    delta: bool = False
    transport: Literal["mailbox", "nccl", "ipc"] = "mailbox"
    generator_gpu: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lends_here(self) -> bool:
        """Whether the weights are read on the trainer's own GPU, so that nothing is staged."""
        return self.transport == "ipc" and self.generator_gpu == 0


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=SIZES[device])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: the generator starts sooner")
    parser.add_argument("--staging", nargs="+", type=float, default=[0], help="limits of the staging buffer in GiB; 0 for none")
    parser.add_argument("--delta", action="store_true", help="send what changed at a learning rate of 1e-6, instead of all")
    parser.add_argument("--transport", choices=["mailbox", "nccl", "ipc"], default="mailbox", help="the way of the weights")
    parser.add_argument("--generator-gpu", type=int, help="GPU that generates, as CUDA_VISIBLE_DEVICES has it; nccl: 1, else 0")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpu = arguments.generator_gpu if arguments.generator_gpu is not None else int(arguments.transport == "nccl")
    if arguments.transport != "mailbox" and torch.cuda.device_count() <= gpu:
        parser.error(f"--transport {arguments.transport}: needs GPU {gpu}, this machine shows {torch.cuda.device_count()}")
    if arguments.transport != "mailbox" and (arguments.delta or arguments.staging != [0]):
        parser.error(f"--transport {arguments.transport}: --delta and --staging are of the mailbox")
    limits = [None if limit == 0 else int(limit * 2**30) for limit in arguments.staging]
    bench = Bench(
        device, arguments.repeats, arguments.eager, [None] if arguments.delta else limits, arguments.delta, arguments.transport, gpu
    )
    for size in arguments.sizes:
        try:
            measure(bench, size)
        except Exception as error:  # a size that fails must not cost the figures of the others
            print(f"{size}: {error!r}"[:3000], flush=True)
        (report_delta if bench.delta else report)(bench, arguments.json)


def measure(bench: Bench, size: str) -> None:
    """Add the rows of one size."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="otj-bench-") as folder:
        config = model_config(size)
        dtype = DType.BFLOAT16 if bench.device == "cuda" or bench.delta else DType.FLOAT32
        model_path = Path(folder) / "model"
        config.save_pretrained(model_path)
        began = time.monotonic()
        with serving(bench, model_path, dtype, Path(folder)) as pod:
            torch.manual_seed(0)
            with torch.device(bench.device):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if bench.delta else getattr(torch, dtype)).eval()
            control = GeneratorControl(pod.generator_url)
            weights = sum(tensor.numel() for tensor in policy_tensors(model).values()) * getattr(torch, dtype).itemsize
            for limit in (limit for limit in bench.staging if limit is None or limit < weights):
                sync = make_way(bench, pod, model, control, dtype, limit)
                first = sync.push(0)
                require_transport(bench, Path(pod.mailbox).parent)
                start = time.monotonic() - began
                sync.proven(0)
                row = {"size": size, "bytes": first.bytes, "staging": limit, "start_s": start, "first_s": first.total_s}
                row["naive_s"] = None
                row["idle"] = pushes(bench, sync, model, version=100)
                with decoding(pod.generator_url):
                    row["busy"] = pushes(bench, sync, model, version=200)
                bench.rows.append(row)
                if limit is None and weights < NAIVE_BYTES and not bench.delta:
                    row["naive_s"] = min(naive(pod, model, Path(folder)) for _ in range(2))
                print(json.dumps(row), flush=True)
        del model
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def make_way(bench: Bench, pod: PodConfig, model: Any, control: GeneratorControl, dtype: DType, limit: int | None) -> Way:
    """What brings weights into the generator."""
    directory = Path(pod.mailbox)
    if bench.transport == "mailbox":
        return WeightSync(
            model=model, directory=directory, control=control, dtype=dtype, prompts=[PROMPT], staging_bytes=limit, delta=bench.delta
        )
    wanted = Generator(
        url=pod.generator_url, mailbox=directory, dtype=dtype, ready_timeout_s=240.0, wish=bench.transport, note=directory.parent
    )
    return make_weights(wanted, model=model, control=control, prompts=[PROMPT])


def require_transport(bench: Bench, folder: Path) -> None:
    """Figures of another way than the one asked for must not pass for it."""
    if bench.transport != "mailbox":
        outcome = Transfer.read(folder)
        if outcome is None or outcome.kind != bench.transport:
            raise RuntimeError(f"--transport {bench.transport}: the weights went another way: {outcome and outcome.describe(None)}")


def pushes(bench: Bench, sync: Way, model: Any, *, version: int) -> dict[str, Any]:
    """Push perturbed weights again and again; what each took."""
    reports, proofs, differences = [], [], []
    parameters = list(policy_tensors(model).values())
    for repeat in range(bench.repeats + 2):
        with torch.no_grad():
            for parameter in parameters if bench.delta else parameters[repeat % 7 :: 7]:
                if bench.delta:
                    parameter.add_(torch.randn_like(parameter).sign_(), alpha=1e-6)
                else:
                    parameter.mul_(1 + 0.002 * (repeat % 3 - 1))
        if bench.device == "cuda":
            torch.cuda.synchronize()
        report_ = sync.push(version + repeat)
        began = time.perf_counter()
        proof = sync.proven(version + repeat)
        assert not proof.again, "a sync was proven only the second time"
        if repeat >= 2:
            reports.append(report_)
            proofs.append(time.perf_counter() - began)
            differences.append(proof.agreement.mean)
        time.sleep(0.2)
    totals = [entry.total_s for entry in reports]
    return {
        "total_s": statistics.median(totals),
        "total_max_s": max(totals),
        "bytes": statistics.median(entry.bytes for entry in reports),
        "bytes_mean": statistics.mean(entry.bytes for entry in reports),
        "patched": sum(entry.patched for entry in reports),
        "phases": {name: statistics.median(entry.phases.get(name, 0.0) for entry in reports) for name in reports[0].phases},
        "paused_s": statistics.median(entry.phases["paused"] for entry in reports),
        "paused_max_s": max(entry.phases["paused"] for entry in reports),
        "proof_beside_s": statistics.median(proofs),
        "mean_logprob_difference": statistics.median(differences),
    }


def naive(pod: PodConfig, model: Any, folder: Path) -> float:
    """Copy everything to the host, write a file, let vLLM load it."""
    from safetensors.torch import save_file

    path = folder / "naive"
    path.mkdir(exist_ok=True)
    shutil.copy(folder / "model" / "config.json", path)
    began = time.perf_counter()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in policy_tensors(model).items()}, path / "model.safetensors")
    # It was started with dummy weights, which vLLM would "reload".
    overrides = {"load_config": {"load_format": "auto"}}
    post(pod.generator_url, "/collective_rpc", {"method": "update_config", "kwargs": {"overrides": overrides}})
    post(pod.generator_url, "/pause?mode=keep")
    post(pod.generator_url, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
    post(pod.generator_url, "/reset_prefix_cache?reset_running_requests=true")
    post(pod.generator_url, "/resume")
    seconds = time.perf_counter() - began
    shutil.rmtree(path)
    return seconds


def model_config(size: str) -> PretrainedConfig:
    """Qwen2 of one of the shapes; Qwen3 where it has experts."""
    layers, width, inner, heads, key_heads, vocabulary, tied = SHAPES[size]["shape"]
    common = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    if experts := SHAPES[size].get("experts"):
        mixture = {"num_experts": experts, "num_experts_per_tok": 4, "moe_intermediate_size": inner, "norm_topk_prob": True}
        return Qwen3MoeConfig(**common, **mixture, architectures=["Qwen3MoeForCausalLM"])
    return Qwen2Config(**common, architectures=["Qwen2ForCausalLM"])


@contextmanager
def serving(bench: Bench, model: Path, dtype: DType, folder: Path) -> Iterator[PodConfig]:
    """A generator with dummy weights that answers."""
    extra = ["--skip-tokenizer-init", "--max-num-seqs", str(SEQUENCES + PROBE_ROOM), *(["--enforce-eager"] if bench.eager else [])]
    if bench.device == "cuda":  # a fixed size needs no trial run, which other processes on the card would disturb
        extra += ["--kv-cache-memory-bytes", str(4 << 30)]
    job = OnlineTrainingJob.model_validate(
        {
            "apiVersion": "onlinetraining.dev/v1alpha1",
            "kind": "OnlineTrainingJob",
            "metadata": {"name": "bench"},
            "spec": {
                "algorithm": "GRPO",
                "model": {"path": str(model)},
                "dataset": {"task": "copy"},
                "gpus": 2,
                "accelerator": {"device": bench.device},
                "generation": {
                    "dtype": dtype.value,
                    "maxModelLen": 2048,
                    "gpuMemoryUtilization": 0.35,
                    "extraArgs": extra,
                    "weightTransfer": bench.transport,
                },
            },
        }
    )
    layout = Layout(shared_memory=str(folder), scratch=str(folder), generator_port=free_port())
    pod = resolve(job, layout, output=str(folder / "output"))
    log = folder / "generator.log"
    with log.open("wb") as file:
        command = [sys.executable, *generator_command(job, pod)[1:]]
        environment = os.environ | {"VLLM_CACHE_ROOT": str(Path(tempfile.gettempdir()) / "otj-bench-cache")}
        environment = generator_environment(pod) | environment | {"VLLM_PLUGINS": "otj_mailbox", "VLLM_SERVER_DEV_MODE": "1"}
        if bench.device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[bench.generator_gpu] if any(visible) else str(bench.generator_gpu)
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while not GeneratorControl(pod.generator_url).healthy():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the generator does not answer:\n{log.read_text()[-6000:]}")
            time.sleep(0.25)
        yield pod
    finally:
        with suppress(ProcessLookupError):  # where it has ended by itself, that is told above
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def decoding(url: str) -> Iterator[None]:
    """The generator decodes `SEQUENCES` sequences all the time; another process asks, so that this one's time is its own."""
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.sync", "--load", url])
    time.sleep(4 if torch.cuda.is_available() else 2)
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError("nothing was decoded beside the pushes: the load has ended")
    finally:
        process.kill()
        process.wait()


def load(url: str) -> None:
    """Ask for `SEQUENCES` completions again and again."""
    parameters = {
        "n": SEQUENCES,
        "max_tokens": 1024,
        "temperature": 1.0,
        "logprobs": 0,
        "detokenize": False,
        "output_kind": 2,
        "ignore_eos": True,
    }
    while True:
        post(url, "/inference/v1/generate", {"model": "policy", "token_ids": PROMPT, "sampling_params": parameters})


def post(url: str, route: str, body: dict[str, Any] | None = None) -> None:
    """One request that must succeed; the error of one that does not holds what vLLM says."""
    request = urllib.request.Request(url + route, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            response.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{route}: {error}: {error.read().decode(errors='replace')[:1000]}") from error


def machine_name(bench: Bench) -> str:
    """What the figures are of."""
    return (
        torch.cuda.get_device_name() if bench.device == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )


def report_delta(bench: Bench, path: Path | None) -> None:
    """As `report`, of pushes that send what changed."""
    machine = machine_name(bench)
    print(f"\ndelta sync on {machine}, torch {torch.__version__}, p50 of {bench.repeats}; ms")
    print("| size | GB | patched | bytes: p50, mean | first | idle: total (max) | paused | decoding: total (max) | paused | proof after |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    passed = {}
    for row in bench.rows:
        busy, idle = row["busy"], row["idle"]
        share, mean = busy["bytes"] / row["bytes"], busy["bytes_mean"] / row["bytes"]
        print(
            f"| {row['size']} | {row['bytes'] / 1e9:.3f} | {busy['patched']}/{bench.repeats} | {share:.1%}, {mean:.1%} "
            f"| {1e3 * row['first_s']:.0f} | {1e3 * idle['total_s']:.1f} ({1e3 * idle['total_max_s']:.1f}) | {1e3 * idle['paused_s']:.1f} "
            f"| {1e3 * busy['total_s']:.1f} ({1e3 * busy['total_max_s']:.1f}) | {1e3 * busy['paused_s']:.1f} "
            f"| {1e3 * busy['proof_beside_s']:.1f} |"
        )
        print(f"  phases, decoding: { ({name: round(1e3 * seconds, 1) for name, seconds in busy['phases'].items()}) }")
        passed[f"{row['size']} delta <= 10 % of the bytes"] = share <= 0.1
        if row["size"] == "1.54B" and bench.device == "cuda":
            passed["1.54B delta total <= 0.03 s"] = busy["total_s"] <= 0.03
    if path is not None:
        path.write_text(json.dumps({"machine": machine, "rows": bench.rows, "passed": passed}, indent=1))


def report(bench: Bench, path: Path | None) -> None:
    """The table, the bars and the file."""
    machine = machine_name(bench)
    where = f", the generator on GPU {bench.generator_gpu}" if bench.device == "cuda" else ""
    print(f"\nweight sync by {bench.transport} on {machine}{where}, torch {torch.__version__}, p50 of {bench.repeats}; ms")
    print("| size | GB | staging | naive | first | idle: total | paused | decoding: total (max) | paused (max) | proof after | x naive |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in bench.rows:
        busy, idle = row["busy"], row["idle"]
        faster = f"{row['naive_s'] / busy['total_s']:.0f}" if row["naive_s"] else "-"
        staging = "none" if bench.lends_here else "all" if row["staging"] is None else f"{row['staging'] / 2**30:.1f} GiB"
        print(
            f"| {row['size']} | {row['bytes'] / 1e9:.3f} | {staging} | {1e3 * (row['naive_s'] or math.nan):.0f} | {1e3 * row['first_s']:.0f} "
            f"| {1e3 * idle['total_s']:.1f} | {1e3 * idle['paused_s']:.1f} | {1e3 * busy['total_s']:.1f} ({1e3 * busy['total_max_s']:.1f}) "
            f"| {1e3 * busy['paused_s']:.1f} ({1e3 * busy['paused_max_s']:.1f}) | {1e3 * busy['proof_beside_s']:.1f} | {faster} |"
        )
    fixed, per_gb = fit([(row["bytes"] / 1e9, row["idle"]["total_s"]) for row in bench.rows if row["staging"] is None])
    if not math.isnan(fixed):
        print(f"idle: {1e3 * fixed:.1f} ms + {1e3 * per_gb:.1f} ms for each GB")
    if path is not None:
        figures = {
            "machine": machine,
            "transport": bench.transport,
            "generator_gpu": bench.generator_gpu,
            "rows": bench.rows,
            "fixed_s": fixed,
            "s_per_gb": per_gb,
            "passed": bars(bench, fixed),
        }
        path.write_text(json.dumps(figures, indent=1))


def bars(bench: Bench, fixed: float) -> dict[str, bool]:
    """By bar, whether it was met; only those that were measured, on the hardware that they are meant for."""
    passed = {}
    if bench.transport == "nccl":
        return {f"{row['size']} nccl total <= 0.05 s": row["idle"]["total_s"] <= 0.05 for row in bench.rows if row["size"] == "1.54B"}
    for row in bench.rows if bench.device == "cuda" else []:
        busy = row["busy"]
        if row["size"] == "1.54B" and row["staging"] is None:
            passed["1.54B total <= 0.08 s"] = busy["total_s"] <= 0.08
            passed["1.54B paused <= 0.005 s"] = busy["paused_s"] <= 0.005
            passed["1.54B >= 60 x naive"] = row["naive_s"] / busy["total_s"] >= 60
        if row["size"] == "7.6B":
            frugal = row["staging"] is not None or bench.lends_here
            for name, total, paused in [("7.6B, 2 GiB", 0.45, 0.06)] * frugal + [("7.6B", 0.35, 0.015)] * (row["staging"] is None):
                passed[f"{name} total <= {total} s"] = busy["total_s"] <= total
                passed[f"{name} paused <= {paused} s"] = busy["paused_s"] <= paused
    if len({row["size"] for row in bench.rows}) > 2 and bench.device == "cuda":
        passed["fixed part <= 0.010 s"] = fixed <= 0.010
    return passed


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of seconds over GB: the fixed part and the slope; NaN with fewer than two sizes."""
    if len({size for size, _ in points}) < 2:
        return math.nan, math.nan
    slope, intercept = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    return intercept, slope


if __name__ == "__main__":
    main()
