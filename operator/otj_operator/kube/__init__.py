"""The Kubernetes API as this operator uses it: a handful of verbs on plain dictionaries, and leadership by a Lease."""

from otj_operator.kube.cluster import PAGE, ApiError, Cluster, FencedError
from otj_operator.kube.config import load_configuration
from otj_operator.kube.lease import LEASE_SECONDS, Leadership
from otj_operator.kube.resources import CUSTOM_RESOURCE_DEFINITIONS, EVENTS, JOBS, LEASES, ONLINE_TRAINING_JOBS, PODS, Resource

__all__ = [
    "CUSTOM_RESOURCE_DEFINITIONS",
    "EVENTS",
    "JOBS",
    "LEASES",
    "LEASE_SECONDS",
    "ONLINE_TRAINING_JOBS",
    "PAGE",
    "PODS",
    "ApiError",
    "Cluster",
    "FencedError",
    "Leadership",
    "Resource",
    "load_configuration",
]
