# SPDX-License-Identifier: Apache-2.0
# Makefile - the commands of this repository, for people and for CI alike. Needs a POSIX make and
# shell, Python >= 3.10 and a C and C++ compiler; everything else goes into the virtual environment
# .venv.
.POSIX:
.SUFFIXES:

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
JOBS ?= 2
MINUTES ?= 2
ARGS ?=

python = $(VENV)/bin/python
wheels_python = build/wheels/venv/bin/python
setup = PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" sh .ci/setup

help:
	@echo 'make demo          denoise a short video with and without wan_attn; results in demo-out/'
	@echo 'make test          the tests'
	@echo 'make nightly       what make test leaves out: more compilers, dtypes and planted bugs'
	@echo 'make check         formatters, linters, types, warnings as errors, sanitizers, tables of the docs'
	@echo 'make check-fast    the part of it that takes seconds; pre-commit runs it, too'
	@echo 'make fuzz          the campaign against faults; MINUTES=10 ARGS="--seed 7"'
	@echo 'make format        put C and Python sources into their format'
	@echo 'make tables        write the generated tables of the documentation'
	@echo 'make bench         the benchmarks that need no GPU (an idle machine tells more)'
	@echo 'make build         the C library and the torch shim, beside wan_attn/'
	@echo 'make wheel         a wheel for this platform, in dist/'
	@echo 'make wheels        the wheels of every platform and the sdist, in dist/ (0.7 GB of tools)'
	@echo 'make wheels-check  what can be read from them; made again, they must be the same bytes'
	@echo 'make wheels-test   runs them: here, under wine, under qemu'
	@echo 'make wheels-quick  those for this machine alone: made, read and run'
	@echo 'make install-matrix   every way to install, beside several torch versions (GBs)'
	@echo 'make ptx-matrix    every CUDA kernel of every compiler here, run from its PTX; planted bugs'
	@echo 'make host-matrix   the tests with several versions of diffusers and transformers'
	@echo 'make clean         remove everything that these have made, except .venv'
	@echo
	@echo 'PYTHON=python3.12            another Python                    (now: $(PYTHON))'
	@echo 'TORCH="torch==2.9.1"         another torch; pip options go too (now: $(TORCH))'
	@echo 'ARGS="..."                   more arguments for demo, test, bench, *-matrix'

demo:
	@echo '== environment for the demo'
	@$(setup) demo
	@echo '== demo'
	@$(python) -m wan_attn demo $(ARGS)

# Two workers: most of a test's time is Python, which does not use a second core.
test:
	@echo '== environment for the tests'
	@$(setup) test,demo$${WAN22_DIR:+,wan22-tests}
	@sh .ci/step tests $(python) -m pytest -q -n $(JOBS) $(ARGS)

nightly:
	@echo '== environment for the tests'
	@$(setup) test,demo
	@sh .ci/step nightly $(python) -m pytest -q -n $(JOBS) -m nightly $(ARGS)

fuzz:
	@echo '== environment for the tests'
	@$(setup) test,demo
	@echo '== fuzz'
	@$(python) tests/fuzz/run.py --minutes $(MINUTES) $(ARGS)

# What each of these runs is said once, in .ci/check-fast and .ci/check-c.
check: check-fast check-warnings check-analyzers check-sanitizers check-tables
	@echo '== check: all good'

check-environment:
	@echo '== environment for the checks'
	@$(setup) test,demo
	@$(setup) tools

# The part that pre-commit runs as well.
check-fast: check-environment
	@PYTHON=$(python) sh .ci/check-fast

check-format check-lint check-types check-spelling check-scripts check-files check-rules \
check-commits: check-environment
	@PYTHON=$(python) sh .ci/check-fast step $(@:check-%=%)

check-warnings: check-environment
	@PYTHON=$(python) sh .ci/check-c warnings

check-analyzers: check-environment
	@PYTHON=$(python) sh .ci/check-c analyzers

