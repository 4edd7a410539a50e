.PHONY: e2e

e2e: setup cluster images  ## What README says of clusters, done and checked on the test cluster: minutes
	@$(BIN)/pytest -m e2e --durations=0
