"""From `spec.rewards` to callables: imports each function and binds its arguments, so that a mistake shows before anything large loads.

A job that names no reward gets the one of its built-in task.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from otj_runtime.api.spec import RewardSpec
from otj_runtime.data.tasks import find_task
from otj_runtime.pod.errors import RewardImportFailed
from otj_runtime.rewards.scoring import CALL_KEYWORDS, REWARD_SECONDS, Reward, RewardFunction, Rewards


def load_rewards(specs: Sequence[RewardSpec], task: str | None = None, *, timeout_s: float = REWARD_SECONDS) -> Rewards:
    """The rewards of a job.

    Args:
        specs: the job's reward functions.
        task: the built-in task, whose reward is taken if `specs` is empty.
        timeout_s: seconds that one call of a function may take.

    Raises:
        RewardImportFailed: naming the function, what failed and the fix.
        DatasetInvalid: if there is no task of that name.
    """
    if not specs:
        if task is None:
            raise RewardImportFailed("spec.rewards is empty and there is no built-in task to bring a reward: name at least one function")
        specs = [RewardSpec(function=find_task(task).reward)]
    return Rewards([Reward(name=spec.function, function=_load(spec), weight=spec.weight) for spec in specs], timeout_s=timeout_s)


def _load(spec: RewardSpec) -> RewardFunction:
    function = import_function(spec.function)
    _check_binding(spec, function)
    return _bind(function, spec.args) if spec.args else function


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


def _check_binding(spec: RewardSpec, function: Callable[..., Any]) -> None:
    """Refuse arguments that the function cannot take. Columns are not known here; a call finds those that are missing."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some callables written in C have no signature
    taken = sorted(set(spec.args) & set(CALL_KEYWORDS))
    if taken:
        raise _failed(spec.function, f"args may not set {', '.join(taken)}, which every call brings", "remove it from args")
    try:
        signature.bind_partial(**dict.fromkeys(CALL_KEYWORDS), **spec.args)
    except TypeError as error:
        raise _failed(
            spec.function,
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
