# The gateway and all commands, without torch or vLLM; etcd and NATS have images of their own (planes.Dockerfile).
# What compiles and installs stays in the first stage: the image has neither a compiler nor pip's leftovers.
# docker build -f docker/gateway.Dockerfile -t headrace/gateway .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS needs
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && \
    { python3 -c 'import ensurepip' 2>/dev/null || apt-get install -y --no-install-recommends python3-venv; } && \
    { test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
      apt-get install -y --no-install-recommends python3-dev; } && \
    python3 -m venv /installer && python3 -m venv --without-pip /opt/headrace
WORKDIR /src
COPY pyproject.toml docker/requirements.py ./
RUN python3 requirements.py local nkeys otel >requirements.txt && \
    /installer/bin/pip --python /opt/headrace/bin/python install --no-cache-dir -r requirements.txt

FROM needs AS code
COPY hatch_build.py README.md LICENSE ./
COPY app app
COPY router router
COPY workers workers
COPY planes planes
COPY process process
RUN /installer/bin/pip --python /opt/headrace/bin/python install --no-cache-dir --no-deps --prefix /code . && \
    test $(find /code -name 'libblock_*.so' | wc -l) = 2 && find /code -name '_compiled__mypyc*.so' | grep -q .

FROM ${BASE}
RUN useradd --uid 1000 --create-home headrace
COPY --from=needs /opt/headrace /opt/headrace
COPY --from=code /code /opt/headrace
COPY docker/probe.py /usr/local/lib/headrace/probe.py
USER headrace
# HEADRACE_HOST: so it starts only with keys and secured planes, or with HEADRACE_INSECURE=true.
ENV PATH=/opt/headrace/bin:$PATH HEADRACE_HOST=0.0.0.0 HEADRACE_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD python3 /usr/local/lib/headrace/probe.py "$HEADRACE_HOST" "$HEADRACE_PORT" /live ${HEADRACE_TLS_CERT:+https}
ENTRYPOINT ["headrace"]
CMD ["gateway"]
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Headrace gateway" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
