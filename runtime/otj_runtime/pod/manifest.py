"""The Job of an OnlineTrainingJob, as the dictionary that the API server takes. Pure: the operator creates it, `otj run` starts
its containers as local processes, `otj render` prints it.

    Job -> Pod (never restarted in place; a new pod is made, up to backoffLimit)
      init container  model       fetches or checks the model's folder, then ends
      init container  generator   restartPolicy Always: a native sidecar; its GPUs serve
      container       trainer     the other GPUs train; its end is the pod's end
      volumes         /dev/shm (one, shared: the weights mailbox, and NCCL refuses P2P and SHM between two different ones),
                      /tmp, the output volume, and the user's own

The generator has no startup probe on purpose: the trainer container starts beside it and loads its model meanwhile.
"""

from __future__ import annotations

from typing import Any

from otj_runtime.api import API_VERSION, KIND, OnlineTrainingJob
from otj_runtime.pod import commands, names
from otj_runtime.pod.config import Layout, PodConfig, resolve
from otj_runtime.pod.errors import ExitCode

Manifest = dict[str, Any]

GRACE_SECONDS = 120
"""Time a trainer has to save a checkpoint after SIGTERM."""

_READY_CHECK = """import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/health", timeout=2)
except OSError as error:
    sys.exit(f"vLLM does not answer: {error}")"""


def build_job(job: OnlineTrainingJob, *, default_image: str, layout: Layout = Layout(), output: str | None = None) -> Manifest:
    """The Job of `job`. `layout` and `output` say where things lie, for a run that is no pod."""
    config = resolve(job, layout, output=output)
    spec = job.spec
    labels = job_labels(job.metadata.name)
    topology = {key: value for key, value in job.metadata.annotations.items() if key.startswith(names.COPIED_ANNOTATIONS)}
    body = {
        "suspend": spec.suspend,
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": spec.backoff_limit,
        "activeDeadlineSeconds": spec.active_deadline_seconds,
        "ttlSecondsAfterFinished": spec.ttl_seconds_after_finished,
        # Two pods of one job would write the same checkpoints: wait until the old one is gone.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": _failure_policy(),
        "template": {
            "metadata": {"labels": labels, "annotations": {"sidecar.istio.io/inject": "false"} | topology},
            "spec": _pod(job, config, layout, default_image),
        },
    }
    # Kueue reads its labels on the Job alone: on a pod they would make it manage the pod as well.
    queue = {name: job.metadata.labels[name] for name in names.COPIED_LABELS if name in job.metadata.labels}
    metadata: Manifest = {"name": job.metadata.name, "namespace": job.metadata.namespace, "labels": labels | queue}
    if spec.suspend:
        metadata["annotations"] = {names.SUSPENDED_BY_ANNOTATION: names.MANAGED_BY}
    if job.metadata.uid is not None:
        metadata["ownerReferences"] = [owner_reference(name=job.metadata.name, uid=job.metadata.uid)]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": _without_nothing(body)}


def job_labels(name: str) -> dict[str, str]:
    """Labels of the Job and the pods of the OnlineTrainingJob `name`, by which the operator and people find them."""
    return {names.JOB_LABEL: name, names.MANAGED_BY_LABEL: names.MANAGED_BY}


def owner_reference(*, name: str, uid: str) -> Manifest:
    """What makes an OnlineTrainingJob the controller of its Job: deleting it deletes the Job, after the Job if asked for foreground."""
    return {"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": uid, "controller": True, "blockOwnerDeletion": True}


def _failure_policy() -> Manifest:
    """Which failures end the Job at once, and which are not counted. Rules name their container, because exit codes of the sidecar
    would match too.

    Not counted is a pod that was drained, preempted or evicted (DisruptionTarget), or told to stop in another way, such as by a
    suspended Job. A pod that a node's device plugin rejects is counted: it has neither condition nor exit code, and one bad node
    can make thousands in an hour.
    """
    permanent = [int(code) for code in ExitCode if code.permanent]
    fail = [
        {"action": "FailJob", "onExitCodes": {"containerName": name, "operator": "In", "values": permanent}}
        for name in (names.TRAINER_CONTAINER, names.MODEL_CONTAINER)
    ]
    stopped = {"containerName": names.TRAINER_CONTAINER, "operator": "In", "values": [int(ExitCode.TERMINATED)]}
    ignore = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": stopped},
    ]
    return {"rules": [*fail, *ignore]}


