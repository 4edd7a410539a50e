"""Importing the rewards before anything large is loaded, in a process of their own: they are a user's code, which may take long,
print, or end the interpreter. What is checked is what the ranks will do themselves, so the two cannot disagree."""

from __future__ import annotations

import asyncio
import sys

from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import DatasetInvalid, ExitCode, RewardImportFailed, RunError, exit_code
from otj_runtime.rewards import load_rewards

IMPORT_SECONDS = 120.0


async def check_rewards(config: PodConfig) -> None:
    """Load the job's rewards as the ranks do, and forget them.

    Raises:
        RewardImportFailed: naming the function that cannot be loaded, or all of them after IMPORT_SECONDS.
        DatasetInvalid: if they are those of a built-in task that does not exist.
    """
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "otj_runtime.launch.preflight", stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe
    )
    try:
        _, errors = await asyncio.wait_for(child.communicate(config.model_dump_json(by_alias=True).encode()), IMPORT_SECONDS)
    except TimeoutError:
        names = ", ".join(reward.function for reward in config.rewards)
        raise RewardImportFailed(f"importing {names} took longer than {IMPORT_SECONDS:.0f} s") from None
    finally:
        if child.returncode is None:
            child.kill()
    if child.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        message = lines[-1] if lines else f"importing the rewards ended the interpreter with status {child.returncode}"
        raise (DatasetInvalid if child.returncode == ExitCode.DATASET_INVALID else RewardImportFailed)(message)


def main() -> int:
    """Load the rewards of the configuration on standard input; on failure, say why in the last line of standard error."""
    config = PodConfig.model_validate_json(sys.stdin.read())
    try:
        load_rewards(config.rewards, task=config.dataset.task)
    except RunError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return exit_code(error.reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
