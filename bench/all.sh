#!/usr/bin/env bash
# bash bench/all.sh     every figure under bench/results again, on one GPU: about 30 minutes of an H200.
# Each line adds to its file if this commit and GPU wrote it, and begins it anew otherwise.
cd "$(dirname "$0")/.." || exit
. run/env.sh
failed=
measure() { "$PY" -m "$@" || failed+=" '$*'"; }
measure bench.trl               # needs trl, datasets, accelerate; measures ours beside it
measure bench.engine decode ours four
measure bench.engine families
measure bench.engine static
measure bench.engine usual
measure bench.engine memory
measure bench.evaluation
measure bench.engine offload    # 99.5 GB of host memory
{
    echo "command: bash test.sh --gpu"
    echo "commit: ${COMMIT:-$(git rev-parse HEAD)}"
    nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
    "$PY" -c 'import platform, torch, transformers as t; print("torch", torch.__version__,
        "transformers", t.__version__, "Python", platform.python_version())'
    bash test.sh --gpu
} >bench/results/tests_gpu.txt 2>&1 || failed+=" 'test.sh --gpu'"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
