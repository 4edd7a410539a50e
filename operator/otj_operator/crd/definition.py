"""The CustomResourceDefinition itself: names, columns of `kubectl get`, schema."""

from __future__ import annotations

from typing import Any

from otj_operator.crd.schema import Schema, structural_schema
from otj_operator.crd.training import job_rules, training_schema
from otj_runtime.api import GROUP, KIND, PLURAL, SHORT_NAME, SINGULAR, VERSION, OnlineTrainingJobSpec, OnlineTrainingJobStatus
from otj_runtime.api.lifecycle import CHANGEABLE, FIXED

NAME = f"{PLURAL}.{GROUP}"

COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("Algorithm", "string", ".spec.algorithm", 0),
    ("GPUs", "integer", ".spec.gpus", 0),
    ("State", "string", ".status.state", 0),
    ("Step", "string", ".status.progress.steps", 0),
    ("Reward", "string", ".status.progress.reward", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("s/step", "string", ".status.progress.secondsPerStep", 1),
    ("KL", "string", ".status.progress.kl", 1),
    ("Tokens/s", "string", ".status.progress.tokensPerSecond", 1),
    ("ETA", "string", ".status.progress.eta", 1),
    ("Checkpoint", "date", ".status.progress.checkpointTime", 1),
    ("Restarts", "integer", ".status.restarts", 1),
    ("Message", "string", ".status.message", 1),
)
"""Columns: title, type, path, priority (1 shows with `-o wide`)."""


def custom_resource_definition() -> dict[str, Any]:
    """The CRD as the API server takes it."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority} for name, kind, path, priority in COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": object_schema()},
                }
            ],
        },
    }


def fixed_rules() -> list[Schema]:
    """One transition rule per field that cannot change, at `spec`: only there is it seen that a field comes or goes."""
    may = ", ".join(CHANGEABLE)
    return [
        {
            "rule": f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            "message": f"{name}: cannot change once the run exists, because {why}; delete it and apply it again, or give the new run "
            f"another name. Only {may} may change.",
        }
        for name, why in FIXED.items()
    ]


def object_schema() -> Schema:
    """The schema of a whole object."""
    spec = structural_schema(OnlineTrainingJobSpec, defaults=True)
    training = spec["properties"]["training"]
    spec["properties"]["training"] = training_schema(training["description"])
    spec["x-kubernetes-validations"] += [*job_rules(), *fixed_rules()]
    return {
        "description": "A run of online training: part of its accelerators generate with vLLM, the others train.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": "Version of this representation.", "type": "string"},
            "kind": {"description": f"Always {KIND}.", "type": "string"},
            "metadata": {"type": "object"},  # the API server allows nothing more here
            "spec": spec,
            "status": structural_schema(OnlineTrainingJobStatus, defaults=False),
        },
        "x-kubernetes-validations": [
            {
                "rule": "self.metadata.name.size() <= 63",
                "message": "metadata.name: needs at most 63 characters, because pods carry it as a label",
            }
        ],
    }
