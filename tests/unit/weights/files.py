"""Small mailboxes for the tests."""

from __future__ import annotations

from pathlib import Path

import torch

from otj_runtime.weights.layout import Layout, Ticket
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter

SHAPES: dict[str, tuple[int, ...]] = {"embed": (7, 3), "norm": (3,), "proj": (3, 5), "scalar": (), "head": (11, 3)}


def layout(dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of `SHAPES`."""
    return Layout.of(SHAPES.items(), dtype)


def tensors(version: int) -> dict[str, torch.Tensor]:
    """Tensors that differ between versions in every element."""
    return {name: torch.full(shape, float(version + 1)) + torch.rand(shape) / 4 for name, shape in SHAPES.items()}


def write_all(writer: MailboxWriter, ticket: Ticket, values: dict[str, torch.Tensor]) -> None:
    """Write every tensor, as one rank would."""
    writer.write(ticket, values.items())


def push(writer: MailboxWriter, version: int) -> dict[str, torch.Tensor]:
    """Publish a version; return its tensors."""
    values = tensors(version)
    ticket = writer.begin(version)
    write_all(writer, ticket, values)
    writer.publish(ticket)
    return values


def read(path: Path, version: int) -> dict[str, torch.Tensor]:
    """Copies of what a fresh reader gets."""
    with MailboxReader(path).reading(version) as found:
        return {name: tensor.clone() for name, tensor in found}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal, bit by bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
