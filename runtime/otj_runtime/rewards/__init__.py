"""Rewards: what judges completions. Importable without torch.

`builtin`, `mathematics` and `puzzles` have our functions, `model` sequence-classification models, `judge` and `http_judge` pairwise
comparison; `loading` turns what a job or a script names into `Rewards`, and `scoring` calls them and checks what comes back.
"""

from otj_runtime.rewards.builtin import exact_match, format_match, last_integer, length_target, overlong_penalty, position_match
from otj_runtime.rewards.loading import build_rewards, load_rewards
from otj_runtime.rewards.mathematics import math_verify
from otj_runtime.rewards.puzzles import reasoning_gym
from otj_runtime.rewards.scoring import Reward, Rewards, RewardTable

__all__ = [
    "Reward",
    "RewardTable",
    "Rewards",
    "build_rewards",
    "exact_match",
    "format_match",
    "last_integer",
    "length_target",
    "load_rewards",
    "math_verify",
    "overlong_penalty",
    "position_match",
    "reasoning_gym",
]