check-sanitizers: check-environment
	@PYTHON=$(python) sh .ci/check-c sanitizers

check-tables: check-environment
	@sh .ci/step 'tables of the documentation' $(python) .ci/readme_tables.py --check

format: check-environment
	@PYTHON=$(python) sh .ci/check-fast format-now

tables: check-environment
	@$(python) .ci/readme_tables.py --write

build:
	@echo '== build'
	@$(setup) test,demo

bench:
	@echo '== environment for the benchmarks'
	@$(setup) bench
	@echo '== benchmark: the cost of a call'
	@$(python) benchmarks/bench_overhead.py
	@echo '== benchmark: the CPU kernels, into build/bench'
	@$(python) benchmarks/bench_cpu.py --out build/bench $(ARGS)

wheel: build
	@echo '== wheel'
	@$(python) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

wheels-environment:
	@echo '== environment for the wheels'
	@mkdir -p build/wheels
	@PYTHON="$(PYTHON)" VENV=build/wheels/venv sh .ci/setup wheels

wheels: wheels-environment
	@rm -rf dist
	@sh .ci/step 'wheels of every platform' env PYTHONPATH=.ci $(wheels_python) -m wheels.build $(ARGS)

# The second build has its own caches, NVRTC's results too: one of them could hide what differs.
wheels-check: wheels-environment
	@rm -rf build/wheels/again
	@sh .ci/step 'wheels, made again' env PYTHONPATH=.ci \
		WAN_ATTN_KEPT="$$PWD/build/wheels/again/cubin" $(wheels_python) -m wheels.build \
		--work build/wheels/again --out build/wheels/again/dist
	@sh .ci/step 'wheels: what can be read from them' env PYTHONPATH=.ci $(wheels_python) \
		-m wheels.check --again build/wheels/again/dist
	@rm -rf build/wheels/again

# The part of the three above that CI has time for.
wheels-quick: wheels-environment build
	@rm -rf build/wheels/quick
	@sh .ci/step 'wheels for this machine' env PYTHONPATH=.ci $(wheels_python) -m wheels.build \
		--only manylinux_2_17_$$(uname -m) any sdist --out build/wheels/quick
	@sh .ci/step 'wheels for this machine: read' env PYTHONPATH=.ci $(wheels_python) \
		-m wheels.check build/wheels/quick
	@sh .ci/step 'wheels for this machine: run' env PYTHONPATH=.ci $(wheels_python) \
		-m wheels.test build/wheels/quick --quick --torch $(python)

wheels-test: wheels-environment build
	@sh .ci/step 'wheels: run' env PYTHONPATH=.ci $(wheels_python) -m wheels.test \
		--torch $(python) $(ARGS)

install-matrix:
	@echo '== every way to install'
	@PYTHONPATH=tests/support $(PYTHON) tests/install_matrix.py $(ARGS)

ptx-matrix: build
	@echo '== kernels from their PTX'
	@PYTHONPATH=tests:tests/support $(python) tests/ptx/matrix.py $(ARGS)
	@PYTHONPATH=tests:tests/support $(python) -m ptx.bugs

host-matrix: build
	@echo '== several versions of diffusers and transformers'
	@PYTHONPATH=tests/support $(python) tests/host_matrix.py $(ARGS)

clean:
	@echo '== clean'
	@rm -rf build dist demo-out ./*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@rm -f wan_attn/*.so wan_attn/*.dll wan_attn/*.dylib "$(VENV)"/.made-test "$(VENV)"/.made-demo
	@rm -rf wan_attn/cuda/cubin
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: help demo test nightly fuzz ptx-matrix check check-environment check-fast check-format check-lint check-types \
	check-spelling check-scripts check-files check-rules check-commits check-warnings \
	check-analyzers check-sanitizers check-tables format tables build bench wheel wheels \
	wheels-environment wheels-check wheels-quick wheels-test install-matrix \
	host-matrix clean
