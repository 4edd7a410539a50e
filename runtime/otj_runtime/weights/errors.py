"""How a weight sync fails."""

from __future__ import annotations

from otj_runtime.api import Reason
from otj_runtime.pod.errors import RunError


class MailboxError(RunError):
    """The mailbox cannot be written or holds nothing that may be read."""

    reason = Reason.WEIGHT_SYNC_FAILED


class WeightSyncFailed(RunError):
    """A sync did not finish.

    Attributes:
        phase: the step of the sync that failed, such as `update`.
    """

    reason = Reason.WEIGHT_SYNC_FAILED

    def __init__(self, message: str, *, phase: str = "") -> None:
        # One positional argument, so that the error survives pickling on its way to the other ranks.
        super().__init__(message)
        self.phase = phase


class WeightsDiverged(RunError):
    """Trainer and generator give the probe different log-probabilities: they do not hold the same weights."""

    reason = Reason.WEIGHTS_DIVERGED


class UnsupportedVLLM(RunError):
    """The installed vLLM is outside the range that the plugin knows."""

    reason = Reason.INVALID_SPEC
