# Everything runs from a fresh clone: each target sets up what is missing first.
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check faults bench airflow airflow-stop test-airflow lock

# The first Python that is new enough.
PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.14 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## the environment in .venv: packages, Java if there is none, Delta's jars
	@if [ -z "$(PYTHON)" ]; then \
		echo "set-up: Python 3.11 or newer is needed, and this machine has $$(python3 --version 2>/dev/null || echo none)." \
			"Install one (Debian, Ubuntu: apt install python3 python3-venv), or run make PYTHON=/path/to/python3.11" >&2; \
		exit 2; fi
	@$(PYTHON) -m jobs.setup

quickstart: setup ## the whole chain on a real grocery log, from nothing to report/report.html (ARGS='--households 20')
	@.venv/bin/iat quickstart $(ARGS)

test: setup ## the tests (ARGS='-k days' runs some)
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

check: setup ## ruff, format, mypy strict, import contracts
	@.venv/bin/python -m jobs.setup_airflow
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/mypy --python-executable .venv-airflow/bin/python --package dags
	@.venv/bin/lint-imports

faults: setup ## every job killed, raced, reordered, out of disk and with wrong clocks (N=200, ARGS='--seed 7')
	@.venv/bin/python -m tests.faults.run --num $(or $(N),20) $(ARGS)

bench: setup ## what the README claims of speed, measured (ONLY=fetch runs one; ARGS='--json FILE')
	@.venv/bin/python -m benchmarks$(addprefix .,$(ONLY)) $(ARGS)

# A folder for its database and logs, a file of settings, a port.
AIRFLOW = .venv/bin/python -m jobs.airflow
AT = "$(or $(AIRFLOW_HOME),lake/airflow/home)" "$(or $(SETTINGS),dags/settings.toml)" "$(or $(PORT),8080)"
airflow: setup ## a local Airflow with the DAGs, in the background (SETTINGS=my.toml PORT=8090)
	@$(AIRFLOW) start $(AT)

airflow-stop: ## end it, and all that it started
	@$(AIRFLOW) stop $(AT)

test-airflow: setup ## the DAGs on a real scheduler (ARGS="-m 'not slow'" is what CI runs)
	@.venv/bin/python -m jobs.setup_airflow
	@IAT_TEST_AIRFLOW=1 .venv/bin/python -m pytest tests/airflow -o timeout=5400 -o faulthandler_timeout=5500 $(ARGS)

# --universal: one file for every Python from 3.11 on; --no-emit-index-url: it names no host.
LOCK = .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
lock: setup ## resolve requirements.lock again, within pyproject.toml's ranges
	@$(LOCK) --upgrade --extra spark --extra torch --extra data --extra lineage --extra dev pyproject.toml --output-file requirements.lock
	@$(LOCK) --upgrade --group airflow pyproject.toml --output-file requirements-airflow.lock
	@$(LOCK) --upgrade --group bench pyproject.toml --output-file requirements-bench.lock
