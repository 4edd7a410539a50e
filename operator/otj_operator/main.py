"""The operator's process: settings, the check of the CRD, leadership, and everything that runs while it leads.

    start --> health port --> the CRD it needs? --> Lease --> listing --> workers + watches + renewal
                                                                          first of them to end ends the process

A lost Lease ends the process at once: whatever it still had in its hands belongs to somebody else now.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from otj_operator import app, logs
from otj_operator.controller import Controller, Settings
from otj_operator.crd.definition import NAME as CRD_NAME
from otj_operator.crd.definition import object_schema
from otj_operator.crd.needs import fault
from otj_operator.health import health_server
from otj_operator.kube import CUSTOM_RESOURCE_DEFINITIONS, LEASE_SECONDS, ApiError, Cluster, FencedError, Leadership, load_configuration
from otj_operator.metrics import Metrics
from otj_runtime.api import VERSION

logger = logging.getLogger("otj_operator")

LEASE_NAME = "online-training-operator"
LOST_LEASE = 3
"""Exit status of a process that lost its Lease."""
PATIENCE_SECONDS = 180.0
"""An API server that does not answer is waited for so long at the start."""
FAREWELL_SECONDS = 3.0
"""At a stop, events that wait are posted for so long."""

T = TypeVar("T")

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the operator until it is told to stop."""
    options = _parser().parse_args(arguments)
    logs.configure(json_lines=options.log_format == "json", verbose=options.verbose)
    settings = Settings(
        runtime_image=options.runtime_image,
        namespace=options.namespace or _own_namespace(),
        identity=options.identity,
        namespaces=tuple(name for name in options.namespaces.split(",") if name),
        listen_port=options.port,
        lease_seconds=options.lease_seconds,
        workers=options.workers,
        resync_seconds=options.resync_seconds,
        progress_seconds=options.progress_seconds,
    )
    try:
        asyncio.run(run(settings))
    except ApiError as error:
        logger.error("the API server does not answer as it must: %s", error)
        raise SystemExit(1) from error


async def run(settings: Settings) -> None:
    """Wait for leadership, lead, and let go of it at the end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics()
    # The Lease has connections of its own: a burst of jobs must not delay its renewal. It is also not fenced by itself.
    async with (
        Cluster(await load_configuration(), called=metrics.called) as cluster,
        Cluster(await load_configuration(), called=metrics.called) as lease_cluster,
    ):
        controller = Controller(cluster, settings, metrics)
        leadership = Leadership(
            lease_cluster, namespace=settings.namespace, name=LEASE_NAME, identity=settings.identity, duration=settings.lease_seconds
        )

        def troubles() -> list[str]:
            return controller.troubles() if leadership.valid() else []

        async with health_server(settings.listen_port, troubles=troubles, metrics=metrics):
            if await _first(stop.wait(), _prepare(cluster, leadership)) == 0:
                return
            cluster.may_write = leadership.valid
            try:
                await _lead(controller, leadership, stop, metrics)
            finally:
                await leadership.release()


async def check_crd(cluster: Cluster) -> None:
    """End the process with a sentence if the cluster's OnlineTrainingJob is not the one that this operator knows."""
    crd = await cluster.get(CUSTOM_RESOURCE_DEFINITIONS, name=CRD_NAME)
    sentence = fault(crd, name=CRD_NAME, version=VERSION, needed=object_schema())
    if sentence:
        raise SystemExit(sentence)


async def patiently(what: str, ask: Callable[[], Awaitable[T]], *, seconds: float = PATIENCE_SECONDS, first_pause: float = 0.5) -> T:
    """The answer of `ask`, which is asked again, ever later, while the API server cannot answer.

    A process that ended instead would be started again ever later by the kubelet, up to five minutes after the API server is back.

    Raises:
        ApiError: the last one, after `seconds`; at once if it is none that time heals.
    """
    deadline, pause = time.monotonic() + seconds, first_pause
    while True:
        try:
            return await ask()
        except ApiError as error:
            passing = error.status in (0, 409, 429) or error.status >= 500
            if not passing or time.monotonic() > deadline:
                raise
            wait = max(error.retry_after, pause * random.uniform(0.5, 1.0))
            logger.warning("%s: asked again in %.1f s: %s", what, wait, error)
            await asyncio.sleep(wait)
            pause = min(2 * pause, 8.0)


async def _prepare(cluster: Cluster, leadership: Leadership) -> None:
    await patiently("reading the CRD", lambda: check_crd(cluster))
    await leadership.acquire()


async def _lead(controller: Controller, leadership: Leadership, stop: asyncio.Event, metrics: Metrics) -> None:
    """Until told to stop; an error of any part ends all of them."""
    renewal = asyncio.ensure_future(_keep_or_end(leadership))
    try:
        await patiently("listing", controller.listed)
        # kopf takes over the signals once it runs: that its watches end without an error means that the process was told to stop. It
        # comes last, because at its end it waits five seconds for every task that began after it.
        await _first(stop.wait(), controller.run(), _watched(controller, metrics))
    except* FencedError:
        end_without_lease()
    finally:
        renewal.cancel()
    logger.info("stopped")


async def _watched(controller: Controller, metrics: Metrics) -> None:
    await app.watch(controller, namespaces=controller.namespaces, called=metrics.called)
    with suppress(TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            await controller.drained()


async def _keep_or_end(leadership: Leadership) -> None:
    await leadership.keep()
    end_without_lease()


def end_without_lease() -> NoReturn:
    """End at once and without clean-up: another process leads, and nothing may be written any more."""
    logging.shutdown()
    os._exit(LOST_LEASE)


async def _first(*works: Coroutine[Any, Any, Any]) -> int:
    """Run `works` until one ends, end the others, and return its place. An error of any is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
    return next(place for place, task in enumerate(tasks) if task in done)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="otj_operator", description="Runs OnlineTrainingJobs.")
    parser.add_argument("--runtime-image", default=os.environ.get("OTJ_RUNTIME_IMAGE"), required="OTJ_RUNTIME_IMAGE" not in os.environ)
    parser.add_argument("--namespace", default=os.environ.get("POD_NAMESPACE"), help="where the Lease is kept; default: the pod's own")
    parser.add_argument(
        "--namespaces", default=os.environ.get("OTJ_NAMESPACES", ""), help="where jobs are looked for, with commas; default: everywhere"
    )
    parser.add_argument("--identity", default=os.environ.get("POD_NAME", socket.gethostname()), help="holder name in the Lease")
    parser.add_argument("--port", type=int, default=8080, help="port of /healthz, /readyz and /metrics; default: 8080")
    parser.add_argument(
        "--lease-seconds",
        type=float,
        default=LEASE_SECONDS,
        help="a leader that has not renewed its Lease for two thirds of it ends, after all of it a standby takes over; default: 15",
    )
    parser.add_argument("--workers", type=int, default=48, help="jobs reconciled at the same time; default: 48")
    parser.add_argument("--resync-seconds", type=float, default=300.0, help="time between full listings; default: 300")
    parser.add_argument("--progress-seconds", type=float, default=5.0, help="time between two pulls of progress; default: 5")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    parser.add_argument("--verbose", action="store_true", help="also log at level debug")
    return parser


def _own_namespace() -> str:
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else "online-training-system"
