#!/usr/bin/env bash
# bash bench/all.sh     every figure of one GPU in bench/results again: about 25 minutes of an H200.
# The lines can be run one by one; each adds to its file if this commit and GPU wrote it, and begins
# it anew otherwise. COMMIT names the commit where only its files are.
set -o pipefail
cd "$(dirname "$0")/.." || exit
. run/env.sh
export COMMIT=${COMMIT:-$(git rev-parse HEAD)}
[ -n "$COMMIT" ] || exit
failed=
what="^(command|commit|NVIDIA|torch )|PASSED|FAILED|ERROR|nats|peak|norms|first steps|s call|passed|failed"
measure() { "$PY" -m "$@" || failed+=" '$*'"; }
measure bench.engine decode ours plain lengths four
measure bench.engine families
measure bench.engine static
measure bench.engine usual
measure bench.engine memory
measure bench.evaluation
measure bench.trl               # needs trl, datasets, accelerate; measures ours beside it
{
    echo "command: bash test.sh --gpu"
    echo "commit: $COMMIT"
    nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
    "$PY" -c 'import platform, torch, transformers as t; print("torch", torch.__version__,
        "transformers", t.__version__, "Python", platform.python_version())'
    bash test.sh --gpu
} 2>&1 | grep -E "$what" \
    >bench/results/tests_gpu.txt || failed+=" 'test.sh --gpu'"
measure bench.engine offload    # 99.5 GB of host memory
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
