# Every target sets up what it needs: the environment in .venv is built once and rebuilt when
# pyproject.toml or constraints.txt change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# The first interpreter that is Python 3.11 or 3.12; override with `make PYTHON=... test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
TORCH := torch==2.13.0
# Test processes side by side; one file stays in one process.
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_TF := .venv-tf/.installed
INSTALLED_TPU := .venv-tpu/.installed
SOURCES := bootpig_jax data_gen benchmarks tests
WEIGHTS := bootpig_jax/toyland/weights

# What XLA's programs on a CPU are faster with.
CPU_ENV := source launch/cpu_env.sh &&

.PHONY: install quickstart app toyland reproduce test test-tfds libtpu test-tpu test-tpu-long test-long mutants torture bench-train bench-sample lint typecheck format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt constraints-app.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed: install it, or name it with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv: on Debian, apt-get install python3-venv" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch goes first and alone, so that nothing else's requirements choose its build.
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[data-gen,eval,dev]'
	$(BIN)/python -m pip install --no-deps -r constraints-app.txt
	touch $(INSTALLED)

quickstart: $(INSTALLED)
	$(CPU_ENV) $(BIN)/python -m bootpig_jax.toyland.quickstart

# The page to draw with, on the models that ship with the project.
app: $(INSTALLED)
	$(CPU_ENV) $(BIN)/python -m bootpig_jax.app --model $(WEIGHTS)/sd --bootpig $(WEIGHTS)/bootpig \
		--steps 20 --guidance 3 --image-guidance 3 --examples toyland

# Trains the models that ship with the project from nothing, or goes on doing so.
toyland: $(INSTALLED)
	$(CPU_ENV) $(BIN)/python -m bootpig_jax.toyland.train_sd --run runs/toyland_sd --output $(WEIGHTS)/sd
	$(CPU_ENV) $(BIN)/python -m data_gen.run --config configs/data_gen_toyland.yaml
	$(CPU_ENV) $(BIN)/python -m bootpig_jax.train --config configs/toyland.yaml
	mkdir -p $(WEIGHTS)/bootpig
	cp -r runs/toyland/training/{base_unet,ref_unet,bootpig.json} $(WEIGHTS)/bootpig/
	$(CPU_ENV) $(BIN)/python -m bootpig_jax.toyland.evaluate --cases 256 --output runs/toyland/report.json

# The paper's tables and figures in miniature, or goes on making them.
reproduce: $(INSTALLED)
	$(CPU_ENV) $(BIN)/python -m bootpig_jax.toyland.reproduce

test: lint typecheck
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Whether TensorFlow opens what data_gen writes. In an environment of its own: nothing else here
# needs TensorFlow.
test-tfds: $(INSTALLED) $(INSTALLED_TF)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m tests.tfds_dump "$$folder" && \
	TF_CPP_MIN_LOG_LEVEL=3 .venv-tf/bin/python tests/tfds_check.py "$$folder"

$(INSTALLED_TF): constraints-tf.txt
	test -x .venv-tf/bin/python || $(PYTHON) -m venv .venv-tf
	.venv-tf/bin/python -m pip install -c constraints-tf.txt tensorflow-cpu tensorflow-datasets
	touch $(INSTALLED_TF)

# The compiler for TPUs, of the version that belongs to the pinned JAX. In a folder of its own, for
# PYTHONPATH: where it is installed beside JAX, every program that does not ask for the CPU looks for
# a TPU, prints errors and locks the next one out.
libtpu: $(INSTALLED) $(INSTALLED_TPU)

$(INSTALLED_TPU): constraints-tpu.txt
	$(BIN)/python -m pip install --no-deps --upgrade --target .venv-tpu -r constraints-tpu.txt
	touch $(INSTALLED_TPU)

# Whether that compiler takes what a TPU is given; no TPU is needed.
test-tpu: libtpu
	PYTHONPATH=.venv-tpu $(BIN)/python -m pytest tests/tpu_compiler.py

# Attention of every size, for every generation. More than half an hour.
test-tpu-long: libtpu
	PYTHONPATH=.venv-tpu $(BIN)/python -m pytest -m long -n $(WORKERS) tests/tpu_compiler.py

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m "long and not torture" -n $(WORKERS) --dist loadfile -rP

# Plants small faults in a copy of the project, one after the other: do the tests find them? Goes on
# where it was stopped.
mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants --workers $(WORKERS)

# All promises about runs that are killed, damaged or fed badly, as a table; the kills ten times as
# often as in test-long. More than an hour.
torture: $(INSTALLED)
	$(BIN)/python -m pytest -m "torture or promise"

# One training step against the same in PyTorch; not beside other work. On an accelerator:
# `python -m benchmarks.train --device gpu`.
bench-train: $(INSTALLED)
	$(BIN)/python -m benchmarks.train --device cpu --output benchmarks/results/train_cpu.json

# One guided step of sampling at full size against the same in PyTorch; about 75 minutes, and 12 GB.
bench-sample: $(INSTALLED)
	$(BIN)/python -m benchmarks.sample time --device cpu --output benchmarks/results/sample_cpu.json

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: $(INSTALLED)
	$(BIN)/mypy bootpig_jax data_gen

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv .venv-tf .venv-tpu .cache
