"""What the operator costs and survives, on a real kube-apiserver with etcd: `python -m tests.bench.control_plane [--only ROW] [--json FILE]`.

    burst     1,000 OnlineTrainingJobs at once: from each create's answer to its Job's ADDED
    idle      one at a time: the same, and from a Job's change to the status that follows
    steady    1,000 running jobs whose progress changes each second: CPU, memory, writes
    large     5,000 jobs and 20,000 pods of others: memory, CPU per job at 100, 1,000 and 5,000
    restart   a new process on 1,000 settled jobs: time until all were looked at, writes
    kills     SIGKILL at random moments while jobs come and go: duplicates, losses, orphans, time to converge
    faults    watches cut, calls refused, the API server away, history gone: see `survival`
    leader    two replicas, the leader frozen for a minute: see `survival`

API server, etcd, operator and load share this machine, so each row names the load average that it began with. All rows but the last two,
which must be asked for, take some 20 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, PODS
from tests.bench.churn import Churn
from tests.bench.load import NAMESPACE, Api, Fleet, Launchers, admin, in_parallel, launchers, pod_of, run_object, until, until_async
from tests.bench.operators import Running, Zygote, operator, zygote
from tests.bench.survival import faults, leader
from tests.contract.apiserver import ApiServer, api_server, controllers
from tests.contract.conftest import install
from tests.contract.kubelet import TIME

Object = dict[str, Any]
Row = dict[str, Any]

JOBS_IN_BURST = 1000
SAMPLES_IDLE = 100
FLEET = 1000
STEADY_SECONDS = 60.0
LEVELS = (100, 1000, 5000)
FOREIGN_PODS = 20_000
LIVE_AT_FIRST = 10
STARTS_TIMED = 5
KILLED_WITHIN_STARTS = 2.0
"""Kills fall between the start of the process and this many times the seconds until it has looked at everything."""


async def burst(server: ApiServer, api: Api, _: argparse.Namespace) -> Row:
    """See the module."""
    with operator(server) as process:
        created: dict[str, float] = {}
        jobs: dict[str, float] = {}

        def job_told(kind: str, job: Object) -> None:
            if kind == "ADDED":
                jobs.setdefault(job["metadata"]["name"], time.monotonic())

        async def create(name: str) -> None:
            await api.create(ONLINE_TRAINING_JOBS, run_object(name))
            created[name] = time.monotonic()

        async with api.watching(JOBS, job_told):
            await _warm(api, jobs)
            began = time.monotonic()
            await in_parallel(partial(create, f"burst-{n}") for n in range(JOBS_IN_BURST))
            applied = time.monotonic() - began
            await until("every Job", lambda: created.keys() <= jobs.keys())
            everything = time.monotonic() - began
            said = await _until_quiet(process)
        delays = [max(0.0, jobs[name] - moment) for name, moment in created.items()]
        p50, p99 = percentile(delays, 50), percentile(delays, 99)
        return {
            "jobs": JOBS_IN_BURST,
            "p50_s": p50,
            "p99_s": p99,
            "lost": JOBS_IN_BURST - len(created.keys() & jobs.keys()),
            "applied_in_s": round(applied, 2),
            "all_jobs_after_s": round(everything, 2),
            "all_status_after_s": round(everything + said, 2),
            "operator_cpu_s": round(process.cpu_seconds(), 2),
            "rss_mib": round(process.rss_mib(), 1),
            "errors": await _errors(process),
            "passed": p50 <= 2.0 and p99 <= 5.0,
        }


async def idle(server: ApiServer, api: Api, _: argparse.Namespace) -> Row:
    """See the module."""
    with operator(server) as process:
        jobs: dict[str, float] = {}
        ended: dict[str, float] = {}

        def job_told(kind: str, job: Object) -> None:
            if kind == "ADDED":
                jobs.setdefault(job["metadata"]["name"], time.monotonic())

        def run_told(kind: str, run: Object) -> None:
            if run.get("status", {}).get("state") == "Succeeded":
                ended.setdefault(run["metadata"]["name"], time.monotonic())

        to_job, to_status = [], []
        async with api.watching(JOBS, job_told), api.watching(ONLINE_TRAINING_JOBS, run_told):
            await _warm(api, jobs)
            for name in (f"idle-{n}" for n in range(SAMPLES_IDLE)):
                await api.create(ONLINE_TRAINING_JOBS, run_object(name))
                began = time.monotonic()
                await until(f"the Job of {name}", partial(jobs.__contains__, name))
                to_job.append(max(0.0, jobs[name] - began))
                await asyncio.sleep(0.1)
                await api.set_status(JOBS, name, _complete())
                began = time.monotonic()
                await until(f"the end of {name}", partial(ended.__contains__, name))
                to_status.append(max(0.0, ended[name] - began))
                await asyncio.sleep(0.05)
        return {
            "samples": SAMPLES_IDLE,
            "job_p50_s": percentile(to_job, 50),
            "job_p99_s": percentile(to_job, 99),
            "status_p50_s": percentile(to_status, 50),
            "status_p99_s": percentile(to_status, 99),
            "errors": await _errors(process),
            "passed": percentile(to_job, 99) <= 0.1 and percentile(to_status, 99) <= 0.3,
        }


async def on_a_fleet(wanted: Sequence[str]) -> dict[str, Row]:
    """`steady` and `restart`, or one of them, on one fleet, which takes the longest to make."""
    found: dict[str, Row] = {}
    async with cluster() as (server, api), launchers() as port:
        fleet = Fleet(api, port=port)
        async with fleet.followed():
            with operator(server, name="steady") as process:
                await fleet.grow(FLEET)
                if "steady" in wanted:
                    found["steady"] = await _steady(api, process)
            if "restart" in wanted:
                found["restart"] = await _restart(server, api)
    return found


async def _steady(api: Api, process: Running) -> Row:
    written = 0
    steps: dict[str, int] = {}

    def told(kind: str, run: Object) -> None:
        nonlocal written
        written += 1
        steps[run["metadata"]["name"]] = run["status"].get("progress", {}).get("step", 0)

    await asyncio.sleep(20)
    async with api.watching(ONLINE_TRAINING_JOBS, told):
        began, cpu, answers = time.monotonic(), process.cpu_seconds(), Launchers.answers
        await asyncio.sleep(STEADY_SECONDS)
        seconds = time.monotonic() - began
        used, pulls = process.cpu_seconds() - cpu, Launchers.answers - answers
        now = int(time.monotonic() - Launchers.began)
    behind = [now - step for step in steps.values()]
    share, rss, rate = used / seconds, process.peak_mib(), written / seconds
    return {
        "jobs": FLEET,
        "cpu_share_of_a_core": round(share, 3),
        "rss_peak_mib": round(rss, 1),
        "status_writes_per_s": round(rate, 1),
        "pulls_per_s": round(pulls / seconds, 1),
        "jobs_written": len(steps),
        "behind_p99_s": percentile(behind, 99) if behind else None,
        "passed": share <= 0.4 and rss <= 150 and rate <= 200 and len(steps) == FLEET,
    }


async def _restart(server: ApiServer, api: Api) -> Row:
    # The launchers stand still now, so that a write would be the restart's own.
    written: list[str] = []
    Launchers.frozen_at = int(time.monotonic() - Launchers.began)
    with operator(server, name="steady") as process:
        await until_async("the last news is written", lambda: _pulled(process, FLEET))
        await asyncio.sleep(10)

    def told(kind: str, thing: Object) -> None:
        written.append(f"{thing['kind']} {thing['metadata']['name']}")

    async with api.watching(ONLINE_TRAINING_JOBS, told), api.watching(JOBS, told):
        began = time.monotonic()
        with operator(server, name="steady") as process:
            await until_async("every job was looked at", lambda: _passed(process, FLEET))
            ready = time.monotonic() - began
            await until_async("every launcher was asked", lambda: _pulled(process, FLEET))
            await asyncio.sleep(2)
            found = await process.metrics()
            rss = process.rss_mib()
    # What the watches saw of jobs and Jobs, and what the operator counts itself, events included.
    writes = len(written) + int(_writes(found))
    return {
        "jobs": FLEET,
        "ready_s": round(ready, 2),
        "writes": writes,
        "rss_mib": round(rss, 1),
        "passed": ready <= 10 and writes == 0,
    }


async def large(server: ApiServer, api: Api, _: argparse.Namespace) -> Row:
    """See the module."""
    async with launchers() as port:
        fleet = Fleet(api, port=port)
        stages = []
        async with fleet.followed():
            # Pulls are rare here: their cost is the row `steady`, and does not grow with the jobs.
            with operator(server, name="large", progress_seconds=3600) as process:
                await _until_quiet(process)
                for level in LEVELS:
                    before, cpu, began = fleet.size, process.cpu_seconds(), time.monotonic()
                    await fleet.grow(level)
                    await _until_quiet(process)
                    new = level - before
                    stages.append(
                        {
                            "jobs": level,
                            "cpu_ms_per_new_job": round((process.cpu_seconds() - cpu) * 1000 / new, 2),
                            "rss_mib": round(process.rss_mib(), 1),
                            "seconds": round(time.monotonic() - began, 1),
                        }
                    )
                seen = await _watch_events(process)
                await in_parallel(partial(api.create, PODS, _foreign_pod(n)) for n in range(FOREIGN_PODS))
                await asyncio.sleep(2)
                told = await _watch_events(process) - seen
                rss = process.peak_mib()
        costs = [stage["cpu_ms_per_new_job"] for stage in stages]
        return {
            "jobs": LEVELS[-1],
            "foreign_pods": FOREIGN_PODS,
            "foreign_pods_told_of": int(told),
            "rss_peak_mib": round(rss, 1),
            "stages": stages,
            "cost_ratio": round(max(costs) / min(costs), 2),
            "passed": rss <= 300 and max(costs) / min(costs) <= 1.5,
        }


async def kills(server: ApiServer, api: Api, options: argparse.Namespace) -> Row:
    """See the module."""
    with controllers(server), zygote(server) as starter:
        churn = Churn(api, random.Random(options.seed))
        async with churn.followed():
            came = asyncio.create_task(churn.run())
            await until("there are jobs to look at", lambda: len(churn.live) >= LIVE_AT_FIRST)
            start = statistics.median([await _start_and_kill(starter) for _ in range(STARTS_TIMED)])
            began = time.monotonic()
            await _kill(starter, options.kills, random.Random(options.seed + 1), within=KILLED_WITHIN_STARTS * start)
            killing = time.monotonic() - began
            came.cancel()
            await asyncio.gather(came, return_exceptions=True)
            starter.start()
            try:
                converged: float | None = await until_async("everything converged", churn.converged, seconds=60)
            except AssertionError:
                converged = None
            found = await churn.verdict()
    passed = converged is not None and converged <= 30 and not any((found["duplicates"], found["lost"], found["orphans"], found["failed"]))
    return {
        "kills": options.kills,
        "start_s": round(start, 2),
        "seconds": round(killing, 1),
        "converged_s": None if converged is None else round(converged, 1),
        **found,
        "passed": passed,
    }


async def _start_and_kill(starter: Zygote) -> float:
    """Seconds from the start of an operator until it has looked at what it found."""
    process = starter.start()
    took = await until_async("the operator has looked at what it found", lambda: _passed(process, 1))
    await asyncio.to_thread(starter.kill)
    return took


async def _kill(starter: Zygote, times: int, chance: random.Random, *, within: float) -> None:
    """Start and kill, each moment from the start of the process to well after it has worked off what it found."""
    for _ in range(times):
        starter.start()
        await asyncio.sleep(chance.uniform(0.0, within))
        await asyncio.to_thread(starter.kill)


def _complete() -> Object:
    conditions = [
        {"type": kind, "status": "True", "reason": "CompletionsReached", "message": "", "lastProbeTime": TIME, "lastTransitionTime": TIME}
        for kind in ("SuccessCriteriaMet", "Complete")
    ]
    return {"startTime": TIME, "completionTime": TIME, "succeeded": 1, "active": 0, "ready": 0, "terminating": 0, "conditions": conditions}


def _foreign_pod(number: int) -> Object:
    name = f"foreign-{number}"
    pod = pod_of({"metadata": {"name": name, "uid": name}}, 8081)
    return pod | {"metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": "other"}}}


async def _warm(api: Api, jobs: dict[str, float]) -> None:
    """Wait until the operator leads, watches and has done everything once."""
    for number in range(5):
        await api.create(ONLINE_TRAINING_JOBS, run_object(f"warm-{number}"))
        await until("the operator acts", partial(jobs.__contains__, f"warm-{number}"))
    await asyncio.sleep(5)


async def _until_quiet(process: Running) -> float:
    """Wait until the operator has had nothing to write for a while; returns when that began, in seconds from now."""
    began, busy, before = time.monotonic(), time.monotonic(), -1.0
    while time.monotonic() - busy < 1.5:
        found = await process.metrics()
        writes = _writes(found)
        if found.get("otj_queue_depth", 1.0) or writes != before:
            busy = time.monotonic()
        before = writes
        assert time.monotonic() - began < 300, "the operator does not come to rest"
        await asyncio.sleep(0.25)
    return busy - began


def _writes(metrics: dict[str, float]) -> float:
    """What the operator has written so far, by its own count. The Lease is updated, never patched, and made once."""
    return sum(v for name, v in metrics.items() if name.startswith("otj_api_calls_total") and ('"patch"' in name or '"create"' in name))


async def _passed(process: Running, count: int) -> bool:
    found = await process.metrics()
    return found.get('otj_reconcile_seconds_count{outcome="done"}', 0) >= count and found.get("otj_queue_depth") == 0


async def _pulled(process: Running, count: int) -> bool:
    return (await process.metrics()).get('otj_progress_pulls_total{outcome="answered"}', 0) >= count


async def _watch_events(process: Running) -> float:
    return sum(value for name, value in (await process.metrics()).items() if name.startswith("otj_watch_events_total"))


async def _errors(process: Running) -> int:
    found = await process.metrics()
    return int(sum(value for name, value in found.items() if name.startswith("otj_reconcile_seconds_count") and '"error"' in name))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of `values` do not exceed."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 4)


@asynccontextmanager
async def cluster() -> AsyncIterator[tuple[ApiServer, Api]]:
    """An API server of its own for a row, with install.yaml applied."""
    with tempfile.TemporaryDirectory(prefix="otj-bench-") as folder, api_server(Path(folder)) as server:
        install(server)
        async with admin(server) as api:
            yield server, api


ROWS = ("burst", "idle", "steady", "restart", "large", "kills")
LONGER = ("faults", "leader")


async def measure(options: argparse.Namespace) -> dict[str, Row]:
    """All rows that were asked for, printed as they come."""
    wanted = options.only or ROWS
    results: dict[str, Row] = {}

    async def alone(row: Callable[[ApiServer, Api, argparse.Namespace], Awaitable[Row]], name: str) -> dict[str, Row]:
        async with cluster() as (server, api):
            return {name: await row(server, api, options)}

    single = {"burst": burst, "idle": idle, "large": large, "kills": kills, "faults": faults, "leader": leader}
    for name in (name for name in (*ROWS, *LONGER) if name in wanted):
        if name in results:
            continue
        load = os.getloadavg()[0]
        for row, figures in (await (alone(single[name], name) if name in single else on_a_fleet(wanted))).items():
            results[row] = {"load_average_before": round(load, 2), **figures}
            print(f"{row:8} {'passed' if figures['passed'] else 'FAILED'}  {json.dumps(results[row])}", flush=True)
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=(*ROWS, *LONGER), help=f"a row; may be given several times; default: {', '.join(ROWS)}"
    )
    parser.add_argument("--kills", type=int, default=1000, help="how often the operator is killed; default: 1000")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rows = asyncio.run(measure(options))
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    if options.json:
        options.json.write_text(json.dumps({**rows, "machine": machine, "date": time.strftime("%Y-%m-%d")}, indent=2) + "\n")
    raise SystemExit(0 if all(row["passed"] for row in rows.values()) else 1)


if __name__ == "__main__":
    main()
