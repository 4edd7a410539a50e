"""`otj run`, from the options to the exit code."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from otj_runtime.api import OnlineTrainingJob, Reason
from otj_runtime.local.containers import Container, local_folders, localize, machine_caches, path_map
from otj_runtime.local.devices import found_devices, split
from otj_runtime.local.folder import RunFolder
from otj_runtime.local.follow import Story
from otj_runtime.local.options import RunOptions, read_job
from otj_runtime.local.pod import LocalPod, Outcome
from otj_runtime.local.result import answers_table, build_result, summary
from otj_runtime.local.view import View, make_view
from otj_runtime.pod.config import Layout, PodConfig, resolve
from otj_runtime.pod.errors import FailureNote
from otj_runtime.pod.manifest import build_job
from otj_runtime.pod.names import METRICS_FILE, TRAINER_CONTAINER
from otj_runtime.pod.ports import free_ports
from otj_runtime.pod.processes import become_subreaper, kill_descendants, reap, zombies

REFRESH_SECONDS = 0.25
TAIL_LINES = 25
TAIL_BYTES = 65536

_SELF_EXPLAINING = (Reason.TERMINATED, Reason.TRAINER_CRASHED)
"""Reasons whose log says nothing that their message does not; a crash's message holds its last lines."""


@dataclass(frozen=True)
class Plan:
    """What is started: the pod's containers as local ones."""

    config: PodConfig
    containers: dict[str, Container]
    empty_volumes: dict[str, Path]
    """Folders that were made for volumes because nothing else was given, and hold nothing."""


def make_plan(job: OnlineTrainingJob, options: RunOptions, folder: RunFolder) -> Plan:
    """The containers of `job` as processes in `folder`.

    Raises:
        UsageError: if the job needs what this machine has not.
    """
    layout = local_layout(folder)
    output = str(folder.output)
    config = resolve(job, layout, output=output)
    devices = split(config, found_devices())
    folders = local_folders(job.spec.volumes, given=options.volumes, home=folder.volumes)
    paths = {job.spec.output.path.rstrip("/"): output} | path_map(job.spec.volume_mounts, folders)
    pod = build_job(job, default_image="local", layout=layout, output=output)["spec"]["template"]["spec"]
    asked = {variable.name for variable in job.spec.env}
    caches = {name: value for name, value in machine_caches(os.environ, home=Path.home()).items() if name not in asked}
    containers = {
        piece["name"]: localize(piece, paths=paths, given_env=options.env, extra_env=caches | devices.get(piece["name"], {}))
        for piece in [*pod["initContainers"], *pod["containers"]]
    }
    for path in folders.values():
        if path.is_relative_to(folder.volumes):
            path.mkdir(parents=True, exist_ok=True)
    empty = {name: path for name, path in folders.items() if path.is_relative_to(folder.volumes) and not any(path.iterdir())}
    return Plan(config, containers, empty)


def local_layout(folder: RunFolder) -> Layout:
    """The pod's places in `folder`, with ports that are free at the moment."""
    generator, progress, rendezvous = free_ports(3)
    return Layout(
        shared_memory=str(folder.shared_memory),
        scratch=str(folder.scratch),
        generator_port=generator,
        progress_port=progress,
        rendezvous_port=rendezvous,
        progress_host="127.0.0.1",
        termination_log=str(folder.termination),
    )


def run(options: RunOptions) -> int:
    """Run the job to its end; the exit code of the trainer.

    Raises:
        InvalidJobError, UsageError: if nothing could be started.
    """
    job = read_job(options.job_file, options.overrides)
    folder = RunFolder(options.run_dir or Path("runs") / job.metadata.name)
    console = Console()
    with folder.held(job, clean=options.clean):
        plan = make_plan(job, options, folder)
        for name, path in plan.empty_volumes.items():
            console.print(f"volume {name} is the empty folder {path}; --volume {name}=DIR gives another", highlight=False, soft_wrap=True)
        become_subreaper()
        try:
            return asyncio.run(_run(job, plan, options, folder, console))
        finally:
            kill_descendants()
            reap(zombies())


async def _run(job: OnlineTrainingJob, plan: Plan, options: RunOptions, folder: RunFolder, console: Console) -> int:
    began, clock = time.time(), time.monotonic()
    pod = LocalPod(plan.containers, folder, plan.config.generator_url)
    story = Story(folder.output / METRICS_FILE, began=began)
    title = f"{job.metadata.name}: {job.spec.algorithm} on {plan.config.training_ranks} + {plan.config.generator_gpus} {plan.config.device}"
    with make_view(console, pod, story, title=title) as view:
        view.say(f"{title}; run folder {folder.root}")
        _listen_for_signals(pod, view)
        _keep_deadline(job, pod)
        outcome = await _watch(pod, story, view)
    result = build_result(story, outcome, wall_s=time.monotonic() - clock, generator_version=pod.generator_version)
    report(result, outcome, story, folder, console)
    if options.result is not None:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(result, indent=2) + "\n")
    return outcome.code


def _listen_for_signals(pod: LocalPod, view: View) -> None:
    def stop(number: signal.Signals) -> None:
        view.say(f"{number.name}: saving a checkpoint and stopping; once more ends it at once")
        pod.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)


def _keep_deadline(job: OnlineTrainingJob, pod: LocalPod) -> None:
    """activeDeadlineSeconds, which in a cluster the Job controller keeps."""
    seconds = job.spec.active_deadline_seconds
    if seconds is not None:
        note = FailureNote(reason=Reason.DEADLINE_EXCEEDED, message=f"activeDeadlineSeconds, {seconds} s, passed")
        asyncio.get_running_loop().call_later(seconds, pod.stop_for, note, TRAINER_CONTAINER)


async def _watch(pod: LocalPod, story: Story, view: View) -> Outcome:
    """Show the run until it ends."""
    end = asyncio.create_task(pod.run())
    while not end.done():
        await asyncio.wait({end}, timeout=REFRESH_SECONDS)
        view.update(story.refresh())
    view.update(story.refresh())
    return await end


def report(result: dict[str, Any], outcome: Outcome, story: Story, folder: RunFolder, console: Console) -> None:
    """Print how the run ended: on success what it came to, on failure also why, what to do, and the guilty container's last lines."""
    heldout = story.heldout
    if len(heldout) > 1:
        console.print(answers_table(heldout[0], heldout[-1]))
    if story.steps:
        console.print(summary(result), markup=False, highlight=False, soft_wrap=True)
    if outcome.note is None:
        console.print(f"finished; everything is in {folder.output}", markup=False, highlight=False, soft_wrap=True)
        return
    log = folder.log(outcome.container)
    if outcome.note.reason not in _SELF_EXPLAINING:
        console.print(f"--- last lines of {log}", *tail(log), "---", sep="\n", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{outcome.note.reason}: {outcome.note.message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{outcome.note.reason.advice} Logs: {folder.logs}", markup=False, highlight=False, soft_wrap=True)


def tail(path: Path) -> list[str]:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except FileNotFoundError:
        return []
