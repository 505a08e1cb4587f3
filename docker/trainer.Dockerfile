# Flows, stages and training. How far this was run: docs/operations.md, "With Docker".
#
#   docker build -f docker/trainer.Dockerfile -t rlhf-trainer .
#   docker run --gpus all --ipc=host -v rlhf:/rlhf rlhf-trainer rlhf run --preset bloom-560m
#
# With `--build-arg PAGES=1` also the playground and `rlhf serve`.
# torch's CUDA wheels bring the CUDA libraries; the host needs the driver and the container toolkit.
FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="rlhf-trainer" \
      org.opencontainers.image.description="RLHF as a Prefect workflow: stages on GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"

# gcc: Triton compiles its kernels where they run.
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*
# /locks is for a volume that all containers of one machine share: there jobs lock their GPUs.
RUN useradd --create-home --uid 1000 rlhf \
    && mkdir -p /rlhf/prefect /locks \
    && chown -R rlhf /rlhf /locks

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    GOMP_SPINCOUNT=3000 \
    RLHF_HOME=/rlhf \
    RLHF_LOCKS=/locks \
    PREFECT_HOME=/rlhf/prefect \
    DO_NOT_TRACK=1

WORKDIR /app
COPY requirements/torch.txt ./
RUN pip install -r torch.txt
# Not empty: what `rlhf playground` and `rlhf serve` need, too.
ARG PAGES=
COPY requirements/build.txt requirements/run.txt requirements/train.txt requirements/demo.txt \
     requirements/pages.txt ./
# What builds source packages comes first: none may fetch tools of its own. pip refuses a file whose
# hash is another.
RUN pip install --no-deps --require-hashes -r build.txt \
    && pip install --no-deps --no-build-isolation --require-hashes -r run.txt -r train.txt \
       -r demo.txt ${PAGES:+-r pages.txt}
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
# tini reaps the ranks and hands SIGTERM on, so that a stopped container leaves no rank behind. No
# command in here: workers of Docker and Kubernetes start their own behind it.
ENTRYPOINT ["tini", "--"]
CMD ["rlhf", "--help"]
