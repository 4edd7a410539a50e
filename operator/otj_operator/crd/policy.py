"""A ValidatingAdmissionPolicy for what rules in the CRD cannot see: there only name and generateName of the metadata are visible."""

from __future__ import annotations

from typing import Any

from otj_runtime.api import GROUP, PLURAL, VERSION
from otj_runtime.pod.names import COPIED_LABELS

Manifest = dict[str, Any]

NAME = f"{PLURAL}.{GROUP}"


def admission_policy() -> list[Manifest]:
    """The policy and its binding. Labels that Kueue reads were copied to the Job once; a change of them afterwards would be a wish that
    nobody grants, so it is refused."""
    api = "admissionregistration.k8s.io/v1"
    constraints = {"resourceRules": [{"apiGroups": [GROUP], "apiVersions": [VERSION], "operations": ["UPDATE"], "resources": [PLURAL]}]}
    policy = {
        "failurePolicy": "Fail",
        "matchConstraints": constraints,
        "matchConditions": [{"name": "its-job-exists", "expression": "has(oldObject.status) && has(oldObject.status.jobUid)"}],
        "validations": [_fixed_label(name) for name in COPIED_LABELS],
    }
    binding = {"policyName": NAME, "validationActions": ["Deny"]}
    return [
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": NAME}, "spec": policy},
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": NAME}, "spec": binding},
    ]


def _fixed_label(name: str) -> Manifest:
    old, new = (f"{which}.metadata.?labels['{name}'].orValue('')" for which in ("oldObject", "object"))
    message = (
        f'metadata.labels[{name}]: cannot change from "%s" to "%s", because the Job was queued with the first: delete the run and '
        "apply it again"
    )
    return {
        "expression": f"{old} == {new}",
        "messageExpression": f"'{message}'.format([{old}, {new}])",
        "message": f"metadata.labels[{name}]: cannot change once the Job exists",
    }
