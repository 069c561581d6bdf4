#!/usr/bin/env bash
# Builds the native libraries into ./frd_kernels, for work on the tree. FRD_CUDA=OFF skips the CUDA library.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
PATH="$(dirname "$(command -v "$python")"):$PATH" "$python" setup.py -q build_ext
