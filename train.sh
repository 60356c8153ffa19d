#!/usr/bin/env bash
# bash train.sh                 the toy world from start to finish, with or without a GPU
# bash train.sh rule FILE       your own rule beside its controls on the toy: tables and a page
# bash train.sh data DIR        loads the paper's list and media from the hub (--dry_run; -h)
# bash train.sh 7b [...]        the paper's recipe on this node's GPUs; [...]: options of ktr.py
# bash train.sh 7b --dry_run [...]      a dozen steps with random weights: seconds and memory here
# bash train.sh table RUN ..    scores of runs on the benchmarks, beside published ones (--toy; -h)
#
# The recipe reads from the environment
#   MODEL   starting checkpoint: folder or hub name (default: Video-R1/Qwen2.5-VL-7B-COT-SFT)
#   DATA    training records, JSON (needed)     VIDEOS  folder that their paths start from (DATA's)
#   OUT     checkpoints and logs (runs/7b)      NPROC   processes on this node (one for each GPU)
#   DEVICE  cpu: without a GPU, to try it (docs/running.md)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several nodes: the same command on each
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/run/env.sh"                                    # PY: a Python that has the packages
export PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH}
py() { "$PY" -P "$@"; }                                 # -P: import no file of the folder you are in

toy() {
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    local world=${WORLD:-toy_world} out=${OUT:-runs/toy} start=$HERE/cold_start procs=1 evaluate
    nvidia-smi -L >/dev/null 2>&1 || [ "$(env -u OMP_NUM_THREADS nproc)" = 1 ] || procs=2   # 4 prompts of a step each
    [[ ! " $* " =~ " --out"[\ =] ]] || { echo "error: say OUT=DIR bash train.sh toy, not --out" >&2; exit 2; }
    py -m run.arguments --model - --data - "$@"             # a wrong option is told before the work
    [ -f "$world/test.json" ] || py -m lab.toy make "$world"
    evaluate=("$HERE/evaluate.py" --benchmark toy --data "$world/test.json" --videos "$world"
              --max_new_tokens 64 --batch 100 --dtype float32 --workers 1)
    py "${evaluate[@]}" --model "$start" --out "$out/before"
    NPROC=$procs DEVICE=cpu py -m run.launch "" --model "$start" --data "$world/train.json" --out "$out" \
        --dtype float32 --no_checkpointing --max_new_tokens 64 --prompts_per_step $((8 / procs)) \
        --epochs 1 --lr 5e-5 --warmup_steps 10 --save_every 50 --workers 1 "$@"
    [ "$out/after" -nt "$out/final/config.json" ] || rm -rf "$out/after"        # it was of other weights
    py "${evaluate[@]}" --model "$out/final" --out "$out/after"
    py -m lab.toy table "$out"
    py -m lab.report "$out"
}

recipe() {
    local out=${OUT:-runs/7b} model=${MODEL:-Video-R1/Qwen2.5-VL-7B-COT-SFT} show=lab.report frames
    if [ "${1:-}" = --dry_run ]; then
        shift; out=${OUT:-runs/dry} model=${MODEL:-random:7b} frames=${FRAMES:-16} show="lab.dryrun table"
        DATA=${DATA:-runs/clips$frames/data.json}
        [ -f "$DATA" ] || py -m lab.dryrun clips "$(dirname "$DATA")" --frames "$frames"
        set -- --max_steps 12 --save_every 0 --sample_every 1000000 --max_frames "$frames" "$@"
    fi
    [ -f "${DATA:-}" ] || { echo "error: DATA=${DATA:-} is no file; it names the training records (bash train.sh data DIR loads the paper's)" >&2; exit 1; }
    exec "$PY" -P -m run.launch "$show $out" --model "$model" --data "$DATA" \
        --videos "${VIDEOS:-$(dirname "$DATA")}" --out "$out" "$@"
}

case "${1:-toy}" in
    toy)    [ $# = 0 ] || shift
            [[ ! " $* " =~ " "(-h|--help)" " ]] || exec "$PY" "$HERE/ktr.py" --help
            toy "$@" ;;
    rule)   shift
            [ -f "${1:-}" ] || { echo "error: rule '${1:-}': no such file; bash train.sh rule FILE" >&2; exit 2; }
            HF_HUB_OFFLINE=1 exec "$PY" -P -m lab.study --rule "$@" ;;
    data)   shift; exec "$PY" -P -m lab.download "$@" ;;
    7b)     shift; recipe "$@" ;;
    table)  shift; exec "$PY" -P -m lab.table "$@" ;;
    *)      echo "usage: bash train.sh [toy|7b [options of ktr.py]] (the word comes first), or data DIR, rule FILE, table RUN .." >&2; exit 2 ;;
esac
