"""Command lines and environments of the three containers: pure functions of the job and of where things lie.

The generator is vLLM's own server: no wrapper, so that `kubectl describe` shows the truth and every flag can be looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from otj_runtime.api import Device, DType, OnlineTrainingJob
from otj_runtime.api.spec import GenerationSpec, LoRASpec
from otj_runtime.api.training import completions_per_rank
from otj_runtime.pod.config import CONFIG_ENV, PodConfig
from otj_runtime.pod.names import SERVED_MODEL, STATUS_ROUTE

PYTHON = "python"

MAX_SEQUENCES = 1024
"""Most completions that one engine decodes at once; more of them wait."""

PROBE_ROOM = 16
"""Places beside them for the sequences of the probe. Without, each proof of new weights would wait until a completion ends, and the
optimizer for the proof."""

BASE_MODEL = "base"
"""Name under which vLLM serves the model that an adapter is for."""

ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""

ADAPTED_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj", "out_proj", "fc1", "fc2"),
    *("c_attn", "c_proj", "c_fc", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
)
"""Layers that vLLM makes room for where the job names none: the linear ones of its decoders but the output layer. With that adapted, its
CPU worker dies of the first request for a prompt's log-probabilities, as the proof makes. A model with others must name them; an adapter
that vLLM has no room for is not installed, which the proof sees."""

WEIGHT_TRANSFER = '{"backend": "otj_mailbox"}'


def script_arguments(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """`command` with $(NAME) replaced by the variable's value, as Kubernetes does in a container's command: an unknown name stays,
    and $$(NAME) stands for the text $(NAME)."""

    def value(found: re.Match[str]) -> str:
        return found[0][1:] if found[0].startswith("$$") else environment.get(found[1], found[0])

    return [re.sub(r"\$?\$\(([A-Za-z_][\w.-]*)\)", value, part) for part in command]


def model_command() -> list[str]:
    """The model container: makes sure that the model's folder is there, or says why not."""
    return [PYTHON, "-m", "otj_runtime.data.model"]


def trainer_command() -> list[str]:
    """The trainer container's first process."""
    return [PYTHON, "-m", "otj_runtime.launch"]


def generator_command(job: OnlineTrainingJob, config: PodConfig) -> list[str]:
    """The generator container's process."""
    return server_command(
        job.spec.generation,
        model=config.model_path,
        url=config.generator_url,
        dtype=config.generator_dtype,
        device=config.device,
        sequences=sequences_at_once(job),
        adapter=config.adapter,
    )


def sequences_at_once(job: OnlineTrainingJob) -> int | None:
    """Completions that one engine of the generator has under way at most; None if a script of the user's own decides that."""
    spec = job.spec
    if spec.trainer is not None:
        return None
    batch = spec.training_ranks * completions_per_rank(algorithm=spec.algorithm, arguments=spec.training)
    return min(MAX_SEQUENCES, math.ceil(batch * (1 + spec.rollout.staleness) / spec.generation.engines))


def server_command(
    generation: GenerationSpec,
    *,
    model: str,
    url: str,
    dtype: DType,
    device: Device,
    sequences: int | None = None,
    adapter: LoRASpec | None = None,
) -> list[str]:
    """vLLM's server. It starts with dummy weights, because the first sync brings all of them; or, where only an adapter is sent, with
    the model's own, under another name: the policy is the adapter.

    Several engines are vLLM's own data parallelism: one server in front of them, which hands every weight call to all of them.

    Args:
        model: folder of the model: its configuration and tokenizer.
        url: where to listen, http://host:port.
        dtype: what to compute in.
        sequences: most completions that one engine has under way: it sizes vLLM's tables, and the CUDA graphs that it records at
            start, by it. Default: vLLM's own guess.
        adapter: the adapter that is sent. Default: none is.
    """
    host, port = url.removeprefix("http://").rsplit(":", 1)
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, *_served(adapter)),
        *("--host", host, "--port", port),
        *("--dtype", dtype.value, "--tensor-parallel-size", str(generation.tensor_parallel_size or generation.gpus)),
        *("--weight-transfer-config", WEIGHT_TRANSFER),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enable-scale-out"),
        "--enable-prefix-caching" if generation.enable_prefix_caching else "--no-enable-prefix-caching",
    ]
    if generation.engines > 1:
        command += ["--data-parallel-size", str(generation.engines)]
    if sequences is not None and device is Device.CUDA:
        command += ["--max-num-seqs", str(sequences + PROBE_ROOM)]
    if generation.max_model_len is not None:
        command += ["--max-model-len", str(generation.max_model_len)]
    if device is Device.CUDA:
        command += ["--gpu-memory-utilization", str(generation.gpu_memory_utilization)]
    else:
        # Compiling for a CPU takes longer than short runs win by it. Only whole blocks are shared between the completions of a
        # prompt, and the CPU's default of 128 tokens is longer than many prompts: each completion would read the prompt anew.
        command += ["--enforce-eager", "--block-size", "32"]
    return command + generation.extra_args


