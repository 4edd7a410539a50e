"""From what a job or a script names to `Rewards`: import paths, models, judges and callables become functions with their arguments bound.

    spec.rewards (or the reward of its built-in task) -> load_rewards  \
                                                                        > Rewards, in one order, weights beside them
    reward_funcs, judge (Python, TRL's arguments)     -> build_rewards /

Mistakes show before anything large loads: weights of reward models come later, with `Rewards.load`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from otj_runtime.api.inputs import RewardSpec
from otj_runtime.data.tasks import find_task
from otj_runtime.pod.errors import InvalidSpec, RewardImportFailed
from otj_runtime.rewards.http_judge import HttpJudge
from otj_runtime.rewards.judge import JudgeReward
from otj_runtime.rewards.model import RewardModel
from otj_runtime.rewards.scoring import CALL_KEYWORDS, REWARD_SECONDS, Reward, RewardFunction, Rewards

JUDGE_SECONDS = 600.0
"""How long judging a rank's whole batch may take, unless the reward says otherwise."""


def load_rewards(specs: Sequence[RewardSpec], task: str | None = None) -> Rewards:
    """The rewards of a job.

    Args:
        specs: the job's rewards.
        task: the built-in task, whose reward is taken if `specs` is empty.

    Raises:
        RewardImportFailed: naming the function, what failed and the fix.
        DatasetInvalid: if there is no task of that name.
    """
    if not specs:
        if task is None:
            raise RewardImportFailed("spec.rewards is empty and there is no built-in task to bring a reward: name at least one function")
        specs = [RewardSpec(function=find_task(task).reward)]
    return Rewards([_load(spec) for spec in specs])


def build_rewards(
    reward_funcs: Any = None,
    *,
    reward_weights: Sequence[float] | None = None,
    reward_processing_classes: Any = None,
    judge: Any = None,
    timeout_s: float = REWARD_SECONDS,
) -> Rewards:
    """The rewards of a trainer that is made in Python, from TRL's arguments; weights of reward models are loaded at once.

    Args:
        reward_funcs: one or a list of: a callable in TRL's convention; the hub name or folder of a sequence-classification model; such
            a model itself. Or `Rewards`, which are complete.
        reward_weights: factor of each of `reward_funcs`, then of the judge. Default: all 1.
        reward_processing_classes: the tokenizer of each reward model, None for callables. Default: each model's own.
        judge: compares completions in pairs: see `rewards.judge`.
        timeout_s: seconds that one call of a function may take; a judge has JUDGE_SECONDS at least.

    Raises:
        InvalidSpec: if there is nothing to judge with, or numbers do not match.
        RewardImportFailed: if one is no reward, or its model cannot be loaded.
    """
    if isinstance(reward_funcs, Rewards):
        reward_funcs.load()
        return reward_funcs
    functions = _as_list(reward_funcs)
    tokenizers = _as_list(reward_processing_classes) or [None] * len(functions)
    if len(tokenizers) != len(functions):
        raise InvalidSpec(f"reward_processing_classes: there are {len(tokenizers)} for {len(functions)} reward_funcs; give one for each")
    found = [_as_reward(function, tokenizer, timeout_s) for function, tokenizer in zip(functions, tokenizers, strict=True)]
    if judge is not None:
        reward = JudgeReward(judge)
        found.append(Reward(name=reward.__name__, function=reward, timeout_s=max(timeout_s, JUDGE_SECONDS)))
    if not found:
        raise InvalidSpec("reward_funcs: nothing judges the completions; give at least one function, reward model or judge")
    weights = [1.0] * len(found) if reward_weights is None else [float(weight) for weight in reward_weights]
    if len(weights) != len(found):
        raise InvalidSpec(f"reward_weights: there are {len(weights)} for {len(found)} rewards; give one for each")
    rewards = Rewards([dataclasses.replace(reward, weight=weight) for reward, weight in zip(found, weights, strict=True)])
    rewards.load()
    return rewards


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _as_reward(function: Any, tokenizer: Any, timeout_s: float) -> Reward:
    if isinstance(function, str) or hasattr(function, "config"):
        function = RewardModel(function, tokenizer=tokenizer)
    if not callable(function):
        raise RewardImportFailed(f"reward_funcs: {function!r:.100} is neither callable nor the name of a model")
    return Reward(name=getattr(function, "__name__", type(function).__name__), function=function, timeout_s=timeout_s)


