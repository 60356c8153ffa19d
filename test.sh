#!/usr/bin/env bash
# bash test.sh [...]           the tests: CPU only, no network, about six minutes on two cores
# bash test.sh --gpu [...]     the tests that need a GPU (tests/gpu), about five minutes on one
# [...]: options of pytest. What is missing is installed first (run/env.sh).
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd); cd "$HERE"
. run/env.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
if [ "${1:-}" = --gpu ]; then
    shift
    longest_first=(tests/gpu/test_{cold_starts,runs,engine,widths}.py)
    exec "$PY" -m pytest -v -rs -rP --durations=0 -n 3 --dist loadfile --no-loadscope-reorder "$@" \
        "${longest_first[@]}"
fi
# one test needs a browser: it is installed for root on Debian with a network, else that test is skipped
if [ ! -x /usr/bin/chromium ] && command -v apt-get && [ "$(id -u)" = 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    timeout 60 apt-get -q update && timeout 180 apt-get -qy install --no-install-recommends chromium
fi </dev/null >/dev/null 2>&1 || true
export CUDA_VISIBLE_DEVICES=
exec "$PY" -m pytest -q -rs -n 2 --dist loadfile "$@" tests
