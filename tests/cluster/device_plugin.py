"""A device plugin with GPUs that do not exist, so that a test can see which container was given which.

It speaks the kubelet's real API on the kubelet's real socket: registers `nvidia.com/gpu`, lists its devices, and answers each
allocation with the chosen ids in `NVIDIA_VISIBLE_DEVICES`, as NVIDIA's plugin does. A kubelet that restarts empties the plugin
folder and forgets its plugins, so the plugin watches both sockets and then begins again.

    python -m tests.cluster.device_plugin --count 4 [--folder /var/lib/kubelet/device-plugins]
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]

from tests.cluster import device_plugin_api as api

RESOURCE = "nvidia.com/gpu"
SOCKET = "fake-gpu.sock"
KUBELET_SOCKET = "kubelet.sock"
VARIABLE = "NVIDIA_VISIBLE_DEVICES"
KUBELET_FOLDER = Path("/var/lib/kubelet/device-plugins")


class DevicePlugin:
    """Serves `devices` (their ids) in the plugin folder `folder` until `stop` is set."""

    def __init__(self, folder: Path, devices: Sequence[str], *, stop: threading.Event, poll_s: float = 0.5) -> None:
        self._folder, self._devices, self._stop, self._poll_s = folder, devices, stop, poll_s

    def run(self) -> None:
        """Register again and again: after each restart of the kubelet, and while there is none yet."""
        while not self._stop.is_set():
            if _identity(self._folder / KUBELET_SOCKET) is None:  # a kubelet empties the folder first, and then makes its socket
                self._stop.wait(self._poll_s)
                continue
            server = self._serve()
            try:
                served = self._sockets()
                self._register()
                print(f"registered {len(self._devices)} {RESOURCE} with the kubelet", flush=True)
                # None: a kubelet that starts just now has emptied the folder again, so what was registered has no socket
                while not self._stop.is_set() and None not in served and self._sockets() == served:
                    self._stop.wait(self._poll_s)
            except grpc.RpcError as error:
                print(f"the kubelet did not take the registration: {error}", file=sys.stderr, flush=True)
                self._stop.wait(self._poll_s)
            finally:
                server.stop(grace=None).wait()

    def _sockets(self) -> list[tuple[int, int] | None]:
        """The identity of both sockets, which changes when the kubelet starts anew."""
        return [_identity(self._folder / name) for name in (KUBELET_SOCKET, SOCKET)]

    def _register(self) -> None:
        request = api.RegisterRequest(version=api.PACKAGE, endpoint=SOCKET, resource_name=RESOURCE)
        with grpc.insecure_channel(f"unix:{self._folder}/{KUBELET_SOCKET}") as channel:
            encode, decode = api.RegisterRequest.SerializeToString, api.Empty.FromString
            call = channel.unary_unary(api.REGISTER, request_serializer=encode, response_deserializer=decode)
            call(request, timeout=5, wait_for_ready=True)

    def _serve(self) -> grpc.Server:
        (self._folder / SOCKET).unlink(missing_ok=True)
        handlers = {
            "GetDevicePluginOptions": grpc.unary_unary_rpc_method_handler(_options, **_codec(api.Empty)),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(self._list_and_watch, **_codec(api.Empty)),
            "Allocate": grpc.unary_unary_rpc_method_handler(_allocate, **_codec(api.AllocateRequest)),
        }
        server = grpc.server(ThreadPoolExecutor(max_workers=8))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(api.SERVICE, handlers),))
        server.add_insecure_port(f"unix:{self._folder}/{SOCKET}")
        server.start()
        return server

    def _list_and_watch(self, _: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield api.ListAndWatchResponse(devices=[api.Device(ID=device, health="Healthy") for device in self._devices])
        while context.is_active() and not self._stop.is_set():  # these devices never change; a closed stream would remove them
            self._stop.wait(self._poll_s)


def _options(_: Any, __: grpc.ServicerContext) -> Any:
    return api.DevicePluginOptions()


def _allocate(request: Any, _: grpc.ServicerContext) -> Any:
    chosen = [",".join(container.devices_ids) for container in request.container_requests]
    return api.AllocateResponse(container_responses=[{"envs": [{"key": VARIABLE, "value": ids}]} for ids in chosen])


def _codec(request: Any) -> dict[str, Any]:
    return {"request_deserializer": request.FromString, "response_serializer": lambda message: message.SerializeToString()}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=KUBELET_FOLDER)
    parser.add_argument("--count", type=int, default=4)
    options = parser.parse_args()
    DevicePlugin(options.folder, [f"GPU-fake-{index}" for index in range(options.count)], stop=threading.Event()).run()


if __name__ == "__main__":
    main()
