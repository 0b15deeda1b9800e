# One BLAS thread a process: several at once wait for each other.
export OMP_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO = .venv-demo
TEST = .venv-test
ZOO = .venv-zoo
BENCHES = step_cost conv_patches digits self_tuning torch_step torch_steps_to_target solve_cost_by_width brand_scaling \
	singd_memory fngd_epochs block_quality two_term_epochs two_level advise jax_step tf_step pinn long_runs

.PHONY: demo test lint bench zoo mutants campaigns test-jax-matrix clean

demo: $(DEMO)/ready
	$(DEMO)/bin/kfaccore train digits-autoencoder --method kfac --against adam,sgd --out runs/demo
	$(DEMO)/bin/kfaccore inspect runs/demo/run.safetensors

# TensorFlow in a process of its own: beside other frameworks it can abort it.
test: $(TEST)/ready
	REQUIRE=torch,jax $(TEST)/bin/python -m pytest -n 2 --ignore-glob='*/test_tensorflow*'
	REQUIRE=tensorflow $(TEST)/bin/python -m pytest -n 2 tests/test_tensorflow*.py

lint: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/pyright

bench: $(TEST)/ready
	status=0; for name in $(BENCHES); do $(TEST)/bin/python bench/$$name.py || status=1; done; exit $$status

# Records and default shells on about thirty public models, then loops of other libraries; --quick with ARGS takes six.
zoo: $(ZOO)/ready
	status=0; for name in torch_zoo torch_loops; do $(ZOO)/bin/python bench/$$name.py $(ARGS) || status=1; done; \
		exit $$status

mutants: $(TEST)/ready
	$(TEST)/bin/python tests/mutants.py

# The long forms of tests/campaigns; the short ones run in `make test`.
campaigns: $(TEST)/ready
	$(TEST)/bin/python tests/campaigns/fuzz.py --count 10000
	$(TEST)/bin/python tests/campaigns/fuzz.py --count 2000 --namespace torch
	$(TEST)/bin/python tests/campaigns/fuzz.py --count 2000 --namespace strict
	$(TEST)/bin/python tests/campaigns/fuzz.py --count 2000 --namespace jax --shapes 5
	$(TEST)/bin/python tests/campaigns/hostile.py --count 1000
	$(TEST)/bin/python tests/campaigns/kill.py --count 100

$(DEMO)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP) -e '.[demo]'
	touch $@

$(ZOO)/ready: pyproject.toml constraints-zoo.txt
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-zoo.txt -e '.[zoo]'
	touch $@

# Plain `torch` can resolve to a build with CUDA libraries; the constraint pins the one tested here.
$(TEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python $(PIP) torch
	$(TEST)/bin/python $(PIP) -e '.[dev,torch,jax,jax-models,tensorflow]'
	touch $@

# The oldest JAX that pyproject.toml allows and the newest that this Python takes, beside the other pins; flax 0.11 takes
# jax 0.6 but cannot scan with it.
test-jax-matrix:
	for v in 0.6.0 newest; do \
		env=.venv-jax-$$v; wanted="jax==$$v flax<0.11"; [ $$v != newest ] || wanted=jax; \
		$(PYTHON) -m venv $$env && \
		grep -vE '^(jax|jaxlib|flax|optax|equinox|dm-haiku)==' constraints.txt > $$env/constraints.txt && \
		$$env/bin/python -m pip install --quiet --disable-pip-version-check -c $$env/constraints.txt \
			-e '.[test,jax,jax-models]' keras $$wanted && \
		REQUIRE=jax $$env/bin/python -m pytest tests/test_jax_*.py || exit 1; done

clean:
	rm -rf $(DEMO) $(TEST) $(ZOO) .venv-jax-* runs dist build .pytest_cache .ruff_cache .hypothesis
