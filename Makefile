# make demo: the whole pipeline on built-in data.   make check test: what CI runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo check audit test test-unit test-slow faults cases fuzz test-ray test-airflow images format clean

help:
	@echo "make demo       install into .venv and run prepare -> train -> index -> evaluate on built-in data"
	@echo "make test       install into .venv and run the tests      make test-unit   those without Ray"
	@echo "make test-slow  the tests that take minutes        make cases  logs that other tools failed on, one line each"
	@echo "make faults     failures injected into every stage, and what each costs (tests/faults/README.md)"
	@echo "make test-ray VERSION=2.59.0   the tests that use Ray, on another version of it"
	@echo "make test-airflow   the Airflow DAG over three days, with Airflow in an environment of its own"
	@echo "make images     build the CPU image and run it (ENGINE=docker or podman; BUILD_OPTIONS, docker/README.md)"
	@echo "make fuzz       100,000 malformed records and configurations"
	@echo "make check      ruff, mypy, import contracts, bandit      make format      ruff format"
	@echo "make audit      known vulnerabilities of the locked packages; needs the network"

venv: .venv/.installed

# torch first and alone: no later resolution may pick another build of it.
.venv/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: venv
	$(BIN)/recray run jobs/configs/demo.toml

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --severity-level medium recray docker jobs

# Known vulnerabilities of the locked packages: the only check that needs the network, so `make check` leaves it out.
audit: venv
	test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit; }
	build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip

test: venv
	$(BIN)/python tests/run.py

test-unit: venv
	$(BIN)/python -m pytest tests/unit -m "not slow" -n 2 --dist loadfile

cases: venv
	$(BIN)/python -m pytest tests/unit/test_cases.py -vv

# About 100,000 malformed records and configurations.
fuzz: venv
	RECRAY_FUZZ=9000 $(BIN)/python -m pytest tests/unit/test_malformed.py

test-slow: venv
	$(BIN)/python tests/run.py --slow

faults: venv
	$(BIN)/python -m pytest tests/faults tests/cluster/test_lost_nodes.py -m slow -v

# Everything else is as in the lock, so a failure comes from Ray.
RAY_ENV = build/ray-$(VERSION)

test-ray:
	test -n "$(VERSION)" || { echo "say which: make test-ray VERSION=2.59.0"; exit 2; }
	test -x $(RAY_ENV)/bin/python || $(PYTHON) -m venv $(RAY_ENV)
	sed 's/^ray==.*/ray==$(VERSION)/' requirements.lock > $(RAY_ENV)/requirements.lock
	$(RAY_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep '^torch==' requirements.lock)
	$(RAY_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(RAY_ENV)/requirements.lock
	PYTHONPATH=$(CURDIR) $(RAY_ENV)/bin/python -m pytest -m "not slow" tests/ray

AIRFLOW_ENV = build/airflow

test-airflow: venv
	test -x $(AIRFLOW_ENV)/bin/python || $(PYTHON) -m venv $(AIRFLOW_ENV)
	$(AIRFLOW_ENV)/bin/python -m pip install --quiet --disable-pip-version-check apache-airflow==3.3.2 apache-airflow-providers-amazon
	RECRAY_AIRFLOW=$(CURDIR)/$(AIRFLOW_ENV)/bin/python $(BIN)/python -m pytest tests/cluster/test_airflow.py -m slow -v

ENGINE ?= docker

images: venv
	$(ENGINE) build $(BUILD_OPTIONS) --target cpu -t recray:cpu -f docker/Dockerfile --build-arg COMMIT=$$(git rev-parse HEAD) .
	CONTAINER_ENGINE=$(ENGINE) CONTAINER_BUILD_OPTIONS="$(BUILD_OPTIONS)" RECRAY_TEST_IMAGE=recray:cpu \
		$(BIN)/python -m pytest tests/images -m slow -v

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache
