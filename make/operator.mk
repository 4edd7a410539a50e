generate: setup  ## Write what is made from the models: the table of training arguments, the CRD, install.yaml, docs/conditions.md
	$(BIN)/python -m otj_runtime.train.arguments
	$(BIN)/python -m otj_operator.crd .
