"""What can be set about the operator."""

from __future__ import annotations

from dataclasses import dataclass

from otj_operator.kube import LEASE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the operator; `main.py` reads them from arguments and environment."""

    runtime_image: str
    """Image of trainer and generator for jobs that name none."""
    namespace: str = "online-training-system"
    """Where the operator runs and keeps its Lease."""
    identity: str = "online-training-operator"
    """Holder name in the Lease: the pod's name."""
    lease_seconds: float = LEASE_SECONDS
    """A standby takes over after so long without a renewal of the Lease."""
    listen_port: int = 8080
    """Port of /healthz and /readyz."""
    namespaces: tuple[str, ...] = ()
    """Where jobs are looked for; empty: everywhere."""
    workers: int = 48
    """Jobs that are reconciled at the same time. Workers wait for the API server most of their time; a busy one serves whoever asks most."""
    resync_seconds: float = 300.0
    """Time between full listings, which heal what watches missed."""
    stall_seconds: float = 90.0
    """A watch that owes a change for longer has stalled. kopf itself starts a silent one anew after 70."""
    progress_seconds: float = 5.0
    """Time between two pulls of one launcher, if there are few."""
    progress_rate: float = 100.0
    """Pulls per second of all launchers together: with more than rate x seconds of them each is asked less often."""
    progress_connections: int = 32
    """Launchers that are asked at the same time."""
    progress_timeout_seconds: float = 2.0
    """Deadline of one pull."""
    silent_seconds: float = 60.0
    """A launcher that has answered nothing for so long is said to be silent: longer than a node's hiccup."""
