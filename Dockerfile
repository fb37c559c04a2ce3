# One image for CPUs and GPUs:
#
#   docker build -t lowrank_train .                                                             # GPUs, and CPUs too
#   docker build -t lowrank_train --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .   # CPUs alone: smaller
#   docker build -t lowrank_train --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .       # with CUDA's runtime
#
# torch brings the CUDA libraries it needs, so that a GPU needs nothing but the host's driver and its container toolkit;
# the CUDA base is for what else is to run in the container. BASE may be any Debian or Ubuntu with Python 3.11 or newer.
ARG BASE=python:3.12-slim

FROM ${BASE} AS base
ARG TORCH_INDEX=
# Python where the base has none. For GPUs a C compiler and Python's headers: Triton compiles what launches its kernels.
# Versions are the base's own, and every base has others.
# hadolint ignore=DL3008
RUN set -eu; \
    set -- ca-certificates; \
    python3 -c 'import ensurepip' || set -- "$@" python3 python3-venv; \
    case "${TORCH_INDEX}" in \
    */cpu) ;; \
    *) set -- "$@" gcc libc6-dev; \
        ls /usr/local/include/python3*/Python.h || set -- "$@" python3-dev ;; \
    esac; \
    apt-get update; \
    apt-get install --yes --no-install-recommends "$@"; \
    rm -rf /var/lib/apt/lists/*

FROM base AS build
ARG TORCH_INDEX=
ARG EXTRAS=glue,optimizers,peft,tensorboard,wandb
WORKDIR /app
# The dependencies before the sources: a layer that stays as long as they do.
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY lowrank_train/__init__.py lowrank_train/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        --constraint requirements.lock --editable ".[${EXTRAS}]"

FROM base
# Any user may write to the volumes, so that --user works as well.
RUN useradd --uid 10001 --no-log-init --create-home lowrank \
    && install --directory --owner lowrank --mode 1777 /app/runs /cache
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
COPY . /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=passive \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    LOWRANK_TRAIN_CACHE=/cache/lowrank_train \
    MPLCONFIGDIR=/cache/matplotlib
VOLUME ["/app/runs", "/cache"]
WORKDIR /app
USER 10001
# Without torch: a check must not take memory of the GPU that a run is filling.
HEALTHCHECK --interval=5m --timeout=30s --start-period=30s CMD ["lowrank", "doctor", "quick=true"]
ENTRYPOINT ["lowrank"]
CMD ["help"]