def _served(adapter: LoRASpec | None) -> list[str]:
    if adapter is None:
        return ["--served-model-name", SERVED_MODEL, "--load-format", "dummy"]
    rank = next(rank for rank in ADAPTER_RANKS if rank >= adapter.rank)
    room = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    return ["--served-model-name", BASE_MODEL, *room, "--lora-target-modules", *(adapter.target_modules or ADAPTED_LAYERS)]


def shared_environment(config: PodConfig, *, scratch: str) -> dict[str, str]:
    """What every container gets. Homes and caches lie on volumes, because the root file system is read-only."""
    cache = f"{config.output}/.cache"
    # Kubernetes expands $(NAME) in a value and makes $ of $$; JSON has another way to write a dollar.
    configuration = config.model_dump_json(by_alias=True, exclude_none=True).replace("$", "\\u0024")
    return {
        CONFIG_ENV: configuration,
        "HOME": scratch,
        "USER": "otj",  # torch asks for a name, and the image's passwd need not know the user id
        "HF_HOME": f"{cache}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "CUDA_CACHE_PATH": f"{cache}/cuda",
        "FLASHINFER_WORKSPACE_BASE": config.output,  # it adds .cache/flashinfer by itself
        "PYTHONUNBUFFERED": "1",
    }


def generator_environment(config: PodConfig) -> dict[str, str]:
    """What only the generator container gets."""
    adapters = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if config.adapter is not None else {}
    return server_environment(config.device, gpus=config.generator_gpus) | {"VLLM_CACHE_ROOT": f"{config.output}/.cache/vllm"} | adapters


def server_environment(device: Device, *, gpus: int) -> dict[str, str]:
    """What vLLM's server needs. Development mode opens the weight routes; they listen on loopback only."""
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "otj_mailbox"}
    if device is Device.CPU:
        # The default keeps a core idle; a generator and a trainer that take turns on few cores need all of them.
        environment |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        # Trainer and generator take turns on the same cores: threads that spin while they wait would take them from the other side.
        environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
        # Eager leaves vLLM's small compiled helpers (the rank of a prompt's tokens); on a CPU they need a C++ compiler at run time.
        environment |= {"TORCHDYNAMO_DISABLE": "1"}
    elif gpus == 1:
        # vLLM's server would start its engine as a new interpreter, which imports everything again: 15 of 48 seconds. vLLM itself goes back to
        # that where a fork is not possible. Several workers or engines were not tried.
        environment |= {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    return environment


def trainer_environment(config: PodConfig) -> dict[str, str]:
    """What only the trainer gets: the Kubeflow progress contract, which transformers' own reporter speaks too, and what a script of
    the user's own may want to know."""
    return {
        "OTJ_MODEL_PATH": config.model_path,
        "OTJ_OUTPUT": config.output,
        "KUBEFLOW_TRAINER_SERVER_URL": f"http://127.0.0.1:{config.progress_port}{STATUS_ROUTE}",
        "KUBEFLOW_TRAINER_SERVER_TOKEN": f"{config.run_directory}/token",
    }
