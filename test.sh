#!/usr/bin/env bash
# Installs what is missing (see env.sh) and runs the tests: CPU only, no network, a few minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
exec "$PY" -m pytest -q "$@" tests
