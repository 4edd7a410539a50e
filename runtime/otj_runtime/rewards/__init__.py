"""Rewards: functions that judge completions. Importable without torch.

`builtin` has ours, `loading` finds a user's and binds its arguments, `scoring` calls them and checks what comes back.
"""

from otj_runtime.rewards.builtin import exact_match, last_integer, position_match
from otj_runtime.rewards.loading import load_rewards
from otj_runtime.rewards.scoring import Reward, Rewards, RewardTable

__all__ = ["Reward", "RewardTable", "Rewards", "exact_match", "last_integer", "load_rewards", "position_match"]
