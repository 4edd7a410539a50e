"""The launcher: starts the ranks, waits with deadlines, and ends with one cause.

Everything that may end the run is a guard: a coroutine that returns or raises RunError. The first guard that raises, or the end
of the ranks, decides; then the ranks are stopped (gently if there is something to save), and `verdict.decide` names the cause.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from otj_runtime.data.model import check_folder
from otj_runtime.launch import accelerate, preflight, server, verdict
from otj_runtime.launch.board import Board
from otj_runtime.launch.generator import GeneratorWatch
from otj_runtime.launch.ranks import Ranks
from otj_runtime.launch.resumption import judge_failure, newest_saved, watch_checkpoints
from otj_runtime.launch.watchdog import Patience, overdue, stalled
from otj_runtime.pod.commands import script_arguments
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import ExitCode, FailureNote, RunError, Stalled, Terminated, WorldSizeMismatch, exit_code
from otj_runtime.pod.precision import mixed_precision
from otj_runtime.pod.processes import become_subreaper
from otj_runtime.pod.startup import StartUp
from otj_runtime.pod.transfer import Transfer, choose

TRAIN_MODULE = "otj_runtime.train"
SCRIPT_MODULE = "otj_runtime.compat"
WATCH_SECONDS = 0.5


class Launcher:
    """One run of the trainer container.

    Args:
        config: the pod's configuration.
        module: what each rank runs, as `python -m`. Default: the built-in trainer, or what runs the user's own script.
        patience: deadlines.
    """

    def __init__(self, config: PodConfig, *, module: str | None = None, patience: Patience = Patience()) -> None:
        self._config = config
        self._module = module or (SCRIPT_MODULE if config.script else TRAIN_MODULE)
        self._patience = patience
        self._directory = Path(config.run_directory)
        self._board = Board(choose(config))
        self._startup = StartUp.of(config)
        self._generator = GeneratorWatch(
            config.generator_url,
            self._board,
            ready_timeout=config.generator_ready_timeout_seconds,
            lost_after=patience.generator_lost,
        )
        self._stop_signal: asyncio.Future[int] | None = None

    async def run(self) -> ExitCode:
        """Run to the end; the code to exit with. The termination message holds the last progress and, unless all went well, the cause."""
        try:
            note = await self._run()
        except RunError as error:
            note = FailureNote.of(error)
        self._board.ended = True
        output, termination_log = Path(self._config.output), Path(self._config.termination_log)
        self._board.checkpoint = newest_saved(output)  # with what was saved on the way out
        report = self._board.report()
        if note is not None:
            note = judge_failure(note, output=output, job=self._config.uid, step=self._board.step)
            return conclude(note.model_copy(update={"progress": report.progress}), termination_log)
        # Without the metrics it is short enough for a termination message.
        leave(json.dumps(report.model_copy(update={"metrics": {}}).to_wire()), termination_log)
        return ExitCode.SUCCESS

    async def _run(self) -> FailureNote | None:
        become_subreaper()
        self._listen_for_signals()
        check_folder(Path(self._config.model_path))
        _make_empty(self._directory)
        app = server.build_app(self._board, server.write_token(self._directory))
        runner = await server.serve(app, host=self._config.progress_host, port=self._config.progress_port)
        try:
            return await self._train(await self._start_ranks())
        finally:
            await runner.cleanup()

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        self._stop_signal = stop = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _set_once, stop, number)

    async def _start_ranks(self) -> Ranks:
        keys = accelerate.settings(self._config)
        if (asked := self._config.accelerate.mixed_precision) != mixed_precision(self._config):
            print(f"accelerate.mixedPrecision: this CPU does not compute in {asked}, the ranks train in float32", flush=True)
        threads = accelerate.threads_per_rank(
            cores=accelerate.usable_cores(), ranks=self._config.training_ranks, asked=os.environ.get("OMP_NUM_THREADS")
        )
        config_file = accelerate.write_settings(keys, self._directory)
        script = script_arguments(self._config.script, os.environ)
        command = accelerate.command(keys, config_file=config_file, threads=threads, module=self._module, arguments=script)
        return await Ranks.start(command, accelerate.environment(keys, threads=threads))

    async def _train(self, ranks: Ranks) -> FailureNote | None:
        """Wait for the end, bring it about if a guard says so, and name the cause."""
        end = asyncio.create_task(ranks.wait())
        note, asked_to_stop = None, False
        try:
            failure = await _first_failure(
                end,
                [
                    self._generator.run(),
                    self._watch_progress(started=time.monotonic()),
                    watch_checkpoints(Path(self._config.output), self._board),
                    preflight.check_inputs(self._config),
                    self._obey_signals(),
                ],
            )
            if failure is not None:
                note, asked_to_stop = FailureNote.of(failure), isinstance(failure, Terminated)
                await self._stop(ranks, end, gently=asked_to_stop)
        finally:
            await ranks.end()
        return verdict.decide(
            status=await end,
            rank_note=FailureNote.first(self._directory),
            own_note=note,
            asked_to_stop=asked_to_stop,
            tail=ranks.tail.lines(),
        )

    async def _stop(self, ranks: Ranks, end: asyncio.Task[int], *, gently: bool) -> None:
        ranks.ask_to_stop()
        saving = gently and bool(self._board.step)
        await asyncio.wait({end}, timeout=self._patience.save if saving else self._patience.leave)

    async def _watch_progress(self, *, started: float) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self._note_startup()
            self._board.transfer = Transfer.read(self._directory) or self._board.transfer
            found = self._board.world_size
            if found is not None and found != self._config.training_ranks:
                raise WorldSizeMismatch(
                    f"the trainer reports {found} ranks, gpus - generation.gpus is {self._config.training_ranks}: check spec.accelerate.config"
                )
            self._board.overdue = overdue(self._board, self._patience, now=time.monotonic(), wall=datetime.now(UTC))
            if self._generator.ready_at is None:
                continue  # that wait has its own deadline
            since = max(started, self._generator.ready_at)
            if message := stalled(self._board, self._patience, started=since, now=time.monotonic()):
                raise Stalled(message)

    def _note_startup(self) -> None:
        board = self._board
        stepped = bool(board.step)
        reached = {"generator": self._generator.ready_at is not None, "trainer": board.last_update is not None, "first_step": stepped}
        if self._startup.look(**reached):
            board.startup = dict(self._startup.seconds)
            if stepped:
                print(f"launcher: seconds from the pod's start: {self._startup.describe()}", flush=True)

    async def _obey_signals(self) -> None:
        assert self._stop_signal is not None
        number = await self._stop_signal
        raise Terminated(f"told to stop by {signal.Signals(number).name} after step {self._board.step or 0}")


async def _first_failure(end: asyncio.Task[int], guards: list[Coroutine[Any, Any, None]]) -> RunError | None:
    """The first error of a guard; None if the ranks ended before any."""
    waiting: set[asyncio.Task[Any]] = {end, *(asyncio.create_task(guard) for guard in guards)}
    try:
        while not end.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for guard in done - {end}:
                if isinstance(error := guard.exception(), RunError):
                    return error
                if error is not None:
                    raise error
        return None
    finally:
        guards_left = waiting - {end}
        for guard in guards_left:
            guard.cancel()
        await asyncio.gather(*guards_left, return_exceptions=True)


def _set_once(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)


def conclude(note: FailureNote, termination_log: Path) -> ExitCode:
    """Tell the cause where Kubernetes and people look for it; its exit code."""
    print(f"launcher: {note.reason}: {note.message}\nlauncher: {note.reason.advice}", file=sys.stderr, flush=True)
    leave(verdict.termination_message(note), termination_log)
    return exit_code(note.reason)


def leave(message: str, termination_log: Path) -> None:
    """Write the termination message; that it cannot be written changes nothing about the end."""
    try:
        termination_log.write_text(message)
    except OSError as error:
        print(f"launcher: cannot write {termination_log}: {error}", file=sys.stderr, flush=True)


def _make_empty(directory: Path) -> None:
    """Remove what an earlier run left in `directory`: its failure notes would be taken for ours."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
