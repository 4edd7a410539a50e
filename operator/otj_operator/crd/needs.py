"""Whether the CRD that a cluster serves is one that this operator can work with.

It may have more than the operator knows: at an upgrade the CRD comes first. It must not have less: the API server would drop a field that
is written to it without a word, and the operator would write it again for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from otj_operator.crd.schema import Schema

Object = dict[str, Any]

SHOWN = 5


def fault(crd: Object | None, *, name: str, version: str, needed: Schema) -> str | None:
    """What is wrong with `crd`, as the API server has it, for an operator that needs `needed` of `version`; None if nothing is."""
    versions = {v["name"]: v for v in crd["spec"]["versions"] if v.get("served")} if crd else {}
    if version not in versions:
        return f"the cluster does not serve {name} {version}: apply manifests/crd.yaml first"
    installed = versions[version]
    if "status" not in installed.get("subresources", {}):
        return f"{name} {version} has no status subresource: apply the manifests/crd.yaml of this operator's release"
    lacking = list(_lacking(installed.get("schema", {}).get("openAPIV3Schema", {}), needed))
    if not lacking:
        return None
    more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
    return (
        f"the CRD {name} {version} of the cluster is not the one that this operator needs: it lacks {', '.join(lacking[:SHOWN])}{more}; "
        "apply the manifests/crd.yaml of this operator's release"
    )


def _lacking(installed: Schema, needed: Schema, path: str = "") -> Iterator[str]:
    """Paths of fields that `needed` has and `installed` lacks or gives another type."""
    if installed.get("x-kubernetes-preserve-unknown-fields"):
        return
    if installed.get("type") != needed.get("type"):
        yield f"{path or 'the schema'} as {needed.get('type', 'int-or-string')}"
        return
    fields = installed.get("properties", {})
    for name, child in needed.get("properties", {}).items():
        below = f"{path}.{name}"
        if name in fields:
            yield from _lacking(fields[name], child, below)
        else:
            yield below
    for keyword in ("items", "additionalProperties"):
        if isinstance(needed.get(keyword), dict):
            yield from _lacking(installed.get(keyword) or {}, needed[keyword], f"{path}[]")
