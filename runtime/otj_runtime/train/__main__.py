"""One training rank: `accelerate launch` starts as many of these as there are training accelerators.

What goes wrong is left as a failure note in the run directory, because the launcher above sees only that a rank ended.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import FailureNote, RunError, Terminated, exit_code
from otj_runtime.train.assemble import Run, build_run
from otj_runtime.train.checkpoints import newest_checkpoint
from otj_runtime.train.export import save_merged
from otj_runtime.train.heldout import answer_held_out
from otj_runtime.train.saving import EXPORT


def train(config: PodConfig, run: Run) -> None:
    """Train from the newest complete checkpoint to the end and save the model.

    Raises:
        Terminated: if SIGTERM ended the run early; a checkpoint was saved.
    """
    trainer = run.trainer
    checkpoint = newest_checkpoint(Path(config.output))
    if checkpoint is None:
        if trainer.accelerator.is_main_process:
            trainer.reporter.forget_after(-1)
        _answer(run)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stop.stopped:
        saved = "a checkpoint was saved" if trainer.state.global_step else "there was nothing to save yet"
        raise Terminated(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; {saved}")
    _answer(run)
    if config.lora is not None and config.lora.export == "merged":
        save_merged(trainer, Path(config.output) / EXPORT)
    else:
        trainer.save_model(str(Path(config.output) / EXPORT))


def _answer(run: Run) -> None:
    """Bring the policy into the generator and answer the held-out prompts, on rank 0 while the others wait."""
    if not run.held_out:
        return
    trainer = run.trainer
    trainer.push_weights()
    if trainer.accelerator.is_main_process:
        version = trainer.state.global_step
        result = answer_held_out(trainer.rollouts, run.held_out, max_tokens=trainer.config.max_completion_length, policy_version=version)
        trainer.reporter.held_out(trainer.state, result)
    trainer.accelerator.wait_for_everyone()


def main() -> int:
    """Exit code of the rank, by the reason of its failure."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # a log is no terminal
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    rank = int(os.environ.get("RANK", "0"))
    config = PodConfig.from_environment()
    try:
        run = build_run(config)
        with run.trainer.stop.listening():  # before the first step and after the last one, too
            train(config, run)
        # Gloo's threads, if the interpreter ends under them, now and then abort a rank that has done all its work.
        run.trainer.accelerator.end_training()
    except Exception as error:
        if not isinstance(error, RunError):
            traceback.print_exc()
        note = FailureNote.of(error, rank=rank)
        note.write(Path(config.run_directory))
        print(f"rank {rank}: {note.reason}: {note.message}", file=sys.stderr, flush=True)
        # The other ranks may wait for this one in a collective: leave at once, without tearing the process group down.
        os._exit(exit_code(note.reason))
    return 0


if __name__ == "__main__":
    sys.exit(main())
