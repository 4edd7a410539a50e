"""What `kubectl apply -f manifests/install.yaml` brings: namespace, CRD, rights, and the operator's Deployment.

The rights are exactly the calls that the operator makes; the contract tests run it with nothing else.
"""

from __future__ import annotations

from typing import Any

from otj_operator.crd.definition import NAME as CRD_NAME
from otj_operator.crd.definition import custom_resource_definition
from otj_operator.main import LEASE_NAME
from otj_runtime.api import GROUP, PLURAL
from otj_runtime.pod.names import KUEUE, NON_ROOT_UID

Manifest = dict[str, Any]

NAMESPACE = "online-training-system"
NAME = "online-training-operator"
OPERATOR_IMAGE = "localhost/online-training-operator:dev"
RUNTIME_IMAGE = "localhost/online-training-runtime:dev"
PORT = 8080

_LABELS = {"app.kubernetes.io/name": NAME}
_RBAC = "rbac.authorization.k8s.io"


def install_manifests() -> list[Manifest]:
    """The documents of install.yaml, in an order in which they can be applied."""
    return [_namespace(), custom_resource_definition(), _service_account(), *_rights(), *_rights_of_users(), _deployment()]


def _namespace() -> Manifest:
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}


def _service_account() -> Manifest:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(NAMESPACE), "automountServiceAccountToken": False}


def _rights() -> list[Manifest]:
    everywhere = [
        _rule(GROUP, PLURAL, "list", "watch"),
        _rule(GROUP, f"{PLURAL}/status", "patch"),
        # Where OwnerReferencesPermissionEnforcement is on, a child that blocks its owner's deletion needs this right.
        _rule(GROUP, f"{PLURAL}/finalizers", "update"),
        _rule("batch", "jobs", "create", "get", "list", "patch", "watch"),
        _rule(KUEUE, "workloads", "list", "patch", "watch"),
        _rule("", "pods", "list", "watch"),
        _rule("", "events", "create", "list"),
        _rule("apiextensions.k8s.io", "customresourcedefinitions", "get") | {"resourceNames": [CRD_NAME]},
    ]
    at_home = [
        _rule("coordination.k8s.io", "leases", "create"),
        _rule("coordination.k8s.io", "leases", "get", "update") | {"resourceNames": [LEASE_NAME]},
    ]
    return [
        {"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": _metadata(), "rules": everywhere},
        _binding("ClusterRole", None),
        {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "metadata": _metadata(NAMESPACE), "rules": at_home},
        _binding("Role", NAMESPACE),
    ]


def _rights_of_users() -> list[Manifest]:
    """Whoever may edit or view a namespace may edit or view its OnlineTrainingJobs."""
    roles = {
        "edit": (("edit", "admin"), ("create", "delete", "deletecollection", "patch", "update")),
        "view": (("view", "edit", "admin"), ("get", "list", "watch")),
    }
    return [
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "ClusterRole",
            "metadata": {
                "name": f"online-training-{name}",
                "labels": _LABELS | {f"{_RBAC}/aggregate-to-{role}": "true" for role in into},
            },
            "rules": [_rule(GROUP, PLURAL, *verbs)],
        }
        for name, (into, verbs) in roles.items()
    ]


def _deployment() -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(NAMESPACE),
        "spec": {
            # One suffices; more stand by and take over when the Lease is free.
            "replicas": 1,
            "selector": {"matchLabels": _LABELS},
            "template": {
                "metadata": {"labels": _LABELS},
                "spec": {
                    "serviceAccountName": NAME,
                    "automountServiceAccountToken": True,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": 30,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": NON_ROOT_UID,
                        "runAsGroup": NON_ROOT_UID,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [_container()],
                },
            },
        },
    }


def _container() -> Manifest:
    return {
        "name": "operator",
        "image": OPERATOR_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "otj_operator"],
        "args": [f"--port={PORT}"],
        "env": [
            {"name": "OTJ_RUNTIME_IMAGE", "value": RUNTIME_IMAGE},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        ],
        "ports": [{"name": "health", "containerPort": PORT}],
        "livenessProbe": _probe("/healthz", initialDelaySeconds=30, periodSeconds=20, timeoutSeconds=5, failureThreshold=3),
        "readinessProbe": _probe("/readyz", periodSeconds=5, timeoutSeconds=5),
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True},
    }


def _probe(path: str, **timing: int) -> Manifest:
    return {"httpGet": {"path": path, "port": "health"}, **timing}


def _rule(group: str, resource: str, *verbs: str) -> Manifest:
    return {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}


def _binding(kind: str, namespace: str | None) -> Manifest:
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": f"{kind}Binding",
        "metadata": _metadata(namespace),
        "roleRef": {"apiGroup": _RBAC, "kind": kind, "name": NAME},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
    }


def _metadata(namespace: str | None = None) -> Manifest:
    return {"name": NAME, **({"namespace": namespace} if namespace else {}), "labels": _LABELS}
