# Prefect's server, the worker that runs pipelines, and the command `rlhf`. No torch, so it cannot
# train; stages run in the trainer image. How far this was run: docs/operations.md, "With Docker".
#
#   docker build -f docker/orchestrator.Dockerfile -t rlhf-orchestrator .
#   docker run -p 127.0.0.1:4200:4200 -v prefect:/rlhf rlhf-orchestrator
#
# With `--build-arg KUBERNETES=1` also the client for `launcher.type: kubernetes`.
# One image, several roles: health checks stand with the roles, in compose.yaml.
FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="rlhf-orchestrator" \
      org.opencontainers.image.description="RLHF as a Prefect workflow: server and pipelines" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN apt-get update \
    && apt-get install --no-install-recommends -y tini \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 rlhf \
    && mkdir -p /rlhf/prefect \
    && chown -R rlhf /rlhf

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RLHF_HOME=/rlhf \
    PREFECT_HOME=/rlhf/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false

WORKDIR /app
# Not empty: what `launcher.type: kubernetes` needs, too.
ARG KUBERNETES=
COPY requirements/build.txt requirements/run.txt requirements/kubernetes.txt ./
# What builds source packages comes first: none may fetch tools of its own. pip refuses a file whose
# hash is another.
RUN pip install --no-deps --require-hashes -r build.txt \
    && pip install --no-deps --no-build-isolation --require-hashes -r run.txt \
       ${KUBERNETES:+-r kubernetes.txt}
COPY pyproject.toml README.md LICENSE ./
COPY rlhf_core/ rlhf_core/
COPY tasks/ tasks/
COPY flows/ flows/
COPY deployments/ deployments/
RUN pip install --no-deps --no-build-isolation . \
    && rm -rf build rlhf_pipeline.egg-info

USER rlhf
VOLUME /rlhf
WORKDIR /rlhf
EXPOSE 4200
ENTRYPOINT ["tini", "--"]
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]
