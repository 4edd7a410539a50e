"""`python -m otj_runtime.launch`: the trainer container's command."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from otj_runtime.launch.launcher import Launcher, conclude
from otj_runtime.pod.config import Layout, PodConfig
from otj_runtime.pod.errors import FailureNote, InvalidSpec


def main() -> int:
    """Exit code of the trainer container."""
    try:
        config = PodConfig.from_environment()
    except InvalidSpec as error:
        return conclude(FailureNote.of(error), Path(Layout().termination_log))
    return asyncio.run(Launcher(config).run())


if __name__ == "__main__":
    sys.exit(main())
