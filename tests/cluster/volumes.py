"""Eight empty persistent volumes, so that a claim binds in a cluster that has no provisioner.

They are folders of this machine, world-writable with the sticky bit because hostPath ignores `fsGroup` and pods run as a
user of their own. A volume whose claim was deleted is `Released` and would never bind again: `refresh` empties and offers it anew.
"""

from __future__ import annotations

import json
import shutil

from tests.cluster.host import STATE, kubectl

FOLDER = STATE / "volumes"
COUNT = 8


def refresh() -> None:
    """Create the default StorageClass and the volumes that are missing; empty and replace those that were released."""
    known = {volume["metadata"]["name"]: volume for volume in json.loads(kubectl("get", "pv", "-o", "json"))["items"]}
    wanted = [_storage_class()]
    for name in (f"local-{index}" for index in range(COUNT)):
        if known.get(name, {}).get("status", {}).get("phase") in ("Released", "Failed"):
            kubectl("delete", "pv", name, "--timeout=20s")
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            del known[name]
        if name not in known:
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
            (FOLDER / name).chmod(0o1777)
            wanted.append(_volume(name))
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": wanted}))


def _storage_class() -> dict[str, object]:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "local", "annotations": annotations},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }


def _volume(name: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "100Gi"},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "local",
            "hostPath": {"path": str(FOLDER / name), "type": "Directory"},
        },
    }
