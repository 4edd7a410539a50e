"""What may change of a run that exists, and who may act on it.

The pods of a Job cannot change, so most of the spec cannot either. What can is what Kubernetes lets change of a Job: `suspend`, because
pausing is the point of it; `backoffLimit`, `activeDeadlineSeconds` and `ttlSecondsAfterFinished`, because a run that goes well longer
than was thought should not have to be thrown away for that. None of them changes what is trained.
"""

from __future__ import annotations

OPERATOR = "onlinetraining.dev/operator"
"""The value of `managedBy` that stands for this project's operator."""

CHANGEABLE = ("suspend", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")

_POD = "the pods of a Job cannot change once it exists"
_RUN = "checkpoints and metrics of two different runs would mix in one output"

FIXED = {
    **dict.fromkeys(("algorithm", "model", "dataset", "rewards", "training", "trainer", "lora", "rollout", "output"), _RUN),
    **dict.fromkeys(("gpus", "nodes", "generation", "accelerate", "accelerator", "resources"), _POD),
    **dict.fromkeys(("image", "imagePullPolicy", "env", "volumes", "volumeMounts"), _POD),
    **dict.fromkeys(("nodeSelector", "tolerations", "affinity", "priorityClassName", "serviceAccountName"), _POD),
    "managedBy": "the controller that it names may have begun its work",
}
"""Every other field of the spec, and why it is fixed."""
