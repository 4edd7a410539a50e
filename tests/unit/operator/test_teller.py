"""Events are posted beside the path of jobs, tried again while the API server is busy, and never posted twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kubernetes.aio import client

from otj_operator.controller import teller
from otj_operator.controller.teller import Teller
from otj_operator.kube import ApiError, Cluster
from otj_operator.metrics import Metrics
from otj_operator.plan.events import Event
from tests.unit.operator.objects import parent
from tests.unit.operator.virtual_time import run_virtually

EVENT = Event(type="Normal", reason="Training", message="Steps are made.", time="2026-01-01T12:00:00Z")


class Posted(Cluster):
    """Answers with the statuses it was given, one after the other; 201 after them."""

    def __init__(self, *answers: int) -> None:
        super().__init__(client.Configuration(host="http://127.0.0.1:1"))
        self.answers, self.bodies = list(answers), list[Any]()

    async def create(self, resource: Any, body: Any) -> Any:
        self.bodies.append(body)
        status = self.answers.pop(0) if self.answers else 201
        if status >= 300 or status == 0:
            raise ApiError("POST", status=status, reason="x", message="y", retry_after=7.0 if status == 429 else 0.0)
        return body


@pytest.mark.parametrize(("answers", "posts"), [((), 1), ((409,), 1), ((403,), 1), ((429,), 2), ((500, 0), 3), ((500, 500, 500), 3)])
def test_an_event_is_posted_again_only_if_the_api_server_could_not_take_it(answers: tuple[int, ...], posts: int) -> None:
    cluster = Posted(*answers)

    async def scenario() -> None:
        made = Teller(cluster, Metrics())
        made.tell(parent(), EVENT)
        worker = asyncio.create_task(made.work())
        await made.drained()
        worker.cancel()

    run_virtually(scenario())
    assert len(cluster.bodies) == posts
    assert len({body["metadata"]["name"] for body in cluster.bodies}) == 1


def test_events_that_do_not_fit_are_counted_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teller, "CAPACITY", 2)

    async def scenario() -> None:
        metrics = Metrics()
        made = Teller(Posted(), metrics)
        for _ in range(5):
            made.tell(parent(), EVENT)
        assert b"otj_events_dropped_total 3.0" in metrics.text()

    run_virtually(scenario())
