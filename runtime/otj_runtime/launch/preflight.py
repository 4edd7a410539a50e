"""What can be known to be wrong before anything large is loaded: the model's folder and the imports of rewards.

Rewards are a user's code, so a child process imports them: it may take long, print, or end the interpreter.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from otj_runtime.api.spec import RewardSpec
from otj_runtime.pod.errors import ModelNotFound, RewardImportFailed

IMPORT_SECONDS = 120.0

_IMPORT = """
import importlib, sys
for path in sys.argv[1:]:
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}, no function")
    except BaseException as error:
        print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
"""


def check_model(path: Path) -> None:
    """Raise ModelNotFound unless `path` is a folder with a transformers configuration."""
    if not path.is_dir():
        raise ModelNotFound(f"model folder {path} does not exist: check spec.model.path and the volume mounted there")
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ModelNotFound(f"model folder {path} holds no config.json (found: {found}): spec.model.path must be a transformers model")


async def check_rewards(rewards: list[RewardSpec]) -> None:
    """Import every reward function.

    Raises:
        RewardImportFailed: naming the first that cannot be imported, or that none was within IMPORT_SECONDS.
    """
    paths = [reward.function for reward in rewards]
    if not paths:
        return
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _IMPORT, *paths, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, errors = await asyncio.wait_for(child.communicate(), IMPORT_SECONDS)
    except TimeoutError:
        raise RewardImportFailed(f"importing {', '.join(paths)} took longer than {IMPORT_SECONDS:.0f} s") from None
    finally:
        if child.returncode is None:
            child.kill()
    if child.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines() or [f"the import ended with status {child.returncode}"]
        raise RewardImportFailed(f"spec.rewards: {lines[-1]}"[:3500])
