"""What a pod that does not train yet waits for, as one sentence."""

from __future__ import annotations

from otj_operator.plan.observed import ContainerView, PodView

_TROUBLES = frozenset(
    {
        *("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "ImageInspectError", "InvalidImageName"),
        *("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"),
    }
)


def waiting_for(pod: PodView) -> str:
    """Why the trainer container of `pod` does not run yet."""
    if pod.unschedulable:
        return f"No node takes the pod: {pod.unschedulable}"
    for container in (pod.model, pod.generator, pod.trainer):
        if container.state == "waiting" and container.reason in _TROUBLES:
            return f"Container {container.name}: {container.reason}: {container.message or 'see its events'}"
    if pod.model.state == "running":
        return "The model container fetches or checks the model."
    if not pod.model.state:
        return "The pod waits for a node."
    return "The containers are being started: images are pulled and volumes mounted."


def generator_state(generator: ContainerView) -> str:
    """Why the generator does not answer yet."""
    if generator.restarts:
        return f"vLLM was started again ({generator.restarts} restarts); it ended before with: {generator.previous_end or 'no word'}"
    return "vLLM is starting." if generator.state == "running" else "vLLM has not been started yet."
