# One BLAS thread a process: several at once wait for each other.
export OMP_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO = .venv-demo
TEST = .venv-test
BENCHES = step_cost conv_patches digits self_tuning

.PHONY: demo test lint bench mutants clean

demo: $(DEMO)/ready
	$(DEMO)/bin/kfaccore train digits-autoencoder --method kfac --against adam,sgd --out runs/demo
	$(DEMO)/bin/kfaccore inspect runs/demo/run.safetensors

test: $(TEST)/ready
	REQUIRE=torch,jax,tensorflow $(TEST)/bin/python -m pytest

lint: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/pyright

bench: $(TEST)/ready
	status=0; for name in $(BENCHES); do $(TEST)/bin/python bench/$$name.py || status=1; done; exit $$status

mutants: $(TEST)/ready
	$(TEST)/bin/python tests/mutants.py

$(DEMO)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP) -e '.[demo]'
	touch $@

# Plain `torch` can resolve to a build with CUDA libraries; the constraint pins the one tested here.
$(TEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python $(PIP) torch
	$(TEST)/bin/python $(PIP) -e '.[dev,torch,jax,jax-models,tensorflow]'
	touch $@

clean:
	rm -rf $(DEMO) $(TEST) runs dist build .pytest_cache .ruff_cache .hypothesis
