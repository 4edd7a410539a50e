"""What `kubectl apply -f manifests/install.yaml` brings: namespace, CRD, rights, a network policy, and the operator's Deployment.

The rights are exactly the calls that the operator makes; the contract tests run it with nothing else, and compare the role with the API
server's audit log. For some namespaces only, `install_manifests(("team-a", "team-b"))` binds the same role there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from otj_operator.crd.definition import NAME as CRD_NAME
from otj_operator.crd.definition import custom_resource_definition
from otj_operator.crd.policy import admission_policies
from otj_operator.kube import LEASE_SECONDS
from otj_operator.main import LEASE_NAME
from otj_runtime.api import GROUP, PLURAL
from otj_runtime.pod.config import Layout
from otj_runtime.pod.names import JOB_LABEL, KUEUE, NON_ROOT_UID

Manifest = dict[str, Any]

NAMESPACE = "online-training-system"
NAME = "online-training-operator"
OPERATOR_IMAGE = "localhost/online-training-operator:dev"
RUNTIME_IMAGE = "localhost/online-training-runtime:dev"
PORT = 8080

PROGRESS_PORT = Layout().progress_port
SCRAPER_LABEL = "onlinetraining.dev/scrapes-metrics"

_CRD_READER = f"{NAME}-crd"
_LEASE_HOLDER = f"{NAME}-leader"
_NAMESPACE_NAME = "kubernetes.io/metadata.name"
_LABELS = {"app.kubernetes.io/name": NAME}
_RBAC = "rbac.authorization.k8s.io"


def install_manifests(namespaces: Sequence[str] = ()) -> list[Manifest]:
    """The documents of install.yaml, in an order in which they can be applied. No `namespaces`: the operator serves all of them."""
    return [
        _namespace(),
        custom_resource_definition(),
        *admission_policies(),
        _service_account(),
        *_rights(namespaces),
        *_rights_of_users(),
        _network_policy(),
        _deployment(namespaces),
    ]


def job_network_policy() -> Manifest:
    """For a namespace in which jobs run: nothing but the operator reaches their pods, and it only their progress port.

    What goes out is not restricted: models and datasets come from wherever the job says.
    """
    operator = {"namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: NAMESPACE}}, "podSelector": {"matchLabels": _LABELS}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "online-training-jobs", "labels": _LABELS},
        "spec": {
            "podSelector": {"matchExpressions": [{"key": JOB_LABEL, "operator": "Exists"}]},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [operator], "ports": [_tcp(PROGRESS_PORT)]}],
        },
    }


def _namespace() -> Manifest:
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}


def _service_account() -> Manifest:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(NAMESPACE), "automountServiceAccountToken": False}


def _rights(namespaces: Sequence[str]) -> list[Manifest]:
    where_jobs_are = [
        _rule(GROUP, PLURAL, "list", "watch"),
        _rule(GROUP, f"{PLURAL}/status", "patch"),
        # Where OwnerReferencesPermissionEnforcement is on, a child that blocks its owner's deletion needs this right.
        _rule(GROUP, f"{PLURAL}/finalizers", "update"),
        _rule("batch", "jobs", "create", "get", "list", "patch", "watch"),
        _rule(KUEUE, "workloads", "list", "patch", "watch"),
        _rule("", "pods", "list", "watch"),
        _rule("", "events", "create", "list"),
    ]
    of_the_cluster = [_rule("apiextensions.k8s.io", "customresourcedefinitions", "get") | {"resourceNames": [CRD_NAME]}]
    at_home = [
        _rule("coordination.k8s.io", "leases", "create"),
        _rule("coordination.k8s.io", "leases", "get", "update") | {"resourceNames": [LEASE_NAME]},
    ]
    return [
        {"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": _metadata(), "rules": where_jobs_are},
        *([_binding(NAME, namespace) for namespace in namespaces] or [_binding(NAME)]),
        {"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": _metadata(name=_CRD_READER), "rules": of_the_cluster},
        _binding(_CRD_READER),
        {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "metadata": _metadata(NAMESPACE, name=_LEASE_HOLDER), "rules": at_home},
        _binding(_LEASE_HOLDER, NAMESPACE, kind="Role"),
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


def _network_policy() -> Manifest:
    """Metrics are scraped by namespaces that an admin has labelled; out go calls to the API server, names and launchers.

    An API server has no selector, so its usual ports are open to every address. Probes come from the pod's node, which no policy stops.
    """
    scrapers = {"namespaceSelector": {"matchLabels": {SCRAPER_LABEL: "true"}}}
    launchers = {"namespaceSelector": {}, "podSelector": {"matchExpressions": [{"key": JOB_LABEL, "operator": "Exists"}]}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(NAMESPACE),
        "spec": {
            "podSelector": {"matchLabels": _LABELS},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [scrapers], "ports": [_tcp(PORT)]}],
            "egress": [
                {"ports": [_tcp(443), _tcp(6443)]},
                {"ports": [_tcp(53), {"protocol": "UDP", "port": 53}]},
                {"to": [launchers], "ports": [_tcp(PROGRESS_PORT)]},
            ],
        },
    }


def _deployment(namespaces: Sequence[str]) -> Manifest:
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
                    "containers": [_container(namespaces)],
                },
            },
        },
    }


def _container(namespaces: Sequence[str]) -> Manifest:
    return {
        "name": "operator",
        "image": OPERATOR_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "otj_operator"],
        "args": [
            *(f"--port={PORT}", "--log-format=json", f"--lease-seconds={LEASE_SECONDS:.0f}"),
            *([f"--namespaces={','.join(namespaces)}"] if namespaces else []),
        ],
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


def _tcp(port: int) -> Manifest:
    return {"protocol": "TCP", "port": port}


def _binding(role: str, namespace: str | None = None, *, kind: str = "ClusterRole") -> Manifest:
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "RoleBinding" if namespace else "ClusterRoleBinding",
        "metadata": _metadata(namespace, name=role),
        "roleRef": {"apiGroup": _RBAC, "kind": kind, "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
    }


def _metadata(namespace: str | None = None, *, name: str = NAME) -> Manifest:
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": _LABELS}
