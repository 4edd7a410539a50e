"""Names that several processes must agree on: containers, labels, volumes, files."""

MODEL_CONTAINER = "model"
GENERATOR_CONTAINER = "generator"
TRAINER_CONTAINER = "trainer"

JOB_LABEL = "onlinetraining.dev/job"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "online-training-operator"

SUSPENDED_BY_ANNOTATION = "onlinetraining.dev/suspended-by"
"""On a Job (or a Kueue Workload) that this operator suspended: only what it suspended does it ever resume."""

KUEUE = "kueue.x-k8s.io"
QUEUE_LABEL = f"{KUEUE}/queue-name"
COPIED_LABELS = (QUEUE_LABEL, f"{KUEUE}/priority-class", f"{KUEUE}/max-exec-time-seconds")
"""Labels that go from the OnlineTrainingJob to its Job: there Kueue reads them."""
COPIED_ANNOTATIONS = f"{KUEUE}/podset-"
"""Annotations that start so go to the pod template: Kueue's wishes about topology."""

SHARED_MEMORY_VOLUME = "shared-memory"
SCRATCH_VOLUME = "scratch"
OUTPUT_VOLUME = "output"

PROGRESS_PORT_NAME = "progress"
PROGRESS_ROUTE = "/progress"
STATUS_ROUTE = "/status"
HEALTH_ROUTE = "/healthz"

GENERATE_ROUTE = "/otj/generate"
"""The generator's, for rollouts."""

SERVED_MODEL = "policy"
"""Name under which vLLM serves the model being trained."""

ENGINE_HEADER = "X-data-parallel-rank"
"""Names the engine of a data-parallel vLLM server that a request goes to."""

METRICS_FILE = "metrics.jsonl"
"""In the output folder: one JSON object per optimizer step, see `otj_runtime.pod.metrics`."""

NON_ROOT_UID = 65532
