"""Online RL training of language models: what the operator, the trainer and the generator share.

    from otj_runtime import GRPOConfig, GRPOTrainer          # OnlineDPOConfig, OnlineDPOTrainer

Nothing here imports torch at import time, so that the operator can use `otj_runtime.api` and `otj_runtime.pod` from a small image: the
trainers and their configurations are looked up when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otj_runtime.train.config import GRPOConfig, OnlineDPOConfig
    from otj_runtime.train.grpo import GRPOTrainer
    from otj_runtime.train.online_dpo import OnlineDPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "OnlineDPOConfig", "OnlineDPOTrainer"]

_HOMES = {"GRPOConfig": "config", "OnlineDPOConfig": "config", "GRPOTrainer": "grpo", "OnlineDPOTrainer": "online_dpo"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"otj_runtime.train.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
