"""OnlineTrainingJob v1alpha1 as typed models. Importable without torch, kopf or a Kubernetes client."""

from otj_runtime.api.base import ApiModel, Rule, ToldModel
from otj_runtime.api.job import (
    API_VERSION,
    GROUP,
    KIND,
    PLURAL,
    SHORT_NAME,
    SINGULAR,
    VERSION,
    InvalidJobError,
    ObjectMeta,
    OnlineTrainingJob,
    load_document,
    load_job,
    parse_job,
)
from otj_runtime.api.spec import Device, DType, OnlineTrainingJobSpec
from otj_runtime.api.status import Condition, ConditionType, OnlineTrainingJobStatus, Progress, Reason
from otj_runtime.api.training import Algorithm, training_arguments

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "PLURAL",
    "SHORT_NAME",
    "SINGULAR",
    "VERSION",
    "Algorithm",
    "ApiModel",
    "Condition",
    "ConditionType",
    "DType",
    "Device",
    "InvalidJobError",
    "ObjectMeta",
    "OnlineTrainingJob",
    "OnlineTrainingJobSpec",
    "OnlineTrainingJobStatus",
    "Progress",
    "Reason",
    "Rule",
    "ToldModel",
    "load_document",
    "load_job",
    "parse_job",
    "training_arguments",
]
