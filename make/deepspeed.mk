# An environment beside .venv that also has DeepSpeed: no image of ours has it, and it compiles what it needs of itself when it runs.
.PHONY: test-deepspeed

DEEPSPEED := build/deepspeed

$(DEEPSPEED)/.installed: requirements.txt tests/requirements-deepspeed.txt | setup
	$(UV) venv --quiet --allow-existing --python $(BIN)/python $(DEEPSPEED)
	VIRTUAL_ENV=$(DEEPSPEED) $(UV) pip sync --quiet --compile-bytecode requirements.txt
	VIRTUAL_ENV=$(DEEPSPEED) $(UV) pip install --quiet --no-deps --editable operator --editable runtime
	VIRTUAL_ENV=$(DEEPSPEED) DS_BUILD_OPS=0 $(UV) pip install --quiet --no-deps --no-build-isolation -r tests/requirements-deepspeed.txt
	@touch $@

test-deepspeed: $(DEEPSPEED)/.installed  ## ZeRO-3 on two CPU ranks, in an environment of its own
	$(DEEPSPEED)/bin/pytest -m deepspeed --durations=0
