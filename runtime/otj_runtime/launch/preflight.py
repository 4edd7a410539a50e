"""Loading rewards and dataset before anything large is loaded, in a process of their own: rewards are a user's code, which may take
long, print, or end the interpreter. What is checked is what the ranks will do themselves, so the two cannot disagree; but a rank
imports torch and loads a model first, which takes a minute on a busy machine.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from otj_runtime.data.load import held_out_prompts, load_prompts
from otj_runtime.pod.commands import script_arguments
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import DatasetInvalid, ExitCode, InvalidSpec, RewardImportFailed, RunError, exit_code
from otj_runtime.rewards import load_rewards

IMPORT_SECONDS = 120

CHECKED_ROWS = 1000
"""Rows of a JSONL file that are looked at here: the ranks check them all, and a large file is not read once more for that."""


async def check_inputs(config: PodConfig) -> None:
    """Load the job's rewards, and its dataset unless the hub has it, as the ranks do; then forget them. Of a script of the user's own
    only that it is there can be checked.

    Raises:
        RewardImportFailed: naming the function that cannot be loaded, or all of them after IMPORT_SECONDS.
        InvalidSpec: if the script does not exist, or the strategy needs a package that is not there.
        DatasetInvalid: if the task does not exist, or the file or folder cannot be used.
    """
    check_strategy(config)
    if config.script:
        check_script(config)
        return
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "otj_runtime.launch.preflight", stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe
    )
    try:
        _, errors = await child.communicate(config.model_dump_json(by_alias=True).encode())
    finally:
        if child.returncode is None:
            child.kill()
    # Killed by a signal, for memory say: that tells nothing of the input, and the ranks will find out.
    if child.returncode is not None and child.returncode > 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        message = lines[-1] if lines else f"importing the rewards ended the interpreter with status {child.returncode}"
        raise (DatasetInvalid if child.returncode == ExitCode.DATASET_INVALID else RewardImportFailed)(message)


def check_strategy(config: PodConfig) -> None:
    """Raise InvalidSpec if ZeRO-3 is asked for without DeepSpeed: `accelerate launch` would end on it, before any rank could leave a note."""
    if config.accelerate.strategy == "deepspeed-zero3" and importlib.util.find_spec("deepspeed") is None:
        raise InvalidSpec(
            "accelerate.strategy: deepspeed-zero3 needs the package deepspeed, which this image does not have: set spec.image to one with it, "
            "or use fsdp2"
        )


def check_script(config: PodConfig) -> None:
    """Raise InvalidSpec unless the script of `config` is a file; the text tells what lies there instead. Modules are left to Python."""
    name = script_arguments(config.script, os.environ)[0]
    path = Path(config.output, name)
    if name == "-m" or path.is_file():
        return
    beside = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:8]) if path.parent.is_dir() else None
    found = f"its folder holds {beside or 'nothing'}" if beside is not None else "nor does its folder"
    raise InvalidSpec(f"trainer.command: the script {name} does not exist, {found}: check the path and the volume mounted there")


def main() -> int:
    """Check the configuration on standard input; on failure, say why in the last line of standard error."""
    config = PodConfig.model_validate_json(sys.stdin.read())

    def too_long(number: int, frame: FrameType | None) -> None:
        names = ", ".join(reward.function for reward in config.rewards if reward.function is not None)
        raise RewardImportFailed(f"importing {names} took longer than {IMPORT_SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    try:
        signal.alarm(IMPORT_SECONDS)
        load_rewards(config.rewards, task=config.prompts.task)
        signal.alarm(0)
        _check_dataset(config)
    except RunError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return exit_code(error.reason)
    return 0


def _check_dataset(config: PodConfig) -> None:
    """Load what needs no network. Errors that are not ours are left for the ranks to tell."""
    if config.prompts.name is None:
        try:
            load_prompts(config.prompts, seed=0, limit=CHECKED_ROWS)
            held_out_prompts(config.prompts)
        except RunError:
            raise
        except Exception as error:
            print(f"preflight: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
