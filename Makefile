# make demo   build the example Expression and run it here, no cluster needed
# make test   every test there is, from pure logic to a two-node Kubernetes
# make help   the rest

PYTHON ?= python3
VENV := .venv/bin
DEMO ?= hello

.PHONY: help demo test lint format cluster chaos e2e bench clean

help:
	@echo "make demo      build yaml/test/expression.yaml and run it on this machine (root; no cluster needed)"
	@echo "make test      all tests; RUNGS='unit kernel' climbs only those"
	@echo "make lint      ruff, mypy, import contracts, generated code is current"
	@echo "make format    apply ruff's formatting"
	@echo "make cluster   a two-node Kubernetes in namespaces with cknix installed, and a shell with kubectl"
	@echo "make chaos     what becomes of volumes when parts of a cluster fail (root; an hour; CHAOS=--short: 10 minutes)"
	@echo "make e2e       Kubernetes' own tests of storage drivers (root; 7 minutes; E2E=--short: 3)"
	@echo "make bench     what volumes cost, against what peers do (root; 10 minutes; BENCH=--quick: one)"
	@echo "make clean     remove the virtual environment and caches"

demo:
	@.ci/setup demo
	@$(VENV)/cknix-csi run -f yaml/test/expression.yaml -- $(DEMO)

test:
	@.ci/setup test
	@$(VENV)/python -m tests.ladder $(RUNGS)

lint:
	@.ci/setup lint
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/lint-imports
	$(VENV)/python -m cknix_csi.proto.generate --check

format:
	@.ci/setup lint
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

cluster:
	@.ci/setup test
	@$(VENV)/python -m tests.cluster.harness shell

chaos:
	@.ci/setup test
	@$(VENV)/python -m tests.chaos $(CHAOS)

e2e:
	@.ci/setup test
	@$(VENV)/python -m tests.e2e $(E2E)

bench:
	@.ci/setup bench
	@$(VENV)/python -m bench $(BENCH)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
