# The gateway, without torch or vLLM, and etcd and NATS for small set-ups; without those: `--build-arg EXTRAS=`.
# The first stage has a C compiler for the block index; the image has not.
# docker build -f docker/gateway.Dockerfile -t headrace/gateway .
ARG BASE=python:3.11-slim
FROM ${BASE} AS wheel
RUN command -v cc || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; } || \
      echo "no C compiler to be had: the block index will be plain Python"
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY app app
COPY router router
COPY workers workers
COPY planes planes
COPY process process
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE}
ARG EXTRAS=[local]
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir "$(echo /dist/*.whl)${EXTRAS}"
RUN useradd --create-home headrace && install --directory --owner headrace /data
USER headrace
# So it starts only with keys and secured planes, or with HEADRACE_INSECURE=true.
ENV HEADRACE_HOST=0.0.0.0
EXPOSE 8000
ENTRYPOINT ["headrace"]
CMD ["gateway"]
