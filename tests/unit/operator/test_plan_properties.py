"""What holds for every history: a small world of one job, in which Kubernetes, users and bad luck act in any order.

The world keeps the truth (the Job, its pods, the stored status); the operator sees it through a cache that may lag, and may crash
between two writes. After every pass the status must be consistent with the truth and with the status before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from otj_operator.plan import Ask, Create, JobView, Look, Observed, PodView, Report, Settle, plan
from otj_operator.plan.draft import finished
from otj_operator.plan.planner import taken
from otj_runtime.api import Reason
from tests.unit.operator.objects import IMAGE, at, ended, job, parent, pod, report, running, told, training_pod

Object = dict[str, Any]

STATES = {
    *("Pending", "Queued", "Suspending", "Suspended", "Starting", "Running", "Ending", "Retrying", "Deleting", "Succeeded", "Failed"),
}


def conditions(status: Object) -> dict[str, Object]:
    return {c["type"]: c for c in status.get("conditions", [])}


def is_ours(found: JobView) -> bool:
    return found.owner is not None and found.owner.uid == "parent-1"


class World(RuleBasedStateMachine):
    """One OnlineTrainingJob, everything that can happen to it, and what must hold all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.status: Object = {}
        self.generation = 1
        self.job: JobView | None = None
        self.pods: dict[str, PodView] = {}
        self.report: Report | None = None
        self.jobs_created = 0
        self.jobs_created_when_told: int | None = None
        self.written_at: float | None = None

    # --- what others do -----------------------------------------------------------------------------------------------------

    @initialize(foreign=st.booleans())
    def begin(self, foreign: bool) -> None:
        if foreign:
            self.job = job(owner="cron-1", owner_kind="CronJob", uid="foreign")

    @rule(seconds=st.sampled_from([0.5, 3.0, 60.0, 5000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def somebody_edits_the_object(self) -> None:
        self.generation += 1

    @precondition(lambda self: self.own_job_runs())
    @rule(phase=st.sampled_from(["Pending", "Running"]))
    def the_job_controller_makes_a_pod(self, phase: str) -> None:
        if any(p.live for p in self.pods.values()):
            return
        name = f"run-{len(self.pods) + 1}"
        created = f"2026-01-02T00:00:{len(self.pods):02}Z"
        made = training_pod(name=name, created=created) if phase == "Running" else pod(name=name, created=created, phase=phase)
        self.pods[name] = made
        self.job = job(active=1, failed=len(self.pods) - 1)

    @precondition(lambda self: any(p.live for p in self.pods.values()))
    @rule(change=st.sampled_from(["runs", "generator restarts", "drained", "crashes", "user error", "done"]))
    def the_pod_changes(self, change: str) -> None:
        name = next(name for name, p in self.pods.items() if p.live)
        created = self.pods[name].created
        new: dict[str, PodView] = {
            "runs": training_pod(name=name, created=created),
            "generator restarts": training_pod(name=name, created=created, generator=running() | {"restartCount": 1}),
            "drained": training_pod(name=name, created=created, deleting=True),
            "crashes": training_pod(name=name, created=created, phase="Failed", trainer=ended(83)),
            "user error": training_pod(name=name, created=created, phase="Failed", trainer=ended(66)),
            "done": training_pod(name=name, created=created, phase="Succeeded", trainer=ended(0)),
        }
        self.pods[name] = new[change]

    @precondition(lambda self: self.pods)
    @rule(step=st.integers(0, 150), which=st.integers(0, 9))
    def a_launcher_reports(self, step: int, which: int) -> None:
        self.report = report(step, pod_name=list(self.pods)[which % len(self.pods)])

    @precondition(lambda self: self.own_job_runs())
    @rule(suspend=st.booleans())
    def a_queue_suspends_or_resumes(self, suspend: bool) -> None:
        self.job = job(suspend=suspend)

    @precondition(lambda self: self.own_job_runs() and not any(p.live for p in self.pods.values()))
    @rule(end=st.sampled_from([("Complete", "CompletionsReached"), ("Failed", "BackoffLimitExceeded"), ("Failed", "DeadlineExceeded")]))
    def the_job_controller_ends_the_job(self, end: tuple[str, str]) -> None:
        self.job = job(end=end)

    @precondition(lambda self: self.job is not None)
    @rule()
    def somebody_deletes_the_job(self) -> None:
        self.job = None

    @rule(name=st.sampled_from(["run-1", "run-2", "run-3"]))
    def a_pod_object_is_removed(self, name: str) -> None:
        self.pods.pop(name, None)

    # --- what the operator does ---------------------------------------------------------------------------------------------

    @rule(lagging=st.booleans(), crash=st.booleans())
    def the_operator_passes(self, lagging: bool, crash: bool) -> None:
        """One pass; with `lagging` the cache has not heard of the Job, with `crash` the process dies before the status is written."""
        seen = self.observe(job_seen=None if lagging else self.job)
        for _ in range(3):
            step = plan(seen, now=at(self.now), image=IMAGE)
            match step:
                case Look():
                    assert conditions(self.status)["Created"]["status"] == "True"
                    seen = self.observe(job_seen=self.job, absence_confirmed=self.job is None)
                case Create():
                    seen = self.create(seen)
                case Ask(uid):
                    seen = replace(seen, told=told("FailedMount", "no volume", uid=uid, seconds=self.now))
                case Settle():
                    break
        assert isinstance(step, Settle), "no end in sight"
        if not crash:
            self.write(step)
            if step.status is not None:
                self.check_fixpoint(seen)
        else:
            self.written_at = None

    def create(self, seen: Observed) -> Observed:
        """The API server's answer to a creation: the name is the lock."""
        if self.job is None:
            self.job = job(uid="job-1")
            self.jobs_created += 1
            return self.observe(job_seen=self.job)
        ours = is_ours(self.job)
        return self.observe(job_seen=self.job, refusal=None if ours else taken(self.job, seen.parent))

    def observe(self, *, job_seen: JobView | None, absence_confirmed: bool = False, refusal: Any = None) -> Observed:
        return Observed(
            parent=parent(status=self.status, generation=self.generation),
            job=job_seen,
            absence_confirmed=absence_confirmed,
            pods=tuple(self.pods.values()),
            report=self.report,
            refusal=refusal,
            written_at=None if self.written_at is None else at(self.written_at),
        )

    def write(self, step: Settle) -> None:
        if step.status is None:
            assert step.events == ()
            return
        before, after = self.status, step.status
        assert not finished(before), "a terminal status was changed"
        assert not finished(after) or not any(p.live for p in self.pods.values()), "over while a pod still holds its GPUs"
        for kind, new in conditions(after).items():
            old = conditions(before).get(kind)
            moved = old is None or old["lastTransitionTime"] != new["lastTransitionTime"]
            flipped = old is None or old["status"] != new["status"]
            assert flipped or not moved, f"{kind}: the transition time moved without a transition"
        assert "progress" not in before or "progress" in after, "progress was lost"
        assert after.get("restarts", 0) >= before.get("restarts", 0)
        self.status, self.written_at = after, self.now
        if self.jobs_created_when_told is None and conditions(after)["Created"]["status"] == "True":
            self.jobs_created_when_told = self.jobs_created

    def check_fixpoint(self, seen: Observed) -> None:
        """With nothing new to see, a later pass has nothing to write."""
        again = plan(replace(seen, parent=parent(status=self.status, generation=self.generation)), now=at(self.now), image=IMAGE)
        assert isinstance(again, Settle)
        assert again.status is None, f"a second pass writes again: {again.status}"

    # --- what holds ---------------------------------------------------------------------------------------------------------

    def own_job_runs(self) -> bool:
        found = self.job
        return found is not None and is_ours(found) and found.completed is None and found.failed is None

    @invariant()
    def a_run_whose_creation_was_told_is_never_created_again(self) -> None:
        assert self.jobs_created_when_told in (None, self.jobs_created)

    @invariant()
    def the_end_is_one_and_agrees_with_the_rest(self) -> None:
        found = conditions(self.status)
        ends = [kind for kind in ("Succeeded", "Failed") if kind in found]
        assert len(ends) <= 1
        if ends:
            assert found[ends[0]]["status"] == "True"
            assert found["Running"]["status"] == "False"
            assert found.get("GeneratorReady", {"status": "False"})["status"] == "False"
            assert self.status["state"] == ends[0]
            assert "completionTime" in self.status
        else:
            assert "completionTime" not in self.status

    @invariant()
    def every_word_is_from_its_list(self) -> None:
        if not self.status:
            return
        assert self.status["state"] in STATES
        assert all(c["reason"] in set(Reason) and c["message"] for c in self.status["conditions"])
        generations = {c["observedGeneration"] for c in self.status["conditions"]}
        assert max(generations) <= self.status["observedGeneration"] <= self.generation

    @invariant()
    def only_a_job_that_we_created_is_called_ours(self) -> None:
        created = conditions(self.status).get("Created")
        assert created is None or created["status"] == "False" or self.jobs_created > 0

    @invariant()
    def the_steps_shown_are_the_steps_made(self) -> None:
        progress = self.status.get("progress")
        if progress and "step" in progress:
            assert progress["steps"] == f"{progress['step']}/{progress['totalSteps']}"


World.TestCase.settings = settings(stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
TestEveryHistory = World.TestCase
