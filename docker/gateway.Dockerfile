# The gateway, without torch or vLLM; with `--build-arg EXTRAS=[local]` also etcd and NATS for small set-ups.
# docker build -f docker/gateway.Dockerfile -t headrace/gateway .
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=[local]
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY router router
COPY workers workers
COPY planes planes
RUN pip install --no-cache-dir ".${EXTRAS}" && rm -rf /src
WORKDIR /
RUN useradd --create-home headrace
USER headrace
ENV HEADRACE_HOST=0.0.0.0
EXPOSE 8000
ENTRYPOINT ["headrace"]
CMD ["gateway"]
