"""A Kubernetes cluster for tests, with four fake GPUs, on a machine that may have neither Docker nor a network of images.

`python -m tests.cluster up` chooses one of three clusters (`providers`): the one that `OTJ_KUBECONFIG` names, kind where a
Docker engine answers, else a one-node cluster of real Kubernetes binaries that are built once per machine from their Go
modules (`binaries`) and run as plain processes (`node`, ended by `cleanup`). `images` builds the project's two images and
puts them into the cluster, `device_plugin` advertises the GPUs, `volumes` the persistent volumes. `docs/cluster.md` explains
how they meet.

What it trades: the own cluster needs root and has no DNS and no image registry, and in return it is up in seconds, runs the
released code of Kubernetes, and can be looked at with ordinary process tools.
"""
