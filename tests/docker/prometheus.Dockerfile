# Debian's Prometheus, laid out as the image prom/prometheus is: the compose file is tried with it where no registry can be reached.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* /etc/prometheus && \
    install --directory --owner nobody /prometheus
USER nobody
WORKDIR /prometheus
VOLUME /prometheus
ENTRYPOINT ["prometheus"]