def _pod(job: OnlineTrainingJob, config: PodConfig, layout: Layout, default_image: str) -> Manifest:
    spec = job.spec
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # As process 1 of its own namespace a program ignores SIGTERM until it installs a handler; vLLM does that after a minute of
        # loading. Its GPUs would stay taken for the whole grace period when the trainer fails, or the job is deleted, before that.
        "shareProcessNamespace": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": names.NON_ROOT_UID,
            "runAsGroup": names.NON_ROOT_UID,
            "fsGroup": names.NON_ROOT_UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [_model(job, config, layout, default_image), _generator(job, config, layout, default_image)],
        "containers": [_trainer(job, config, layout, default_image)],
        "volumes": [*_own_volumes(job), *spec.volumes],
        "nodeSelector": spec.node_selector or None,
        "tolerations": spec.tolerations or None,
        "affinity": spec.affinity,
        "priorityClassName": spec.priority_class_name,
        "serviceAccountName": spec.service_account_name,
    }
    return _without_nothing(pod)


def _model(job: OnlineTrainingJob, config: PodConfig, layout: Layout, image: str) -> Manifest:
    return _container(job, config, layout, image, name=names.MODEL_CONTAINER, command=commands.model_command(), env={})


def _generator(job: OnlineTrainingJob, config: PodConfig, layout: Layout, image: str) -> Manifest:
    container = _container(
        job,
        config,
        layout,
        image,
        name=names.GENERATOR_CONTAINER,
        command=commands.generator_command(job, config),
        env=commands.generator_environment(config),
        resources=_with_gpus(job.spec.resources.generator, job.spec.accelerator_resource, config.generator_gpus),
    )
    # vLLM listens on loopback, where the kubelet's own HTTP check cannot reach it.
    probe = {
        "exec": {"command": [commands.PYTHON, "-I", "-S", "-c", _READY_CHECK, config.generator_url]},
        "periodSeconds": 5,
        "timeoutSeconds": 5,
    }
    return container | {"restartPolicy": "Always", "readinessProbe": probe}


def _trainer(job: OnlineTrainingJob, config: PodConfig, layout: Layout, image: str) -> Manifest:
    container = _container(
        job,
        config,
        layout,
        image,
        name=names.TRAINER_CONTAINER,
        command=commands.trainer_command(),
        env=commands.trainer_environment(config),
        resources=_with_gpus(job.spec.resources.trainer, job.spec.accelerator_resource, config.training_ranks),
    )
    return container | {"ports": [{"name": names.PROGRESS_PORT_NAME, "containerPort": config.progress_port}]}


def _container(
    job: OnlineTrainingJob,
    config: PodConfig,
    layout: Layout,
    image: str,
    *,
    name: str,
    command: list[str],
    env: dict[str, str],
    resources: Manifest | None = None,
) -> Manifest:
    spec = job.spec
    own = commands.shared_environment(config, scratch=layout.scratch) | env
    return _without_nothing(
        {
            "name": name,
            "image": spec.image or image,
            "imagePullPolicy": spec.image_pull_policy,
            "command": command,
            # The user's entries come last: of two with one name the last one counts.
            "env": [*({"name": key, "value": value} for key, value in own.items()), *(v.to_wire() for v in spec.env)],
            "resources": resources,
            "volumeMounts": [
                {"name": names.SHARED_MEMORY_VOLUME, "mountPath": layout.shared_memory},
                {"name": names.SCRATCH_VOLUME, "mountPath": layout.scratch},
                {"name": names.OUTPUT_VOLUME, "mountPath": config.output},
                *spec.volume_mounts,
            ],
            "terminationMessagePolicy": "File",
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            },
        }
    )


def _own_volumes(job: OnlineTrainingJob) -> list[Manifest]:
    output = job.spec.output
    size = job.spec.resources.shared_memory
    claim = {"persistentVolumeClaim": {"claimName": output.claim_name}} if output.claim_name else {"emptyDir": {}}
    return [
        {"name": names.SHARED_MEMORY_VOLUME, "emptyDir": _without_nothing({"medium": "Memory", "sizeLimit": size})},
        {"name": names.SCRATCH_VOLUME, "emptyDir": {}},
        {"name": names.OUTPUT_VOLUME, **claim},
    ]


def _with_gpus(resources: Manifest | None, resource_name: str | None, count: int) -> Manifest | None:
    """`resources` with `count` of the extended resource, which Kubernetes wants as equal request and limit."""
    if resource_name is None:
        return resources
    resources = resources or {}
    gpus = {resource_name: str(count)}
    return resources | {"requests": resources.get("requests", {}) | gpus, "limits": resources.get("limits", {}) | gpus}


def _without_nothing(mapping: Manifest) -> Manifest:
    return {key: value for key, value in mapping.items() if value is not None}
