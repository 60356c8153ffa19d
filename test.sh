#!/usr/bin/env bash
# Installs what is missing (see run/env.sh) and runs the tests: CPU only, no network, a few minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")"
. run/env.sh
# one test needs a browser: root of a Debian gets it if there is a network, everybody else skips that test
if [ ! -x /usr/bin/chromium ] && command -v apt-get && [ "$(id -u)" = 0 ]; then
    export DEBIAN_FRONTEND=noninteractive; timeout 60 apt-get -q update && timeout 180 apt-get -qy install --no-install-recommends chromium
fi </dev/null >/dev/null 2>&1 || true
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
exec "$PY" -m pytest -q -rs "$@" tests
