# One BLAS thread a process: several at once wait for each other.
export OMP_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

PYTHON ?= python3
, := ,
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO = .venv-demo
TEST = .venv-test
ZOO = .venv-zoo
BENCHES = step_cost conv_patches digits self_tuning torch_step torch_steps_to_target solve_cost_by_width brand_scaling \
	singd_memory fngd_epochs block_quality two_term_epochs two_level advise jax_step tf_step pinn long_runs gpu \
	operations memory analysis compress influence laplace

.PHONY: demo test lint docs bench zoo zoo-jax zoo-tensorflow mutants campaigns clean test-release

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

# Every block of code on the pages is run; an error, a warning or a link that leads nowhere fails it.
docs: $(TEST)/docs
	$(TEST)/bin/python -m sphinx -E -W --keep-going -q -j 2 -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(TEST)/ready
	status=0; for name in $(BENCHES); do $(TEST)/bin/python bench/$$name.py || status=1; done; exit $$status

# Records and default shells on about thirty public models, then loops of other libraries; --quick with ARGS takes six.
zoo: $(ZOO)/ready
	status=0; for name in torch_zoo torch_loops; do $(ZOO)/bin/python bench/$$name.py $(ARGS) || status=1; done; \
		exit $$status

zoo-jax: $(TEST)/ready
	$(TEST)/bin/python bench/jax_zoo.py $(ARGS)

# Keras models: TensorFlow is in the environment of the tests.
zoo-tensorflow: $(TEST)/ready
	$(TEST)/bin/python bench/tf_zoo.py $(ARGS)

mutants: $(TEST)/ready
	$(TEST)/bin/python tests/mutants.py

# The long forms of tests/campaigns, two at a time; the short ones, but for that of CUDA, run in `make test`.
campaigns: $(TEST)/ready
	$(MAKE) --keep-going --output-sync=target --jobs=2 $(CAMPAIGNS)

FUZZ = $(TEST)/bin/python tests/campaigns/fuzz.py --count
CAMPAIGNS = fuzz-strict fuzz-jax fuzz-numpy-0 fuzz-numpy-1 fuzz-torch hostile kill ranks numerics terminals cuda-on-cpu
.PHONY: $(CAMPAIGNS)
fuzz-numpy-0 fuzz-numpy-1:
	$(FUZZ) 10000 --part $(@:fuzz-numpy-%=%)/2
fuzz-torch fuzz-strict:
	$(FUZZ) 2000 --namespace $(@:fuzz-%=%)
fuzz-jax:
	$(FUZZ) 2000 --namespace jax --shapes 5
hostile:
	$(TEST)/bin/python tests/campaigns/hostile.py --count 1000
kill:
	$(TEST)/bin/python tests/campaigns/kill.py --count 100
ranks:
	$(TEST)/bin/python tests/campaigns/ranks.py --count 10
numerics:
	$(TEST)/bin/python tests/campaigns/numerics.py --count 20
terminals:
	$(TEST)/bin/python tests/campaigns/terminals.py --count 400
cuda-on-cpu:
	$(TEST)/bin/python tests/campaigns/cuda_on_cpu.py

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

$(TEST)/docs: $(TEST)/ready
	$(TEST)/bin/python $(PIP) -e '.[docs]'
	touch $@

# The oldest that pyproject.toml allows on PYTHON, and the newest that an installer finds on the newest Python there is:
# $(call versions,Python,what constraints.txt does not pin,extras,pins,REQUIRE,tests). ARGS goes to pytest.
MATRIX ?= .venv-matrix
MATRICES = jax torch numpy tensorflow
NEWEST_PYTHON ?= $(or $(lastword $(shell $(PYTHON) tests/campaigns/pythons.py)),$(PYTHON))
define versions
	$(1) -m venv --clear $(MATRIX)/$@
	grep -vE '^($(2))==' constraints.txt > $(MATRIX)/$@/constraints.txt
	$(MATRIX)/$@/bin/python -m pip install --quiet --disable-pip-version-check -c $(MATRIX)/$@/constraints.txt \
		-e '.[test$(3)]' $(4)
	$(MATRIX)/$@/bin/python -m pip list --disable-pip-version-check | grep -iE '^($(2)) '
	REQUIRE=$(5) $(MATRIX)/$@/bin/python -m pytest $(6) $(ARGS)
endef
.PHONY: $(MATRICES:%=test-%-matrix) $(MATRICES:%=test-%-oldest) $(MATRICES:%=test-%-newest)

# flax 0.11 takes jax 0.6 but cannot scan with it.
JAX = jax|jaxlib|flax|optax|equinox|dm-haiku
test-jax-matrix: test-jax-oldest test-jax-newest
test-jax-oldest:
	$(call versions,$(PYTHON),$(JAX),$(,)jax$(,)jax-models,keras jax==0.6.0 'flax<0.11',jax,tests/test_jax_*.py)
test-jax-newest:
	$(call versions,$(NEWEST_PYTHON),$(JAX),$(,)jax$(,)jax-models,keras jax,jax,tests/test_jax_*.py)

test-torch-matrix: test-torch-oldest test-torch-newest
test-torch-oldest:
	$(call versions,$(PYTHON),torch,$(,)torch,torch==2.6.0,torch,tests/test_torch_*.py)
test-torch-newest:
	$(call versions,$(NEWEST_PYTHON),torch,$(,)torch,torch,torch,tests/test_torch_*.py)

# What runs on NumPy's arrays alone: the laws, the core, the command line.
NUMPY_TESTS = tests --ignore-glob='*/test_torch*' --ignore-glob='*/test_jax*' --ignore-glob='*/test_tensorflow*'
test-numpy-matrix: test-numpy-oldest test-numpy-newest
test-numpy-oldest:
	$(call versions,$(PYTHON),numpy|scipy,,numpy==2.0.0 scipy==1.16.0,,$(NUMPY_TESTS))
test-numpy-newest:
	$(call versions,$(NEWEST_PYTHON),numpy|scipy,,numpy scipy,,$(NUMPY_TESTS))

# TensorFlow 2.18 wants a NumPy below 2.1.
KERAS = tensorflow.cpu|keras|numpy|scipy
test-tensorflow-matrix: test-tensorflow-oldest test-tensorflow-newest
test-tensorflow-oldest:
	$(call versions,$(PYTHON),$(KERAS),$(,)tensorflow,tensorflow-cpu==2.18.0 keras==3.10.0,tensorflow,tests/test_tensorflow*.py)
test-tensorflow-newest:
	$(call versions,$(NEWEST_PYTHON),$(KERAS),$(,)tensorflow,tensorflow-cpu keras,tensorflow,tests/test_tensorflow*.py)

# The wheel and the sdist, each in an empty environment of each Python that there is, used from an empty folder.
test-release: $(TEST)/ready
	rm -rf dist
	$(TEST)/bin/python -m build
	$(TEST)/bin/python tests/campaigns/release.py $(PYTHONS:%=--python %) dist/*.whl dist/*.tar.gz

clean:
	rm -rf $(DEMO) $(TEST) $(ZOO) $(MATRIX) runs dist build docs/_build docs/generated .pytest_cache .ruff_cache .hypothesis
