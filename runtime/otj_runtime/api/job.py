"""The OnlineTrainingJob object and its reading from YAML, with errors that name the field, the value and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, ValidationError

from otj_runtime.api.base import ApiModel
from otj_runtime.api.spec import OnlineTrainingJobSpec
from otj_runtime.api.status import OnlineTrainingJobStatus

GROUP = "onlinetraining.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "OnlineTrainingJob"
PLURAL = "onlinetrainingjobs"
SINGULAR = "onlinetrainingjob"
SHORT_NAME = "otj"


class InvalidJobError(ValueError):
    """A document that is no valid OnlineTrainingJob. The text has one line per fault, each starting with the field."""


class ObjectMeta(ApiModel):
    """The part of metadata that a run needs; the rest passes through unread."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=63)
    namespace: str = "default"
    uid: str | None = None
    generation: int | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class OnlineTrainingJob(ApiModel):
    """One OnlineTrainingJob, as the API server stores it."""

    api_version: str = API_VERSION
    kind: str = KIND
    metadata: ObjectMeta
    spec: OnlineTrainingJobSpec
    status: OnlineTrainingJobStatus = Field(default_factory=OnlineTrainingJobStatus)


def parse_job(document: dict[str, Any]) -> OnlineTrainingJob:
    """The job in `document`, a decoded YAML or JSON object.

    Raises:
        InvalidJobError: with one line per fault.
    """
    if document.get("apiVersion") != API_VERSION or document.get("kind") != KIND:
        found = f"{document.get('apiVersion')} {document.get('kind')}"
        raise InvalidJobError(f"expected apiVersion {API_VERSION} and kind {KIND}, found {found}")
    try:
        return OnlineTrainingJob.model_validate(document)
    except ValidationError as error:
        raise InvalidJobError("\n".join(_explain(fault) for fault in error.errors())) from error


def load_job(path: Path) -> OnlineTrainingJob:
    """The only OnlineTrainingJob in the YAML file `path`; other documents in it are ignored.

    Raises:
        InvalidJobError: if the file holds none or several, or a field is wrong.
        OSError: if the file cannot be read.
    """
    return parse_job(load_document(path))


def load_document(path: Path) -> dict[str, Any]:
    """The document behind `load_job`, not validated yet.

    Raises:
        InvalidJobError: if the file holds none or several.
        OSError: if the file cannot be read.
    """
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if isinstance(d, dict)]
    except yaml.YAMLError as error:
        raise InvalidJobError(f"{path}: is no YAML: {error}") from error
    jobs = [d for d in documents if d.get("kind") == KIND] or documents
    if len(jobs) != 1:
        raise InvalidJobError(f"{path}: holds {len(jobs)} jobs, needs exactly one {KIND}")
    return jobs[0]


def _explain(fault: Any) -> str:
    """One pydantic fault as `field: what is wrong`."""
    where = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error" and re.match(r"[\w.\[\]]+: ", message):
        # A rule of ours that names its field relative to the model it stands in.
        return f"{where}.{message}"
    if fault["type"] == "extra_forbidden":
        message = "unknown field"
    elif fault["type"] not in ("missing", "value_error"):
        message = f"{message} (found {fault['input']!r})"
    return f"{where}: {message}"
