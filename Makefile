PYTHON ?= python

.PHONY: help build install test bench ci clean

help:
	@echo "make build    (re)build the C++ and CUDA parts in this environment, offline"
	@echo "make install  install with everything the tests need"
	@echo "make test     run the tests"
	@echo "make bench    run the attention benchmark, quick mode"
	@echo "make ci       what CI runs: a fresh environment, the tests and the benchmark"
	@echo "make clean    remove build outputs"
	@echo "PYTHON=... picks the interpreter"

build:
	$(PYTHON) -m pip install -e . --no-build-isolation --no-deps

install:
	$(PYTHON) -m pip install -e '.[test]'

test:
	$(PYTHON) -m pytest tests -q -n 2

bench:
	$(PYTHON) benchmarks/attn_bench.py --quick

ci:
	.ci/run

clean:
	rm -rf build dist *.egg-info dalle_fast/_native*.so
