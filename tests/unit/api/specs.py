"""Specs that must be refused, and with which words. The API server and `otj run` are held to the same table."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]

VALID: Object = {
    "apiVersion": "onlinetraining.dev/v1alpha1",
    "kind": "OnlineTrainingJob",
    "metadata": {"name": "run", "namespace": "default"},
    "spec": {"algorithm": "GRPO", "model": {"name": "builtin/tiny-copy"}, "dataset": {"task": "copy"}, "gpus": 4},
}


@dataclass(frozen=True)
class Invalid:
    """`changes` to VALID's spec, by dotted path (None removes), and the words that must come back.

    `field` is what the Python check must name where its words are pydantic's own; else it says `message` too.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    field: str = ""

    def document(self) -> Object:
        """The whole object."""
        return changed(self.changes)


def changed(changes: dict[str, Any], *, name: str = "run") -> Object:
    """VALID with `changes` to its spec, by dotted path; None removes."""
    document = copy.deepcopy(VALID)
    document["metadata"]["name"] = name
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = document["spec"]
        for part in parents:
            node = node.setdefault(part, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return document


EXACTLY_ONE_MODEL = "give exactly one of model.name (fetched from the hub) and model.path (a folder on a mounted volume)"
EXACTLY_ONE_DATASET = "give exactly one of dataset.task (built in), dataset.name (on the hub) and dataset.path (on a mounted volume)"
DATASET_OR_SCRIPT = "give either dataset, for the built-in trainer, or trainer.command, whose script loads its own"
SCRIPT = ["python", "/scripts/train.py"]
EXACTLY_ONE_REWARD = "give exactly one of function, model and judge in each of rewards"
TOO_FEW_GPUS = "is too few, it needs at least 2: one generates, the others train"
NOT_DIVIDED = "does not divide the"
TASKS = "addition, copy, reverse and reasoning_gym/NAME"

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PGPASSWORD", "clientSecret")
NO_SECRETS = {
    "TOKENIZERS_PARALLELISM": "false",
    "MAX_TOKENS": "512",
    "EOS_TOKEN": "end",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_TOKEN_PATH": "/secrets/token",
    "GOOGLE_APPLICATION_CREDENTIALS": "/secrets/key.json",
    "AWS_SECRET_NAME": "training",
    "LABEL_KEY": "answer",
    "API_KEY": "$(FROM_ELSEWHERE)",
    "MONKEY": "see",
    "WANDB_API_KEY": "",
}
"""Variables that may have these values, however they are called."""
SECRET_ARGUMENTS = (
    "token",
    "api_key",
    "apiKey",
    "hf_token",
    "authToken",
    "DB_PASSWORD",
    "client_secret",
    "aws_secret_access_key",
    "Authorization",
)
NO_SECRET_ARGUMENTS = {
    "key": "answer",
    "reward_key": "score",
    "eos_token": "end",
    "tokens": "many",
    "max_tokens": 9,
    "token": True,
    "use_auth_token": False,
    "password": "",
    "secret": "/secrets/token",
    "storage_options": {"anon": True, "token": "", "endpoint": "https://host"},
}
"""Arguments of functions that may have these values, however they are called."""
HARMLESS_WORDS = ("--eos_token=</s>", "--input_key", "prompt", "--max-tokens", "9", "$(OTJ_MODEL_PATH)", "--use_auth", "token=3")

ARGUMENT = "looks like a secret, which shows to everybody who may read this object, its Job or its pod; put it into a Secret"

INVALID = [
    Invalid("one GPU", {"gpus": 1}, f"gpus: 1 {TOO_FEW_GPUS}"),
    Invalid("no GPU", {"gpus": 0}, f"gpus: 0 {TOO_FEW_GPUS}"),
    Invalid(
        "GPUs in words", {"gpus": "four"}, 'spec.gpus: Invalid value: "string": spec.gpus in body must be of type integer', "spec.gpus"
    ),
    Invalid("too many GPUs", {"gpus": 2000}, "spec.gpus in body should be less than or equal to 1024", "spec.gpus"),
    Invalid("GPUs not given", {"gpus": None}, "spec.gpus: Required value", "spec.gpus"),
    Invalid(
        "an unknown algorithm",
        {"algorithm": "PPO"},
        'spec.algorithm: Unsupported value: "PPO": supported values: "GRPO", "OnlineDPO"',
        "spec.algorithm",
    ),
    Invalid("no algorithm", {"algorithm": None}, "spec.algorithm: Required value", "spec.algorithm"),
    Invalid("no model", {"model": None}, "spec.model: Required value", "spec.model"),
    Invalid("an empty model", {"model": {}}, EXACTLY_ONE_MODEL),
    Invalid("a model by name and path", {"model.path": "/models/x"}, EXACTLY_ONE_MODEL),
    Invalid(
        "a relative model path",
        {"model": {"path": "models/x"}},
        "path: models/x must be absolute: the path inside the container at which a volume mounts the model",
    ),
    Invalid("a revision of a path", {"model": {"path": "/m", "revision": "main"}}, "model.revision goes with model.name"),
    Invalid("an unknown dtype", {"model.dtype": "int8"}, 'spec.model.dtype: Unsupported value: "int8"', "spec.model.dtype"),
    Invalid("no dataset", {"dataset": None}, DATASET_OR_SCRIPT),
    Invalid("a dataset for a script", {"trainer.command": SCRIPT}, DATASET_OR_SCRIPT),
    Invalid(
        "rewards for a script",
        {"dataset": None, "trainer.command": SCRIPT, "rewards": [{"function": "my.reward"}]},
        "rewards: are for the built-in trainer; a script in trainer.command has its own",
    ),
    Invalid(
        "arguments for a script",
        {"dataset": None, "trainer.command": SCRIPT, "training.learning_rate": 0.1},
        "configures the built-in trainer; give the script of trainer.command its arguments there",
    ),
    Invalid(
        "a sharded model on CPUs",
        {"accelerate.strategy": "fsdp2", "accelerator.device": "cpu"},
        "accelerate.strategy: on accelerator.device cpu, accelerate silently takes ddp instead; say ddp",
    ),
    Invalid("an adapter for a script", {"dataset": None, "trainer.command": SCRIPT, "lora": {}}, "lora: is for the built-in trainer"),
    Invalid(
        "an adapter alone for requests that span a sync",
        {"lora.sync": "adapter", "rollout.staleness": 1},
        "lora.sync: an adapter is loaded between requests, so with rollout.staleness the weights must go merged",
    ),
    *(
        Invalid(
            f"{kind} {what}",
            changes | {"generation.weightTransfer": kind},
            f"generation.weightTransfer: {kind} {words}",
        )
        for kind in ("nccl", "ipc")
        for what, changes, words in (
            ("for a script", {"dataset": None, "trainer.command": SCRIPT}, "is for the built-in trainer, and for all weights; say auto"),
            ("for an adapter", {"lora.sync": "adapter"}, "is for the built-in trainer, and for all weights; say auto"),
            ("on CPUs", {"accelerator.device": "cpu"}, "goes from GPU to GPU, and accelerator.device is cpu; say auto"),
        )
    ),
    Invalid(
        "deltas of a script's weights",
        {"dataset": None, "trainer.command": SCRIPT, "generation.weightTransfer": "delta"},
        "generation.weightTransfer: delta is for the built-in trainer, and for all weights; say auto",
    ),
    Invalid(
        "deltas of an adapter",
        {"lora.sync": "adapter", "generation.weightTransfer": "delta"},
        "generation.weightTransfer: delta is for the built-in trainer, and for all weights; say auto",
    ),
    *(
        Invalid(
            f"deltas of float32 weights {where}",
            changes | {"generation.weightTransfer": "delta"},
            "generation.weightTransfer: delta needs generation.dtype bfloat16 or float16",
        )
        for where, changes in {"on CPUs": {"accelerator.device": "cpu"}, "by name": {"generation.dtype": "float32"}}.items()
    ),
    Invalid(
        "a transfer that is not offered",
        {"generation.weightTransfer": "sparse_nccl"},
        'spec.generation.weightTransfer: Unsupported value: "sparse_nccl"',
        "spec.generation.weightTransfer",
    ),
    Invalid("an adapter of rank 0", {"lora.rank": 0}, "spec.lora.rank in body should be greater than or equal to 1", "spec.lora.rank"),
    *(
        Invalid(
            f"the command {' '.join(command)}", {"dataset": None, "trainer.command": command}, "trainer.command must be python and a script"
        )
        for command in (["accelerate", "launch", "train.py"], ["bash", "-c", "python train.py"], ["python", "-m"], ["python", "-c", "pass"])
    ),
    Invalid(
        "a command without a script",
        {"dataset": None, "trainer.command": ["python"]},
        "spec.trainer.command in body should have at least 2 items",
        "spec.trainer.command",
    ),
    Invalid("an empty dataset", {"dataset": {}}, EXACTLY_ONE_DATASET),
    Invalid("two datasets", {"dataset.name": "org/data"}, EXACTLY_ONE_DATASET),
    Invalid(
        "no reward for a dataset", {"dataset": {"name": "org/data"}}, "rewards: give at least one, unless dataset.task is a built-in task"
    ),
    Invalid(
        "a reward that is no import path",
        {"rewards": [{"function": "my reward"}]},
        "function: my reward is no import path of a callable; write package.module.function",
    ),
    Invalid("a reward without function", {"rewards": [{"weight": 1.0}]}, EXACTLY_ONE_REWARD),
    Invalid("a reward of two kinds", {"rewards": [{"function": "a.b", "model": "org/model"}]}, EXACTLY_ONE_REWARD),
    *(
        Invalid(
            f"the address {url} of a judge",
            {"rewards": [{"judge": {"url": url, "model": "m"}}]},
            "url: must be http:// or https:// and an address without user and query, to which /chat/completions can be added; a key comes",
        )
        for url in ("http://me:secret@host/v1", "https://host/v1?api_key=abc", "host/v1")
    ),
    Invalid(
        "a key where its variable should be named",
        {"rewards": [{"judge": {"url": "http://host/v1", "model": "m", "apiKeyEnv": "sk-abc"}}]},
        "apiKeyEnv: must be the name of a variable, in letters, digits and _; the key itself belongs into a Secret",
    ),
    Invalid(
        "a judge that never sees an answer",
        {"rewards": [{"judge": {"url": "http://host/v1", "model": "m", "template": "{prompt}: {a} or b?"}}]},
        "judge.template must contain {prompt}, {a} and {b}",
    ),
    Invalid("every GPU generates", {"generation.gpus": 4}, "generation.gpus: 4 of gpus, which is 4, must leave at least one to train"),
    Invalid(
        "no GPU generates",
        {"generation.gpus": 0},
        "spec.generation.gpus in body should be greater than or equal to 1",
        "spec.generation.gpus",
    ),
    Invalid(
        "uneven tensor parallelism",
        {"generation.gpus": 3, "generation.tensorParallelSize": 2},
        "tensorParallelSize: 2 must divide generation.gpus, which is 3",
    ),
    Invalid(
        "no memory for vLLM",
        {"generation.gpuMemoryUtilization": 0},
        "spec.generation.gpuMemoryUtilization in body should be greater than 0",
        "spec.generation.gpuMemoryUtilization",
    ),
    Invalid(
        "too much memory for vLLM",
        {"generation.gpuMemoryUtilization": 1.5},
        "spec.generation.gpuMemoryUtilization in body should be less than or equal to 1",
        "spec.generation.gpuMemoryUtilization",
    ),
    Invalid(
        "a misspelt argument",
        {"training.learning_rte": 0.1},
        'unknown field "spec.training.learning_rte"',
        "training.learning_rte: unknown argument of GRPOConfig; did you mean learning_rate?",
    ),
    Invalid(
        "a mistyped argument",
        {"training.learning_rate": "fast"},
        "spec.training.learning_rate in body must be of type number",
        "training.learning_rate",
    ),
    Invalid(
        "a fraction of a step", {"training.max_steps": 1.5}, "spec.training.max_steps in body must be of type integer", "training.max_steps"
    ),
    Invalid(
        "an argument of GRPO for OnlineDPO",
        {"algorithm": "OnlineDPO", "training.epsilon": 0.2},
        "training.epsilon: unknown argument of OnlineDPOConfig",
    ),
    Invalid(
        "an argument of OnlineDPO for GRPO",
        {"training.missing_eos_penalty": 1.0},
        "training.missing_eos_penalty: unknown argument of GRPOConfig",
    ),
    Invalid(
        "the output folder as argument",
        {"training.output_dir": "/x"},
        "training.output_dir: is decided by the job; set spec.output.path instead",
    ),
    Invalid(
        "precision as argument", {"training.bf16": True}, "training.bf16: is decided by the job; set spec.accelerate.mixedPrecision instead"
    ),
    Invalid(
        "the engine as argument", {"training.use_vllm": False}, "training.use_vllm: is decided by the job; set spec.generation instead"
    ),
    Invalid(
        "weights of rewards as argument",
        {"training.reward_weights": [1.0]},
        "training.reward_weights: is decided by the job; set spec.rewards[].weight instead",
    ),
    Invalid(
        "groups of one",
        {"training.num_generations": 1},
        "training.num_generations: 1 is too few: a completion is judged against others of its prompt; use at least 2",
    ),
    Invalid(
        "groups that do not divide the batch",
        {"training.num_generations": 3},
        "training.num_generations: 3 does not divide the 8 completions of a rank",
    ),
    Invalid("groups larger than the batch", {"training.per_device_train_batch_size": 4}, NOT_DIVIDED),
    Invalid(
        "groups torn by accumulation", {"training.per_device_train_batch_size": 4, "training.gradient_accumulation_steps": 3}, NOT_DIVIDED
    ),
    Invalid("groups torn by shared generations", {"training.num_generations": 6, "training.steps_per_generation": 2}, NOT_DIVIDED),
    Invalid("an odd batch of pairs", {"algorithm": "OnlineDPO", "training.per_device_train_batch_size": 3}, NOT_DIVIDED),
    Invalid(
        "an unknown precision",
        {"accelerate.mixedPrecision": "fp8"},
        'spec.accelerate.mixedPrecision: Unsupported value: "fp8"',
        "spec.accelerate.mixedPrecision",
    ),
    Invalid(
        "an unknown strategy",
        {"accelerate.strategy": "zero1"},
        'spec.accelerate.strategy: Unsupported value: "zero1"',
        "spec.accelerate.strategy",
    ),
    Invalid(
        "an unknown device", {"accelerator.device": "tpu"}, 'spec.accelerator.device: Unsupported value: "tpu"', "spec.accelerator.device"
    ),
    Invalid("two nodes", {"nodes": 2}, "spec.nodes in body should be less than or equal to 1", "spec.nodes"),
    Invalid(
        "negative retries", {"backoffLimit": -1}, "spec.backoffLimit in body should be greater than or equal to 0", "spec.backoffLimit"
    ),
    Invalid(
        "no steps between checkpoints",
        {"output.saveSteps": 0},
        "spec.output.saveSteps in body should be greater than or equal to 1",
        "spec.output.saveSteps",
    ),
    Invalid(
        "a negative time to live",
        {"ttlSecondsAfterFinished": -1},
        "spec.ttlSecondsAfterFinished in body should be greater than or equal to 0",
        "spec.ttlSecondsAfterFinished",
    ),
    Invalid(
        "an unknown pull policy",
        {"imagePullPolicy": "Sometimes"},
        'spec.imagePullPolicy: Unsupported value: "Sometimes"',
        "spec.imagePullPolicy",
    ),
    Invalid("a misspelt task", {"dataset.task": "cpoy"}, f"task: there is no built-in task cpoy; there are {TASKS}"),
    Invalid("a package's task without a name", {"dataset.task": "reasoning_gym/"}, "there is no built-in task reasoning_gym/;"),
    Invalid("an empty task", {"dataset.task": ""}, "spec.dataset.task in body should be at least 1 chars long", "spec.dataset.task"),
    Invalid("an empty image", {"image": ""}, "spec.image in body should be at least 1 chars long", "spec.image"),
    Invalid(
        "a controller without a domain",
        {"managedBy": "mine"},
        "managedBy: mine is no name of a controller; write it as domain/name, such as onlinetraining.dev/operator, or leave it out",
    ),
    Invalid(
        "no time at all",
        {"activeDeadlineSeconds": 0},
        "spec.activeDeadlineSeconds in body should be greater than or equal to 1",
        "spec.activeDeadlineSeconds",
    ),
    Invalid(
        "more time than Kubernetes can count",
        {"activeDeadlineSeconds": 3000000000},
        "spec.activeDeadlineSeconds in body should be less than or equal to 2147483647",
        "spec.activeDeadlineSeconds",
    ),
    Invalid("a suspension in words", {"suspend": "sometimes"}, "spec.suspend in body must be of type boolean", "spec.suspend"),
    Invalid(
        "too many retries", {"backoffLimit": 1001}, "spec.backoffLimit in body should be less than or equal to 1000", "spec.backoffLimit"
    ),
    Invalid(
        "no time for the generator",
        {"generation.readyTimeoutSeconds": 0},
        "spec.generation.readyTimeoutSeconds in body should be greater than or equal to 1",
        "spec.generation.readyTimeoutSeconds",
    ),
    Invalid(
        "no room for a prompt",
        {"generation.maxModelLen": 0},
        "spec.generation.maxModelLen in body should be greater than or equal to 1",
        "spec.generation.maxModelLen",
    ),
    *(
        Invalid(
            f"a secret in the variable {name}",
            {"env": [{"name": "A", "value": "1"}, {"name": name, "value": "hf_abc"}]},
            f"value: {name} looks like a secret, which a value shows to everybody who may read this object; put it into a Secret and name "
            "that in valueFrom.secretKeyRef",
        )
        for name in SECRETS
    ),
    Invalid(
        "a key among vLLM's arguments",
        {"generation.extraArgs": ["--api-key", "abc"]},
        "extraArgs: a secret in an argument shows in the Job and in ps; bring it as a variable by env[].valueFrom.secretKeyRef",
    ),
    *(
        Invalid(
            f"another address for vLLM by {word}",
            {"generation.extraArgs": ["--seed", "7", word, "0.0.0.0"]},
            f"extraArgs: {word} cannot be given: the job decides where vLLM listens, which is on loopback",
        )
        for word in ("--host", "--host=0.0.0.0", "--hos", "--port=80", "--uds", "--config")
    ),
    *(
        Invalid(
            f"a generator that quantises by {word}",
            {"generation.extraArgs": ["--seed", "7", word, "fp8"]},
            f"extraArgs: {word} cannot be given: what quantising rounds away is as large as what wrong weights change",
        )
        for word in ("--quantization", "--quantization=fp8", "--quant", "-q")
    ),
    *(
        Invalid(
            f"a secret in the argument {name} of a dataset",
            {"dataset": {"name": "org/data", "args": {"seed": 1, name: "hf_abc"}}, "rewards": [{"function": "a.b"}]},
            f"spec.dataset.args.{name}: {ARGUMENT}",
        )
        for name in SECRET_ARGUMENTS
    ),
    *(
        Invalid(f"a secret in {what}", {"rewards": [{"function": "a.b"}, reward]}, f".{path}: {ARGUMENT}")
        for what, reward, path in (
            ("the arguments of a reward", {"function": "a.b", "args": {"api_key": "sk-abc"}}, "args.api_key"),
            ("a group of arguments", {"function": "a.b", "args": {"options": {"headers": 1, "secret": "x"}}}, "args.options.secret"),
            ("a judge's request", {"judge": {"url": "http://h", "model": "m", "request": {"password": "x"}}}, "request.password"),
        )
    ),
    *(
        Invalid(
            f"a secret in the argument {word}",
            {"dataset": None, "trainer.command": [*SCRIPT, word]},
            "command: a secret in an argument shows in the Job and in ps; bring it as a variable by env[].valueFrom.secretKeyRef",
        )
        for word in ("--hub_token=hf_abc", "--wandb-api-key", "--password", "--token=$(HF_TOKEN)", "key=$(WANDB_API_KEY)")
    ),
    Invalid("a token as argument", {"training.hub_token": "hf_abc"}, "training.hub_token: is decided by the job; set HF_TOKEN by spec.env"),
    Invalid("a misspelt field", {"gpu": 4}, 'unknown field "spec.gpu"', "spec.gpu: unknown field"),
    Invalid(
        "a misspelt field of generation",
        {"generation.maxLen": 4},
        'unknown field "spec.generation.maxLen"',
        "spec.generation.maxLen: unknown field",
    ),
]

REFUSED_BY_THE_OPERATOR = [
    Invalid(
        "a secret three levels deep",
        {"rewards": [{"function": "a.b", "args": {"a": {"b": [{"api_key": "x"}]}}}]},
        f"spec.rewards.0.args.a.b.api_key: {ARGUMENT}",
    ),
]
"""What no rule of the API server can see."""

REFUSED_BY_THE_SERVER = [
    Invalid("an unnamed variable", {"env": [{"value": "1"}]}, "spec.env[0].name: Required value"),
    Invalid("a volume without a name", {"volumes": [{"emptyDir": {}}]}, "spec.volumes[0].name: Required value"),
    Invalid("a mount without a path", {"volumeMounts": [{"name": "v"}]}, "spec.volumeMounts[0].mountPath: Required value"),
]
"""Pieces of a pod, which only the API server judges."""
