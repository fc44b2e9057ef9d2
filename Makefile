# What people type. Everything runs in .venv, with the versions of constraints.txt.
#
#   make demo [FAIL=weather] [RESUME=1]   the main job once, on real flights
#   make ui                               the Prefect UI and the sandbox, until Ctrl-C
#   make server [ARGS="--port 4300"]      a Prefect server on PostgreSQL, until Ctrl-C
#   make receiver [ARGS="--port 4281"]    takes webhooks for the server of PREFECT_API_URL, until Ctrl-C
#   make listen [ARGS="--only NAME"]       SQS queues, Kafka topics, PostgreSQL channels as events, until Ctrl-C
#   make warm-worker [POOL=elt]           a process worker whose runs begin without importing Prefect anew
#   make test [ARGS="-k journal"]         the tests, on all cores
#   make quick                            most of them, in a fraction of the time
#   make check-dbt                        the dbt project: parse, standards, selectors, exposures, ids
#   make pipelines [ARGS=--check]         deployments/pipelines.yaml, from the dbt project's manifest
#   make automations [ENV=dev] [ARGS=--check]       deployments/automations.yaml onto the server of PREFECT_API_URL
#   make deploy [ENV=dev | BRANCH=x]     all deployments on the server of PREFECT_API_URL; ARGS=--check
#   make undeploy BRANCH=x                takes a branch's deployments down again
#   make docs [PROJECT=folder]            the dbt project's own site
#   make lint types check bench

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STATE ?= .sandbox
PROJECT ?= sandbox/dbt
OF_DEMO = $(filter sandbox/dbt,$(PROJECT))

.PHONY: setup demo ui server receiver listen warm-worker test quick lint types check check-dbt docs pipelines \
  automations deploy undeploy bench clean

setup: $(READY)

# uv is ten times faster than pip; pip does as well where uv can't reach the index. Where Python writes no
# bytecode each process would compile Prefect anew, unless it is done here, as pip does.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"elt-flows needs Python 3.11, 3.12 or 3.13; {sys.executable} is {v[0]}.{v[1]}. Say which: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv 2>/dev/null || true
	@$(BIN)/uv pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode) \
	  --python $(BIN)/python -c constraints.txt -e '.[dev]' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/python -m sandbox demo --state $(STATE) $(foreach name,$(FAIL),--fail $(name)) $(if $(RESUME),--resume)

ui: $(READY)
	@$(BIN)/python -m sandbox ui --state $(STATE)

server: $(READY)
	@$(BIN)/python -m deployments.server --data $(STATE)/server $(ARGS)

receiver: $(READY)
	@$(BIN)/python -m deployments.receiver $(ARGS)

warm-worker: $(READY)
	@$(BIN)/python -m deployments.warm --pool $(or $(POOL),elt) $(ARGS)

# SQS queues, Kafka topics and PostgreSQL channels of deployments/listeners.yaml, until Ctrl-C.
listen: $(READY)
	@$(BIN)/python -m deployments.listen $(ARGS)

# A worker per core, each with a Prefect server of its own, so no more than four. ARGS=-n0 for none.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)
	@$(PYTEST) $(ARGS)

# Without the files that start servers, workers or dbt again and again.
quick: $(READY)
	@$(PYTEST) -m "not slow" $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy

check: lint types check-dbt test

check-dbt: $(READY)
	@$(BIN)/python -m deployments.check_dbt $(ARGS)

pipelines: $(READY)
	@$(BIN)/python -m deployments.pipelines $(ARGS)

automations: $(READY)
	@$(BIN)/python -m deployments.automations $(if $(ENV),--env $(ENV)) $(ARGS)

deploy: $(READY)
	@$(BIN)/python -m deployments.deploy $(if $(ENV),--env $(ENV)) $(if $(BRANCH),--branch $(BRANCH)) $(ARGS)

undeploy: $(READY)
	@$(BIN)/python -m deployments.deploy --undeploy $(if $(BRANCH),--branch $(BRANCH)) $(ARGS)

# In the project's folder, where dbt finds its profiles by its own rule: DBT_PROFILES_DIR, here, ~/.dbt. With the
# columns of the warehouse; of the demo's once there is one, of another without ARGS=--empty-catalog.
docs: $(READY)
	@cd $(PROJECT) && $(if $(OF_DEMO),ELT_WAREHOUSE=$(abspath $(STATE))/warehouse.duckdb) \
	  $(abspath $(BIN))/dbt --quiet docs generate --static --target-path $(abspath $(STATE))/docs \
	  --log-path $(abspath $(STATE))/docs \
	  $(if $(OF_DEMO),$(if $(wildcard $(STATE)/warehouse.duckdb),,--empty-catalog)) $(ARGS)
	@echo "The dbt project's site: $(STATE)/docs/static_index.html"

bench: $(READY)
	@$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) $(STATE)
