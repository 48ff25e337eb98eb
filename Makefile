# `make quickstart` and `make test` set up everything they need in .venv and .venv-tl4.
PYTHON ?= python3
TORCH ?= torch==2.13.0
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Threads that spin while they wait make a step ten times as long when anything else runs.
export OMP_WAIT_POLICY = passive
# Tests start many processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart train-example notebooks test test-fast compat lint types docs check clean

quickstart: .venv/ready
	.venv/bin/python -W ignore::DeprecationWarning examples/quickstart.py

# The long way: the model, its decomposition and its report that the quickstart looks at.
train-example: .venv/ready
	.venv/bin/python examples/train_example.py

# From their sources, examples/notebooks/*.py.
notebooks: .venv/test
	.venv/bin/jupytext --quiet --update --to ipynb examples/notebooks/*.py

# One thread per worker: many small tensors, and threads that wait for each other are slower.
ON_TWO = -m pytest -n 2 --dist loadgroup tests
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python $(ON_TWO)
PYTEST_TL4 = OMP_NUM_THREADS=1 .venv-tl4/bin/python $(ON_TWO)

# What trains, and what is repeated for every architecture, runs without checks of types and
# shapes, which take longer than tiny models do. Those of the fast tests, and of some models of
# `make compat` on the other version, cover the same functions.
test: test-fast .venv/browser
	$(PYTEST) -m "slow or compat" -o addopts="--strict-markers -ra"

# For daily use: no ground truth that trains, no other processes, no architectures.
test-fast: .venv/test .venv/browser
	$(PYTEST) -m "not slow and not compat"

# Checks of types and shapes take longer than the models: they see a few models in every test.
compat: .venv-tl4/test
	$(PYTEST_TL4) -m "compat and not repeated"
	$(PYTEST_TL4) -m "compat and repeated" -o addopts="--strict-markers -ra"

lint: .venv/lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/lint
	.venv/bin/pyright --pythonpath .venv/bin/python

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

check: lint types test compat docs

# Of some 16,000 modules in an environment a quarter is ever imported, and compiled then.
INSTALL = -m pip install --quiet --no-compile

# torch comes first, so that nothing else decides which build of it is taken.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(INSTALL) --upgrade pip
	.venv/bin/python $(INSTALL) "$(TORCH)"
	.venv/bin/python $(INSTALL) "transformer-lens==3.9.*" -e .
	touch $@

.venv-tl4/ready: pyproject.toml
	$(PYTHON) -m venv .venv-tl4
	.venv-tl4/bin/python $(INSTALL) --upgrade pip
	.venv-tl4/bin/python $(INSTALL) "$(TORCH)"
	.venv-tl4/bin/python $(INSTALL) "transformer-lens==4.3.*" -e .
	touch $@

%/test: %/ready
	$*/bin/python $(INSTALL) --group test
	touch $@

# Pages are tested in a real browser: the system's; in a container, root's to install; or else one
# that playwright fetches.
.venv/browser: .venv/test
	command -v chromium || command -v chromium-browser || command -v google-chrome \
	|| { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	|| .venv/bin/playwright install chromium
	touch $@

%/lint: %/ready
	$*/bin/python $(INSTALL) --group test --group lint
	touch $@

%/docs: %/ready
	$*/bin/python $(INSTALL) --group docs
	touch $@

clean:
	rm -rf .venv .venv-tl4 site runs .pytest_cache .ruff_cache
