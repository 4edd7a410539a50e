# A Kubernetes cluster for tests: the one of OTJ_KUBECONFIG, kind where Docker runs, else one of our own (docs/cluster.md).
.PHONY: cluster cluster-down images

cluster: setup  ## Start the test cluster (or find it) with 4 fake GPUs
	@$(BIN)/python -m tests.cluster up

cluster-down: setup  ## End the test cluster and clean up after it
	@$(BIN)/python -m tests.cluster down

images: setup  ## Build both images and put them into the test cluster
	@$(BIN)/python -m tests.cluster images
