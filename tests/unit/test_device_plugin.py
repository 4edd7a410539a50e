"""The fake device plugin against a kubelet's registration service on a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import grpc
import pytest

from tests.cluster import device_plugin_api as api
from tests.cluster.device_plugin import RESOURCE, SOCKET, VARIABLE, DevicePlugin

IDS = ["GPU-fake-0", "GPU-fake-1", "GPU-fake-2", "GPU-fake-3"]
PATIENCE_S = 20


class Kubelet:
    """The half of the kubelet that a plugin talks to; `registrations` holds what came in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registrations: Queue[Any] = Queue()

    def start(self) -> None:
        """Begin as the real one does: with an empty plugin folder."""
        for entry in self.folder.iterdir():
            entry.unlink(missing_ok=True)  # the plugin may remove its own in between
        handler = grpc.unary_unary_rpc_method_handler(
            self._register,
            request_deserializer=api.RegisterRequest.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2))
        service = REGISTRATION.rpartition("/")[0]
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Register": handler}),))
        self._server.add_insecure_port(f"unix:{self.folder}/kubelet.sock")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    def _register(self, request: Any, _: grpc.ServicerContext) -> Any:
        self.registrations.put(request)
        return api.Empty()


REGISTRATION = api.REGISTER.removeprefix("/")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dp")  # short: a socket's path may have 107 characters


@pytest.fixture
def kubelet(folder: Path) -> Iterator[Kubelet]:
    kubelet = Kubelet(folder)
    kubelet.start()
    yield kubelet
    kubelet.stop()


@pytest.fixture
def plugin(folder: Path) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=DevicePlugin(folder, IDS, stop=stop, poll_s=0.05).run)
    thread.start()
    yield
    stop.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def call(folder: Path, method: str, request: Any, response: Any, *, stream: bool = False) -> Any:
    """Call the plugin as the kubelet does; of a stream, the first message."""
    with grpc.insecure_channel(f"unix:{folder}/{SOCKET}") as channel:
        make = channel.unary_stream if stream else channel.unary_unary
        remote = make(
            f"/{api.SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        answer = remote(request, timeout=PATIENCE_S, wait_for_ready=True)
        return next(iter(answer)) if stream else answer


def test_it_registers_the_gpu_resource_with_its_own_socket(kubelet: Kubelet, plugin: None) -> None:
    request = kubelet.registrations.get(timeout=PATIENCE_S)
    assert (request.version, request.endpoint, request.resource_name) == ("v1beta1", SOCKET, RESOURCE)


def test_it_lists_every_device_as_healthy(kubelet: Kubelet, plugin: None, folder: Path) -> None:
    kubelet.registrations.get(timeout=PATIENCE_S)
    listed = call(folder, "ListAndWatch", api.Empty(), api.ListAndWatchResponse, stream=True)
    assert [(device.ID, device.health) for device in listed.devices] == [(device, "Healthy") for device in IDS]


def test_each_container_of_an_allocation_is_told_its_own_devices(kubelet: Kubelet, plugin: None, folder: Path) -> None:
    kubelet.registrations.get(timeout=PATIENCE_S)
    request = api.AllocateRequest(container_requests=[{"devices_ids": ["GPU-fake-2"]}, {"devices_ids": ["GPU-fake-3", "GPU-fake-0"]}])
    answer = call(folder, "Allocate", request, api.AllocateResponse)
    told = [{entry.key: entry.value for entry in container.envs} for container in answer.container_responses]
    assert told == [{VARIABLE: "GPU-fake-2"}, {VARIABLE: "GPU-fake-3,GPU-fake-0"}]


def test_a_restarted_kubelet_is_registered_with_again(kubelet: Kubelet, plugin: None, folder: Path) -> None:
    kubelet.registrations.get(timeout=PATIENCE_S)
    kubelet.stop()
    kubelet.start()
    assert kubelet.registrations.get(timeout=PATIENCE_S).resource_name == RESOURCE
    assert len(call(folder, "ListAndWatch", api.Empty(), api.ListAndWatchResponse, stream=True).devices) == len(IDS)


def test_it_waits_for_a_kubelet_that_starts_later(folder: Path, plugin: None) -> None:
    late = Kubelet(folder)
    late.start()
    try:
        assert late.registrations.get(timeout=PATIENCE_S).resource_name == RESOURCE
    finally:
        late.stop()
