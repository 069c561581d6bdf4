# syntax=docker/dockerfile:1
# Images of `frd`, one for CPUs and one for NVIDIA GPUs; docs/deploy.md says how to build and run them:
#   docker build --target cpu -t frd .
#   docker build --target cuda -t frd:cuda .
ARG BASE=python:3.12-slim-bookworm

# torch alone, so that a change of the code does not install it again.
FROM ${BASE} AS torch
ENV PATH=/opt/frd/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG TORCH_INDEX=""
COPY constraints.txt /opt/frd/
RUN python3 -m venv /opt/frd \
    && pip install -c /opt/frd/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch torchvision

FROM torch AS compilers
# The wheel is compiled and used on the same base, whatever its version of g++.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install -c /opt/frd/constraints.txt setuptools cmake ninja
WORKDIR /src

FROM compilers AS wheel-cpu
COPY . .
RUN FRD_CUDA=OFF pip wheel --no-deps --no-build-isolation -w /wheels .

FROM torch AS runtime
ARG EXTRAS="heif c2pa web"
WORKDIR /opt/frd
COPY pyproject.toml tools/dependencies.py ./
# shellcheck disable=SC2086
RUN pip install -c constraints.txt setuptools \
    && python dependencies.py ${EXTRAS} > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
# Any user may be named by `docker run --user`: caches go to a folder that all can write, and torch asks for a name.
RUN useradd --uid 1000 frd && install -d -m 1777 /home/frd /work
ENV HOME=/home/frd USER=frd
WORKDIR /work
# As the first process, Python would not end on SIGTERM.
STOPSIGNAL SIGINT
ENTRYPOINT ["frd"]
CMD ["--help"]

FROM runtime AS cpu
RUN --mount=type=bind,from=wheel-cpu,source=/wheels,target=/wheels \
    pip install --no-deps /wheels/*.whl && frd info
USER 1000

# nvcc comes as a package too: torch pins the version of cuda-toolkit. It looks for what it links in lib64.
FROM compilers AS wheel-cuda
RUN pip install -c /opt/frd/constraints.txt "cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]" \
    && ln -s /opt/frd/lib/python3*/site-packages/nvidia/cu13 /usr/local/cuda \
    && ln -s lib /usr/local/cuda/lib64 \
    && ln -s libcudart.so.13 /usr/local/cuda/lib/libcudart.so
COPY . .
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0;12.0"
RUN FRD_CUDA=ON pip wheel --no-deps --no-build-isolation -w /wheels .

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=wheel-cuda,source=/wheels,target=/wheels \
    pip install --no-deps /wheels/*.whl && frd info
USER 1000
