"""The controller as its process sees it: whether it is in touch with the cluster, and what it counts of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from kubernetes.aio import client

from otj_operator.controller import Controller, Settings
from otj_operator.kube import ONLINE_TRAINING_JOBS, Cluster, Resource
from otj_operator.metrics import Metrics
from tests.unit.api.specs import changed

Object = dict[str, Any]
T = TypeVar("T")


class _Listed(Cluster):
    """A cluster that holds OnlineTrainingJobs and nothing else."""

    def __init__(self, count: int) -> None:
        super().__init__(client.Configuration(host="http://127.0.0.1:1"))
        self.runs = [_run(f"run-{number}", version=10 + number) for number in range(count)]

    async def preferred_version(self, group: str) -> str | None:
        return None

    async def list(self, resource: Resource, read: Callable[[Object], T], **_: Any) -> tuple[list[T], str]:
        return [read(run) for run in self.runs] if resource == ONLINE_TRAINING_JOBS else [], "99"


def _run(name: str, *, version: int) -> Object:
    document = changed({}, name=name)
    document["metadata"] |= {"uid": f"uid-{name}", "resourceVersion": str(version), "creationTimestamp": "2026-01-01T12:00:00Z"}
    return document


async def test_a_watch_that_does_not_tell_what_a_listing_found_is_a_trouble_until_it_does() -> None:
    cluster = _Listed(1)
    controller = Controller(cluster, Settings(runtime_image="x", stall_seconds=0.0), Metrics())
    await controller.listed()
    assert controller.troubles() == ["the watch of onlinetrainingjobs has stalled"]
    controller.parent_changed(cluster.runs[0], deleted=False)
    assert controller.troubles() == []


@pytest.mark.parametrize(("resync_seconds", "troubles"), [(300.0, []), (0.0, ["the listings fail"])])
async def test_listings_that_do_not_come_are_a_trouble(resync_seconds: float, troubles: list[str]) -> None:
    controller = Controller(_Listed(0), Settings(runtime_image="x", resync_seconds=resync_seconds), Metrics())
    await controller.listed()
    assert controller.troubles() == troubles


async def test_many_jobs_are_as_many_series_as_one() -> None:
    async def told(count: int) -> str:
        metrics = Metrics()
        await Controller(_Listed(count), Settings(runtime_image="x"), metrics).listed()
        return metrics.text().decode()

    one, many = await told(1), await told(50)
    assert 'otj_jobs{algorithm="GRPO",phase="New",reason=""} 50.0' in many
    assert len(many.splitlines()) == len(one.splitlines())
    assert "run-7" not in many
