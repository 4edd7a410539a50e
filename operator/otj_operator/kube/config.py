"""Where the API server is and who we are: the kubeconfig that KUBECONFIG names, else the pod's service account.

One source for both clients, ours and kopf's: kopf's own in-cluster login asks DNS for the API server, which a cluster may lack.
"""

from __future__ import annotations

import os

from kubernetes.aio import client, config


async def load_configuration() -> client.Configuration:
    """The configuration of a client; a service account's token in it is read again while it is used.

    Raises:
        kubernetes.aio.config.ConfigException: if there is neither a kubeconfig nor a service account.
    """
    configuration = client.Configuration()
    if os.environ.get("KUBECONFIG"):
        await config.load_kube_config(client_configuration=configuration)
    else:
        config.load_incluster_config(client_configuration=configuration)
    return configuration
