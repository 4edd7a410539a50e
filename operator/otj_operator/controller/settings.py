"""What can be set about the operator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the operator; `main.py` reads them from arguments and environment."""

    runtime_image: str
    """Image of trainer and generator for jobs that name none."""
    namespace: str = "online-training-system"
    """Where the operator runs and keeps its Lease."""
    identity: str = "online-training-operator"
    """Holder name in the Lease: the pod's name."""
    listen_port: int = 8080
    """Port of /healthz and /readyz."""
    workers: int = 8
    """Jobs that are reconciled at the same time."""
    resync_seconds: float = 300.0
    """Time between full listings, which heal what watches missed."""
    progress_seconds: float = 5.0
    """Time between two pulls of one launcher."""
    progress_connections: int = 32
    """Launchers that are asked at the same time."""
    progress_timeout_seconds: float = 2.0
    """Deadline of one pull."""
