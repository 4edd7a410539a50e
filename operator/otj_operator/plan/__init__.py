"""The operator's decisions, as pure functions: what was observed goes in, what to do and to say comes out. No I/O, no clock."""

from otj_operator.plan.children import JobView, WorkloadView
from otj_operator.plan.events import Event
from otj_operator.plan.observed import Observed, Refusal, RefusalKind, Report, Told
from otj_operator.plan.parent import Key, Parent
from otj_operator.plan.planner import plan
from otj_operator.plan.pods import PodView
from otj_operator.plan.steps import Ask, Create, Look, Patch, PollTarget, Settle, Step, Target

__all__ = [
    "Ask",
    "Create",
    "Event",
    "JobView",
    "Key",
    "Look",
    "Observed",
    "Parent",
    "PodView",
    "Patch",
    "PollTarget",
    "Refusal",
    "RefusalKind",
    "Report",
    "Settle",
    "Step",
    "Target",
    "Told",
    "WorkloadView",
    "plan",
]
