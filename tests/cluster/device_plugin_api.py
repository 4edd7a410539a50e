"""The messages of the kubelet's device plugin API, version v1beta1, without generated code.

Only the fields that a plugin of this kind reads or writes are declared: protobuf keeps the others unread, so both sides
still agree. Declaring them here spares the project protoc, its plugin, and files that nobody reads.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "v1beta1"
REGISTER = f"/{PACKAGE}.Registration/Register"
SERVICE = f"{PACKAGE}.DevicePlugin"

# message -> fields in order of their numbers, counted from 1: (name, type), where "*" stands for repeated
_MESSAGES: dict[str, list[tuple[str, str]]] = {
    "Empty": [],
    "DevicePluginOptions": [("pre_start_required", "bool"), ("get_preferred_allocation_available", "bool")],
    "RegisterRequest": [
        ("version", "string"),
        ("endpoint", "string"),
        ("resource_name", "string"),
        ("options", "DevicePluginOptions"),
    ],
    "Device": [("ID", "string"), ("health", "string")],
    "ListAndWatchResponse": [("devices", "*Device")],
    "ContainerAllocateRequest": [("devices_ids", "*string")],
    "AllocateRequest": [("container_requests", "*ContainerAllocateRequest")],
    "Env": [("key", "string"), ("value", "string")],  # protobuf's own form of one entry of map<string, string>
    "ContainerAllocateResponse": [("envs", "*Env")],
    "AllocateResponse": [("container_responses", "*ContainerAllocateResponse")],
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    kind = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": kind.TYPE_STRING, "bool": kind.TYPE_BOOL}
    file = descriptor_pb2.FileDescriptorProto(name="otj_device_plugin.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, declared) in enumerate(fields, start=1):
            plain = declared.removeprefix("*")
            label = kind.LABEL_REPEATED if declared != plain else kind.LABEL_OPTIONAL
            if plain in scalars:
                message.field.add(name=field, number=number, label=label, type=scalars[plain])
            else:
                type_name = f".{PACKAGE}.{plain}"
                message.field.add(name=field, number=number, label=label, type=kind.TYPE_MESSAGE, type_name=type_name)
    return file


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


Empty = _message("Empty")
DevicePluginOptions = _message("DevicePluginOptions")
RegisterRequest = _message("RegisterRequest")
Device = _message("Device")
ListAndWatchResponse = _message("ListAndWatchResponse")
AllocateRequest = _message("AllocateRequest")
AllocateResponse = _message("AllocateResponse")
