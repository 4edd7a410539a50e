"""The long tail of a batch: when the groups that are still being generated are given up. A pure rule.

Generation ends with its longest completion, and while the last few decode, the generator is nearly empty. With staleness 0 the
trainer waits for them too. By default every group is finished: `max_completion_length` bounds it, and dropping the slowest groups
teaches the policy that long answers never happened. Who prefers speed gives a factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

QUORUM = 0.75
"""Share of a rank's groups that must be there before any is given up."""


def patience(durations: Sequence[float], *, groups: int, factor: float | None) -> float | None:
    """Seconds, from the moment the batch was asked for, after which the missing groups are dropped; None to wait for all of them.

    That is `factor` times what the quorum (three quarters of the groups, at least one) took.

    Args:
        durations: seconds that the finished groups took, in the order in which they finished.
        groups: groups asked for.
        factor: at least 1; None drops nothing.
    """
    quorum = max(1, math.ceil(QUORUM * groups))
    if factor is None or len(durations) < quorum:
        return None
    return factor * durations[quorum - 1]
