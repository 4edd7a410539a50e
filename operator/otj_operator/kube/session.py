r"""HTTP sessions to the API server: who we are, on every request; what came back, counted.

    load_configuration() --Configuration--> open_session() --> Cluster: our reads and writes
                                                           \-> kopf: its watches

The generated client of `kubernetes.aio` spends more time on a call than the API server does (it copies and sanitises the body, and builds
its answer twice), so only its credentials are used. The token is asked for at each request: the kubelet renews it while we run.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

import aiohttp
from kubernetes.aio import client

Called = Callable[[str, int], None]
"""Told of each request: its verb and the answer's status, 0 without an answer."""

Lists = Callable[[str], None]
"""Told of each listing: its path, once its first page is there, and with it the version that all pages are of."""

_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def open_session(
    configuration: client.Configuration, *, connections: int, called: Called, lists: Lists = lambda path: None
) -> aiohttp.ClientSession:
    """A session for the server and the credentials of `configuration`. `connections` 0 is no limit. Needs a running event loop."""

    async def authorised(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        token = await configuration.get_api_key_with_prefix("BearerToken")
        if token:
            request.headers["Authorization"] = token
        verb = "watch" if "watch" in request.url.query else _VERBS.get(request.method, "get")
        try:
            response = await handler(request)
        except (aiohttp.ClientError, TimeoutError, OSError):
            called(verb, 0)
            raise
        called(verb, response.status)
        if verb == "get" and response.status == 200 and "limit" in request.url.query and "continue" not in request.url.query:
            lists(request.url.path)
        return response

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, ssl=_ssl_context(configuration)),
        middlewares=(authorised,),
        headers={"User-Agent": "online-training-operator", "Accept": "application/json"},
        proxy=configuration.proxy or None,
        trust_env=False,
        auto_decompress=True,
    )


def _ssl_context(configuration: client.Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
