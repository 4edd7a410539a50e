"""ValidatingAdmissionPolicies for what rules in the CRD cannot see: labels of the metadata, of which only name and generateName are
visible there, and arguments of functions, whose names no schema knows."""

from __future__ import annotations

from typing import Any

from otj_runtime.api import GROUP, PLURAL, VERSION
from otj_runtime.api.secrets import SECRET_ARGUMENT, secret_argument_cel
from otj_runtime.pod.names import COPIED_LABELS

Manifest = dict[str, Any]

NAME = f"{PLURAL}.{GROUP}"


def admission_policies() -> list[Manifest]:
    """The policies, each with its binding."""
    return [*_policy(NAME, "UPDATE", _fixed_labels()), *_policy(f"secrets.{NAME}", "CREATE", _no_secrets())]


def _policy(name: str, operation: str, spec: Manifest) -> list[Manifest]:
    api = "admissionregistration.k8s.io/v1"
    constraints = {"resourceRules": [{"apiGroups": [GROUP], "apiVersions": [VERSION], "operations": [operation], "resources": [PLURAL]}]}
    policy = {"failurePolicy": "Fail", "matchConstraints": constraints, **spec}
    binding = {"policyName": name, "validationActions": ["Deny"]}
    return [
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": name}, "spec": policy},
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": name}, "spec": binding},
    ]


def _fixed_labels() -> Manifest:
    """Labels that Kueue reads were copied to the Job once; a change of them afterwards would be a wish that nobody grants, so it is
    refused."""
    return {
        "matchConditions": [{"name": "its-job-exists", "expression": "has(oldObject.status) && has(oldObject.status.jobUid)"}],
        "validations": [_fixed_label(name) for name in COPIED_LABELS],
    }


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


def _no_secrets() -> Manifest:
    """No argument of a function is a secret, nor is one in a group of them, such as storage_options. Only at creation: they cannot
    change."""
    places = " + ".join(
        (
            f"[{_place('dataset.args', 'object.spec.?dataset.?args')}]",
            f"object.spec.?rewards.orValue([]).map(reward, {_place('rewards[].args', 'reward.?args')})",
            f"object.spec.?rewards.orValue([]).map(reward, {_place('rewards[].judge.request', 'reward.?judge.?request')})",
        )
    )
    alone = _found("place.args", "place.path")
    in_group = _found("place.args[group]", "place.path + '.' + group")
    grouped = f"place.args.map(group, type(place.args[group]) == map, {in_group})"
    return {
        "variables": [
            {"name": "places", "expression": places},
            {"name": "alone", "expression": _not_empty(f"variables.places.map(place, {alone})")},
            {"name": "grouped", "expression": _not_empty(f"variables.places.map(place, {_not_empty(grouped)})")},
        ],
        "validations": [_nothing_in("alone", "[0][0]"), _nothing_in("grouped", "[0][0][0]")],
    }


def _place(path: str, optional: str) -> str:
    """CEL for arguments and where they stand."""
    return f"{{'path': dyn('spec.{path}'), 'args': dyn({optional}.orValue({{}}))}}"


def _found(arguments: str, path: str) -> str:
    """CEL for the paths of the secrets among `arguments`."""
    return f"{arguments}.map(name, {secret_argument_cel('name', f'{arguments}[name]')}, {path} + '.' + name)"


def _not_empty(lists: str) -> str:
    return f"{lists}.filter(found, found.size() > 0)"


def _nothing_in(variable: str, first: str) -> Manifest:
    return {
        "expression": f"variables.{variable}.size() == 0",
        "messageExpression": f"variables.{variable}{first} + ': {SECRET_ARGUMENT}'",
        "message": f"an argument {SECRET_ARGUMENT}",
    }
