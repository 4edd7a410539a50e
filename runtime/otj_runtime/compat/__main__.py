"""`python -m otj_runtime.compat SCRIPT ARGUMENTS` or `... -m MODULE ARGUMENTS`: one training rank that runs a script of the user's own.

The script runs as under `python SCRIPT`: as `__main__`, with its folder first on the path and its arguments in `sys.argv`; its
working directory is the output folder, because the image's own folders are read-only. It is adapted on the way, see the package.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from otj_runtime.compat.hook import after_import
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import FailureNote, RunError, exit_code

TRANSFORMERS = "transformers.trainer"


def prepare(config: PodConfig) -> None:
    """Have the script adapted when it imports what needs it. Nothing of it is imported here: torch alone takes seconds."""

    def attach_reporter(module: ModuleType) -> None:
        from otj_runtime.compat import trl
        from otj_runtime.compat.feed import Feed
        from otj_runtime.compat.report import ScriptReporter, attach

        feed = Feed(config)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        reporter = ScriptReporter(output=Path(config.output), world_size=ranks, extra=lambda: feed.metrics)
        attach(module, reporter)
        trl.load(config, step=lambda: reporter.step, feed=feed)

    after_import(TRANSFORMERS, attach_reporter)


def run_script(command: list[str], directory: Path) -> None:
    """Run `command` (a script or -m and a module, then arguments) in this process, with `directory` as working directory."""
    os.chdir(directory)
    if command[0] == "-m":
        sys.path[0] = str(directory)
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).absolute().parent)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def note_of(error: BaseException, *, rank: int, script: str) -> FailureNote:
    """The failure note: an error of ours with its reason, wherever it was wrapped, or the script's with its place."""
    ours = next((cause for cause in _causes(error) if isinstance(cause, RunError)), None)
    if ours is not None:
        return FailureNote.of(ours, rank=rank)
    frames = traceback.extract_tb(error.__traceback__)
    folder = str(Path(script).absolute().parent)
    own = [frame for frame in frames if frame.filename.startswith(folder)] or frames
    place = f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    note = FailureNote.of(error, rank=rank)
    return note.model_copy(update={"message": (note.message + place)[:3500]})


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def main() -> int:
    """Exit code of the rank."""
    config = PodConfig.from_environment()
    rank = int(os.environ.get("RANK", "0"))
    command = sys.argv[1:]
    prepare(config)
    try:
        run_script(command, Path(config.output))
    except Exception as error:
        traceback.print_exc()
        note = note_of(error, rank=rank, script=command[0])
        note.write(Path(config.run_directory))
        # The other ranks may wait for this one in a collective: leave at once, without tearing the process group down.
        sys.stdout.flush()
        os._exit(exit_code(note.reason))
    _leave_process_group()
    return 0


def _leave_process_group() -> None:
    """Gloo's threads, if the interpreter ends under them, now and then abort a rank that has done all its work."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
