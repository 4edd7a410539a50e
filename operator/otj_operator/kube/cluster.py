"""A few verbs of the API server on plain dictionaries.

Reads stay raw: the client's models cost ten times the time and three times the memory of the dictionaries, and refuse a field of the
wrong type. Every call has a deadline. Writes pass a fence first: a leader that was stopped for a while and lost its Lease
must not write before it notices. Nothing is tried again here: who calls knows better, and `ApiError.retry_after` tells what the server wishes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import client
from yarl import URL

from otj_operator.kube.resources import Resource
from otj_operator.kube.session import Called, open_session

Object = dict[str, Any]
T = TypeVar("T")

CALL_SECONDS = 30
PAGE = 100
"""Objects in one answer of a listing. Parsed, they take many times their JSON, so this bounds what a listing takes: with 500 a restart on
1,000 jobs took twice the memory."""

CONNECTIONS = 64
"""More than there are workers: with 16 or 32, Jobs of a burst waited behind statuses for ten seconds. Each takes 256 KiB for TLS."""

_TIMEOUT = aiohttp.ClientTimeout(total=CALL_SECONDS)


class ApiError(Exception):
    """The API server said no, or could not be reached (`status` 0). `retry_after` seconds is when it wants to be asked again."""

    def __init__(self, what: str, *, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{what}: {status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @property
    def absent(self) -> bool:
        """Whether it said that the object, or the namespace to create it in, is not there. A path that it does not serve has no Status."""
        return self.status == 404 and self.reason == "NotFound"


class FencedError(RuntimeError):
    """A write was held back, because this process may not lead any more."""


class Cluster:
    """One connection pool to the API server. Use as an async context manager."""

    def __init__(self, configuration: client.Configuration, *, called: Called = lambda verb, status: None) -> None:
        self._configuration, self._called = configuration, called
        self.may_write: Callable[[], bool] = lambda: True
        """The fence, asked before every write."""

    async def __aenter__(self) -> Self:
        self._session = open_session(self._configuration, connections=CONNECTIONS, called=self._called)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()

    async def list(
        self, resource: Resource, read: Callable[[Object], T], *, namespace: str | None = None, labels: str = "", fields: str = ""
    ) -> tuple[list[T], str]:
        """What `read` makes of all objects that `labels` and `fields` select, in one namespace or all, and the version they were read at.

        No more than a page of raw objects is held at a time.
        """
        items: list[T] = []
        query = {"limit": str(PAGE), "labelSelector": labels, "fieldSelector": fields}
        while True:
            page = await self._call("GET", resource.path(namespace) + "?" + urlencode(query))
            items += map(read, page["items"])
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return items, str(page["metadata"]["resourceVersion"])

    async def get(self, resource: Resource, *, namespace: str | None = None, name: str) -> Object | None:
        """One object, or None if there is none."""
        try:
            return await self._call("GET", resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def create(self, resource: Resource, body: Object) -> Object:
        """Create `body` in the namespace that its metadata names, and return what the API server made of it."""
        return await self._write("POST", resource.path(body["metadata"]["namespace"]), body)

    async def replace(self, resource: Resource, body: Object) -> Object:
        """Replace an object; its resourceVersion guards against a write in between (409)."""
        metadata = body["metadata"]
        return await self._write("PUT", resource.path(metadata["namespace"], metadata["name"]), body)

    async def merge(self, resource: Resource, body: Object, *, namespace: str, name: str) -> Object:
        """Merge `body` into an object; 409 if it names a resourceVersion and the object has changed since."""
        return await self._write("PATCH", resource.path(namespace, name), body, content_type="application/merge-patch+json")

    async def preferred_version(self, group: str) -> str | None:
        """The version of an API group that the cluster prefers, or None if it does not serve the group."""
        try:
            found = await self._call("GET", f"/apis/{group}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return str(found["preferredVersion"]["version"])

    async def set_status(self, resource: Resource, *, namespace: str, name: str, status: Object, resource_version: str) -> Object:
        """Replace the whole status; 409 if the object has changed since `resource_version`."""
        patch = [
            {"op": "replace", "path": "/metadata/resourceVersion", "value": resource_version},
            {"op": "add", "path": "/status", "value": status},
        ]
        return await self._write("PATCH", resource.path(namespace, name, "status"), patch, content_type="application/json-patch+json")

    async def _write(self, method: str, path: str, body: Any, *, content_type: str = "application/json") -> Object:
        if not self.may_write():
            raise FencedError(f"{method} {path}: the Lease may belong to somebody else by now")
        return await self._call(method, path, body, content_type=content_type)

    async def _call(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> Object:
        what = f"{method} {path.split('?')[0]}"
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        headers = {"Content-Type": content_type} if data is not None else None
        url = URL(self._configuration.host + path, encoded=True)
        try:
            async with self._session.request(method, url, data=data, headers=headers, timeout=_TIMEOUT, allow_redirects=False) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(what, status=0, reason=type(error).__name__, message=str(error) or "no answer") from error
        if response.status >= 300:
            raise _error(what, response.status, response.headers.get("Retry-After", ""), answer)
        document: Object = json.loads(answer)
        return document


def _error(what: str, status: int, retry_after: str, data: bytes) -> ApiError:
    """The error in a Status object, or in whatever else a proxy answered."""
    try:
        document = json.loads(data)
        reason, message = str(document.get("reason") or "Unknown"), str(document.get("message") or "")
    except (ValueError, AttributeError):
        reason, message = "Unknown", data[:500].decode(errors="replace")
    # In seconds; a date, which HTTP allows too, is not worth the reading.
    seconds = float(retry_after) if retry_after.isdecimal() else 0.0
    return ApiError(what, status=status, reason=reason, message=message, retry_after=seconds)
