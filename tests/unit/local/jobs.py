"""Jobs for the tests of local runs."""

from __future__ import annotations

from typing import Any

from otj_runtime.api import OnlineTrainingJob, parse_job


def document(*, name: str = "job", **spec: Any) -> dict[str, Any]:
    """A small valid job, with these fields of its spec replaced."""
    return {
        "apiVersion": "onlinetraining.dev/v1alpha1",
        "kind": "OnlineTrainingJob",
        "metadata": {"name": name},
        "spec": {
            "algorithm": "GRPO",
            "model": {"path": "/model"},
            "dataset": {"task": "copy"},
            "gpus": 4,
            "accelerator": {"device": "cpu"},
            **spec,
        },
    }


def job(*, name: str = "job", **spec: Any) -> OnlineTrainingJob:
    """That job, parsed."""
    return parse_job(document(name=name, **spec))
