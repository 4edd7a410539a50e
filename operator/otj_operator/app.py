"""kopf, for what it is good at: connecting, watching, reconnecting, shutting down.

Only `on.event` handlers, which write nothing to objects: no annotations, no finalizers, no state of kopf's own. A handler hands the
object to the controller and returns, for kopf runs them one after the other for each object, and forgets one that fails.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import kopf

from otj_operator.controller import Controller
from otj_operator.controller.controller import OWN
from otj_operator.kopf_storage import NoDiffBase, NoProgress
from otj_operator.kube import PAGE, load_configuration
from otj_operator.kube.session import Called, open_session
from otj_runtime.api import GROUP, PLURAL, VERSION
from otj_runtime.pod import names


async def watch(controller: Controller, *, namespaces: Sequence[str], called: Called) -> None:
    """Feed `controller` from watches until the process is told to end by SIGTERM or SIGINT. No `namespaces`: all of them."""
    where: dict[str, Any] = {"namespaces": list(namespaces)} if namespaces else {"clusterwide": True}
    await kopf.operator(registry=build_registry(controller, called), settings=build_settings(), standalone=True, **where)


def build_registry(controller: Controller, called: Called) -> kopf.OperatorRegistry:
    """The handlers: three watches and the login."""
    registry = kopf.OperatorRegistry()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def parent_event(event: kopf.RawEvent, **_: Any) -> None:
        controller.parent_changed(dict(event["object"]), deleted=event["type"] == "DELETED")

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def job_event(event: kopf.RawEvent, **_: Any) -> None:
        controller.job_changed(dict(event["object"]), deleted=event["type"] == "DELETED")

    @kopf.on.event("", "v1", "pods", registry=registry)
    async def pod_event(event: kopf.RawEvent, **_: Any) -> None:
        controller.pod_changed(dict(event["object"]), deleted=event["type"] == "DELETED")

    if controller.workloads is not None:
        kueue = controller.workloads

        @kopf.on.event(kueue.group, kueue.version, kueue.plural, registry=registry)
        async def workload_event(event: kopf.RawEvent, **_: Any) -> None:
            controller.workload_changed(dict(event["object"]), deleted=event["type"] == "DELETED")

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        # One of kopf's own: it closes the session when a token is refused, and logs in again. A watch is a connection of its own.
        configuration = await load_configuration()
        session = open_session(configuration, connections=0, called=called, lists=controller.watch_begins)
        return kopf.AiohttpSession(server=configuration.host, aiohttp_session=session)

    return registry


def build_settings() -> kopf.OperatorSettings:
    """Settings that differ from kopf's defaults, each for a reason."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # events are ours: few, and told once
    settings.peering.standalone = True  # a peering that somebody made would silently pause us; the Lease decides
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.persistence.progress_storage = NoProgress()
    settings.scanning.disabled = True  # no watching of CRDs and namespaces: fewer rights
    # Ended by the server, by us, and never later: connections that died without a word are found.
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 30
    settings.watching.reconnect_backoff = 0.5
    settings.watching.chunk_size = PAGE
    settings.watching.label_selectors["batch", "v1", "jobs"] = OWN
    settings.watching.label_selectors["", "v1", "pods"] = f"{OWN},{names.JOB_LABEL}"
    settings.networking.request_timeout = 30
    # After the last one kopf gives up and the process ends: five minutes of a silent API server are no reason yet.
    settings.networking.error_backoffs = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 60, 60, 60]
    # Until then kopf holds an object's last event, whole. Not 0, which would never let it take the first.
    settings.queueing.idle_timeout = 0.2
    settings.execution.default_backoff = 5
    # At INFO kopf writes a line for every event of every object.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    return settings
