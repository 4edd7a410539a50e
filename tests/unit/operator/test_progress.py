"""What becomes of `status.progress` as the launcher tells more."""

from __future__ import annotations

from otj_operator.plan.progress import at_rest, merged
from otj_runtime.api import Progress


def test_what_is_not_told_again_stays_known() -> None:
    before = Progress(step=3, total_steps=10, reward="0.5")
    after = merged(before, Progress(step=4, policy_version=4))
    assert after is not None
    assert (after.step, after.total_steps, after.reward, after.policy_version, after.steps) == (4, 10, "0.5", 4, "4/10")


def test_an_advice_is_given_until_the_trainer_has_none_and_outlives_the_pod() -> None:
    advised = merged(None, Progress(step=3, advice="generation.gpus: 2 would be faster"))
    assert advised is not None
    silent = merged(advised, Progress(world_size=3))  # a pod that starts again knows nothing yet
    assert silent is not None
    assert silent.advice == advised.advice
    rested = at_rest(advised)
    assert rested is not None
    assert rested.advice == advised.advice
    followed = merged(advised, Progress(step=4))
    assert followed is not None
    assert followed.advice is None
