# A worker. FLAVOR=cpu (default): vLLM on CPU; cuda: vLLM on CUDA; sim: the simulated engine, no torch.
# docker build -f docker/worker.Dockerfile --build-arg FLAVOR=sim -t headrace/worker .
# Wheels put into docker/wheels/ are preferred to an index: torch's CPU build for an offline build, say.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG FLAVOR=cpu
WORKDIR /src
COPY docker/wheels /wheels
RUN if [ "$FLAVOR" = cpu ]; then \
      pip install --no-cache-dir --find-links /wheels torch==2.13.0+cpu || \
      pip install --no-cache-dir torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu; \
    fi
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY app app
COPY router router
COPY workers workers
COPY planes planes
RUN pip install --no-cache-dir --find-links /wheels ".[$FLAVOR]" && \
    case "$FLAVOR" in \
      sim) pip install --no-cache-dir --no-deps nixl-cu12==1.5.1 ;; \
      cpu) pip uninstall -y torchvision torchaudio torchcodec triton ;; \
    esac && rm -rf /src /wheels
WORKDIR /
RUN useradd --create-home headrace
USER headrace
ENV HEADRACE_HOST=0.0.0.0
ENTRYPOINT ["headrace", "worker"]
