"""What a run learns from: `spec.dataset`, the prompts, and `spec.rewards`, what judges the completions.

A secret never stands here: a judge's key is named by the environment variable that brings it, and arguments that look like one are refused.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from otj_runtime.api.base import ApiModel, Rule
from otj_runtime.api.secrets import Arguments

ShortText = Annotated[str, Field(min_length=1, max_length=253)]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]


BUILT_IN_TASKS = ("addition", "copy", "reverse")
PUZZLE = "^reasoning_gym/[a-z0-9_]+$"
"""Names of tasks that another package makes: its own list is not known here, so the pod checks the rest."""


class DatasetSpec(ApiModel):
    """Where prompts come from: a built-in task, a dataset on the hub, or files on a mounted volume."""

    task: ShortText | None = Field(
        None,
        description="A built-in task: addition, copy, reverse, or reasoning_gym/NAME for a generator of that package. It brings its own "
        "reward. Give one of task, name and path.",
    )
    name: ShortText | None = Field(None, description="Name of a dataset on the hub. Give one of task, name and path.")
    path: PathText | None = Field(
        None,
        description="Absolute path on a mounted volume: a JSONL, parquet or CSV file, or a folder that `datasets` can load. Give one of task, "
        "name and path.",
    )
    split: ShortText = Field("train", description="Split to train on. Default: train.")
    eval_split: ShortText | None = Field(
        None, description="Split whose prompts are answered to measure the policy. Default: none; a built-in task keeps prompts of its own."
    )
    streaming: bool = Field(
        False,
        description="Read the dataset while training instead of loading it; it has no length then, so training.max_steps is needed. "
        "Default: false.",
    )
    columns: dict[str, Annotated[str, Field(max_length=253)]] = Field(
        default_factory=dict,
        max_length=32,
        description="Renames columns: key is the name used here (prompt, answer, ...), value the dataset's own. Default: none renamed.",
    )
    args: Arguments = Field(
        default_factory=dict,
        description="Arguments of the built-in task, such as its length or seed, or of `datasets.load_dataset` for a name or folder. Default: none.",
    )

    rules = (
        Rule(
            cel=f"!has(self.task) || self.task in {list(BUILT_IN_TASKS)} || self.task.matches('{PUZZLE}')",
            message=f"task: there is no built-in task %s; there are {', '.join(BUILT_IN_TASKS)} and reasoning_gym/NAME",
            holds=lambda d: d.task is None or d.task in BUILT_IN_TASKS or re.match(PUZZLE, d.task) is not None,
            values=lambda d: (d.task,),
            cel_values=("self.task",),
            field="task",
        ),
        Rule(
            cel="(has(self.task) ? 1 : 0) + (has(self.name) ? 1 : 0) + (has(self.path) ? 1 : 0) == 1",
            message="give exactly one of dataset.task (built in), dataset.name (on the hub) and dataset.path (on a mounted volume)",
            holds=lambda d: sum(x is not None for x in (d.task, d.name, d.path)) == 1,
        ),
        Rule(
            cel="!has(self.task) || (!has(self.evalSplit) && !(has(self.streaming) && self.streaming))",
            message="dataset.evalSplit and dataset.streaming go with dataset.name or dataset.path: a built-in task is made in memory and keeps "
            "prompts of its own",
            holds=lambda d: d.task is None or (d.eval_split is None and not d.streaming),
        ),
    )


_ADDRESS = "^https?://[^ @?#]+$"
_VARIABLE = "^[A-Za-z_][A-Za-z0-9_]*$"
_IMPORT_PATH = "^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*[.:][A-Za-z_][A-Za-z0-9_]*$"


class JudgeSpec(ApiModel):
    """A model behind HTTP that compares two completions of a prompt, by the OpenAI chat protocol."""

    url: Annotated[str, Field(min_length=1, max_length=2048)] = Field(
        description="Base address of the protocol, such as https://host/v1; /chat/completions is added, so it has no query. Credentials do not "
        "belong here."
    )
    model: ShortText = Field(description="Name of the model as the server knows it.")
    api_key_env: Annotated[str, Field(max_length=253)] | None = Field(
        None, description="Environment variable that holds the key; bring it from a secret with spec.env. Default: no key is sent."
    )
    template: Annotated[str, Field(min_length=1, max_length=16384)] | None = Field(
        None,
        description="The question, with {prompt}, {a} and {b} where they belong. It must ask for A, B or TIE alone, or for [[A]] at the "
        "end. Default: a plain comparison.",
    )
    both_orders: bool = Field(
        True,
        description="Ask about each pair twice, the answers swapped, so that a judge's liking for a position cancels out. Default: true.",
    )
    max_tokens: int = Field(16, ge=1, description="Longest answer, in tokens; a judge that reasons needs more. Default: 16.")
    max_concurrency: int = Field(16, ge=1, le=1024, description="Requests of one training rank under way at a time. Default: 16.")
    timeout_seconds: float = Field(60.0, gt=0, description="Seconds that one attempt of a request may take. Default: 60.")
    max_retries: int = Field(
        4, ge=0, le=20, description="Attempts after the first that failed for a reason that may pass, such as 429. Default: 4."
    )
    request: Arguments = Field(
        default_factory=dict,
        description="Further fields of each request; they win. max_completion_tokens replaces maxTokens. Default: none.",
    )

    rules = (
        Rule(
            cel="!has(self.template) || (self.template.contains('{prompt}') && self.template.contains('{a}') && self.template.contains('{b}'))",
            message="judge.template must contain {prompt}, {a} and {b}",
            holds=lambda j: j.template is None or all(name in j.template for name in ("{prompt}", "{a}", "{b}")),
        ),
        # Neither of these shows what was given: it may hold a key.
        Rule(
            cel=f"self.url.matches('{_ADDRESS}')",
            message="url: must be http:// or https:// and an address without user and query, to which /chat/completions can be added; a "
            "key comes from the variable that apiKeyEnv names",
            holds=lambda j: re.match(_ADDRESS, j.url) is not None,
            field="url",
        ),
        Rule(
            cel=f"!has(self.apiKeyEnv) || self.apiKeyEnv.matches('{_VARIABLE}')",
            message="apiKeyEnv: must be the name of a variable, in letters, digits and _; the key itself belongs into a Secret, which "
            "env[].valueFrom.secretKeyRef brings as that variable",
            holds=lambda j: j.api_key_env is None or re.match(_VARIABLE, j.api_key_env) is not None,
            field="apiKeyEnv",
        ),
    )


class RewardSpec(ApiModel):
    """One reward: a function, a reward model, or a judge that compares completions."""

    function: Annotated[str, Field(min_length=3, max_length=253)] | None = Field(
        None,
        description="Import path of a callable, as package.module.function. It gets prompts, completions, completion_ids and the "
        "dataset's columns, and returns one number (or None) per completion. Give one of function, model and judge.",
    )
    model: PathText | None = Field(
        None,
        description="Sequence-classification model with one label, by hub name or absolute path on a mounted volume; its logit is the "
        "reward. Give one of function, model and judge.",
    )
    judge: JudgeSpec | None = Field(
        None,
        description="Model behind HTTP that compares the completions of each prompt; the reward is the share of comparisons won. Give "
        "one of function, model and judge.",
    )
    weight: float = Field(1.0, description="Factor of this reward in the sum. Default: 1.")
    args: Arguments = Field(
        default_factory=dict,
        description="Keyword arguments bound to the function before training; of a model: device, batch_size, max_length, dtype, "
        "revision. Default: none.",
    )
    timeout_seconds: float | None = Field(
        None, gt=0, description="Seconds that judging a rank's whole batch may take. Default: 60, of a judge 600."
    )

    rules = (
        Rule(
            cel="(has(self.function) ? 1 : 0) + (has(self.model) ? 1 : 0) + (has(self.judge) ? 1 : 0) == 1",
            message="give exactly one of function, model and judge in each of rewards",
            holds=lambda r: sum(x is not None for x in (r.function, r.model, r.judge)) == 1,
        ),
        Rule(
            # The name is a word of CEL's own: without the underscores the API server does not find how long it may be.
            cel=f"!has(self.__function__) || self.__function__.matches('{_IMPORT_PATH}')",
            message="function: %s is no import path of a callable; write package.module.function",
            holds=lambda r: r.function is None or re.match(_IMPORT_PATH, r.function) is not None,
            values=lambda r: (r.function,),
            cel_values=("self.__function__",),
            field="function",
        ),
    )
