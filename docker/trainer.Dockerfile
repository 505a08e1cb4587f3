# Everything: flows, stages and training. Never built or run here; see README.md, "What was run".
#
#   docker build -f docker/trainer.Dockerfile -t rlhf-trainer .
#   docker run --gpus all --ipc=host -v rlhf:/rlhf rlhf-trainer run --preset bloom-560m
#
# torch's CUDA wheels bring the CUDA libraries; the host needs the driver and the container toolkit.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    RLHF_HOME=/rlhf

WORKDIR /app
COPY requirements/ requirements/
RUN pip install -r requirements/torch.txt \
    && pip install setuptools wheel \
    && pip install --no-deps --no-build-isolation -r requirements/lock.txt
COPY . .
RUN pip install --no-deps --no-build-isolation . \
    && useradd --create-home --uid 1000 rlhf \
    && mkdir -p /rlhf && chown rlhf /rlhf

USER rlhf
VOLUME /rlhf
WORKDIR /rlhf
# tini reaps the ranks and hands SIGTERM on, so that a stopped container leaves no rank behind.
ENTRYPOINT ["tini", "--", "rlhf"]
CMD ["--help"]