def _load(spec: RewardSpec) -> Reward:
    """One reward of a job, under the name that metrics and messages use."""
    if spec.judge is not None:
        if spec.args:
            raise RewardImportFailed(f"judge {spec.judge.model}: args goes with a function or a model; a judge has fields of its own")
        judge = JudgeReward(HttpJudge(spec.judge), both_orders=spec.judge.both_orders)
        return _reward(spec, judge.__name__, judge, default_s=JUDGE_SECONDS)
    if spec.model is not None:
        model = _model(spec.model, spec.args)
        return _reward(spec, model.__name__, model)
    assert spec.function is not None, "the rules of RewardSpec leave nothing else"
    function = import_function(spec.function)
    _check_binding(spec.function, spec.args, function)
    name = spec.function.replace(":", ".").rpartition(".")[2]
    return _reward(spec, name, _bind(function, spec.args) if spec.args else function)


def _reward(spec: RewardSpec, name: str, function: RewardFunction, *, default_s: float = REWARD_SECONDS) -> Reward:
    return Reward(name=name, function=function, weight=spec.weight, timeout_s=spec.timeout_seconds or default_s)


def _model(name: str, args: dict[str, Any]) -> RewardModel:
    if name.startswith("/") and not Path(name).is_dir():
        raise _failed(name, "there is no such folder", "check it, and the volume mounted there")
    try:
        return RewardModel(name, **args)
    except TypeError as error:
        raise _failed(
            name, f"args do not fit a reward model: {error}", "it takes device, batch_size, max_length, dtype, revision"
        ) from error


def _bind(function: RewardFunction, args: dict[str, Any]) -> RewardFunction:
    """`function` with `args` bound; unlike a partial's, they win over a column of the same name."""

    @functools.wraps(function)
    def bound(**keywords: Any) -> Any:
        return function(**keywords | args)

    return bound


def import_function(path: str) -> Callable[..., Any]:
    """The callable at `package.module.function` or `package.module:function`.

    Raises:
        RewardImportFailed: if there is none.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        raise _failed(
            path,
            f"there is no module {missing}",
            "install it in the image, or mount its folder and put that on PYTHONPATH in spec.env",
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed(path, f"importing {module_name} raised {type(error).__name__}: {error}", "make the module import cleanly") from error
    if not hasattr(module, name):
        raise _failed(path, f"module {module_name} ({_file(module)}) has no attribute {name}", _known_functions(module))
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function):
        raise _failed(path, f"{name} is a {type(function).__name__}, which cannot be called", "name a function")
    return function


def _check_binding(path: str, args: dict[str, Any], function: Callable[..., Any]) -> None:
    """Refuse arguments that the function cannot take. Columns are not known here; a call finds those that are missing."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some callables written in C have no signature
    taken = sorted(set(args) & set(CALL_KEYWORDS))
    if taken:
        raise _failed(path, f"args may not set {', '.join(taken)}, which every call brings", "remove it from args")
    try:
        signature.bind_partial(**dict.fromkeys(CALL_KEYWORDS), **args)
    except TypeError as error:
        raise _failed(
            path,
            f"its signature {signature} does not fit: {error}",
            f"it is called with {', '.join(CALL_KEYWORDS)}, the dataset's columns and args, all by name: accept **kwargs, and correct args",
        ) from error


def _failed(path: str, what: str, fix: str) -> RewardImportFailed:
    return RewardImportFailed(f"reward {path}: {what}; {fix}")


def _file(module: Any) -> str:
    return getattr(module, "__file__", None) or "a namespace package"


def _known_functions(module: Any) -> str:
    names = sorted(name for name, value in vars(module).items() if inspect.isroutine(value) and not name.startswith("_"))
    return f"it has the functions {', '.join(names[:8])}" if names else "it has no functions"
