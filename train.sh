#!/usr/bin/env bash
# bash train.sh              the toy world from start to finish, on any machine, with a GPU or without
# bash train.sh rule FILE     a rule of your own against its controls: tables and a page (about 14 minutes on two cores)
# bash train.sh data DIR      the paper's list and its media, from the hub (--dry_run: what that takes; -h)
# bash train.sh 7b [...]     the paper's recipe on this node's GPUs; what follows goes to ktr.py
# bash train.sh 7b --dry_run [...]     a dozen steps with random weights and synthetic clips: seconds and memory here
# bash train.sh table RUN ..  benchmarks x frames of runs and checkpoints, beside the published figures (-h; --toy)
#
# The recipe reads from the environment
#   MODEL   checkpoint folder or hub name (Video-R1/Qwen2.5-VL-7B-COT-SFT)     DATA     its records, JSON (needed)
#   VIDEOS  folder the records' paths start from (DATA's)                      OUT      checkpoints, logs (runs/7b)
#   NPROC   processes on this node (all GPUs)       DEVICE=cpu  to try the recipe without one, with MODEL=cold_start
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several nodes: the same command on each, with its NODE_RANK
set -euo pipefail
for name in DATA VIDEOS OUT; do         # relative paths are those of where you are
    [ -z "${!name:-}" ] || [ "${!name:0:1}" = / ] || export "$name=$PWD/${!name}"
done
for word in "$@"; do                    # and so are files among the arguments
    shift
    [ ! -f "$word" ] || [ "${word:0:1}" = / ] || word=$PWD/$word
    set -- "$@" "$word"
done
from=$PWD
cd "$(dirname "$0")"
. run/env.sh

there() {           # a module of ours, in the folder where you are
    [ "${PY:0:1}" != . ] || PY=$PWD/$PY
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    cd "$from"; exec "$PY" -P -m "$@"      # -P: not the modules that lie where you are
}

toy() {
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}        # tiny products: threads only wait
    local world=${WORLD:-toy_world} out=${OUT:-runs/toy} evaluate
    [[ ! " $* " =~ " --out"[\ =] ]] || { echo "error: say OUT=DIR bash train.sh toy, not --out" >&2; exit 2; }
    "$PY" -c 'import sys; from attribution import check_names; from run.options import parse
sys.argv[0] = "train.sh"; check_names(parse())' --model - --data - "$@"    # a slip is told before the work
    [ -f "$world/test.json" ] || "$PY" -m lab.toy make "$world"
    evaluate=(evaluate.py --benchmark toy --data "$world/test.json" --videos "$world"
              --max_new_tokens 64 --batch 100 --dtype float32 --workers 1)
    "$PY" "${evaluate[@]}" --model cold_start --out "$out/before"
    "$PY" ktr.py --model cold_start --data "$world/train.json" --out "$out" --dtype float32 \
        --no_checkpointing --max_new_tokens 64 --prompts_per_step 8 --epochs 1 --lr 5e-5 \
        --warmup_steps 10 --save_every 50 --workers 1 "$@"
    [ "$out/after" -nt "$out/final/config.json" ] || rm -rf "$out/after"        # of other weights
    "$PY" "${evaluate[@]}" --model "$out/final" --out "$out/after"
    "$PY" -m lab.toy table "$out"
    "$PY" -m lab.report "$out"
}

recipe() {
    local dry= asked gpus nproc run
    asked=$("$PY" -c 'import inspect, torch, torch.distributed.run as run
print(torch.cuda.device_count(), "--shutdown-timeout" in inspect.getsource(run))')
    gpus=${asked% *}
    if [ "$gpus" = 0 ] && [ "${DEVICE:-}" != cpu ]; then
        echo "error: no GPU found; the 7B recipe needs some (MODEL=cold_start DEVICE=cpu tries it with a tiny model)" >&2
        exit 1
    fi
    if [ "${1:-}" = --dry_run ]; then
        shift; dry=1 MODEL=${MODEL:-random:7b} OUT=${OUT:-runs/dry} FRAMES=${FRAMES:-16}
        [ -n "${DATA:-}" ] || DATA=runs/clips$FRAMES/data.json
        [ -f "$DATA" ] || "$PY" -m lab.dryrun clips "$(dirname "$DATA")" --frames "$FRAMES"
        set -- --max_steps 12 --save_every 0 --sample_every 1000000 --max_frames "$FRAMES" "$@"
    fi
    if [ -z "${DATA:-}" ]; then
        echo "error: DATA is not set; it names the file of training records (bash train.sh data DIR loads the paper's)" >&2; exit 1
    fi
    nproc=${NPROC:-$([ "$gpus" = 0 ] && echo 1 || echo "$gpus")}
    if [ -n "$dry" ] && [ "$gpus" = 1 ] && [ "$nproc" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        echo "note: on one GPU the optimizer's state stays in host memory (--offload)"
        set -- --offload "$@"
    fi
    set -- --model "${MODEL:-Video-R1/Qwen2.5-VL-7B-COT-SFT}" --data "$DATA" \
        --videos "${VIDEOS:-$(dirname "$DATA")}" --out "${OUT:-runs/7b}" "$@"
    LOCAL_WORLD_SIZE=$nproc "$PY" ktr.py "$@" --check
    run=("$PY" -m torch.distributed.run --nproc_per_node "$nproc")
    if [ "${NNODES:-1}" = 1 ]; then run+=(--standalone); else
        run+=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?NODE_RANK is not set}"
              --master_addr "${MASTER_ADDR:?MASTER_ADDR is not set}"
              --master_port "${MASTER_PORT:-29500}")
    fi
    # a checkpoint of the 7B can take longer to write than the 30 s that torchrun leaves after
    # SIGTERM (torch 2.13 lets us say)
    [[ $asked != *True ]] || run+=(--shutdown-timeout 900)
    trap 'kill -TERM "$child"' TERM INT             # torchrun hands it on; every rank saves and leaves
    "${run[@]}" ktr.py "$@" & child=$!
    wait "$child" || wait "$child"                  # a signal ends the first wait
    [ "${NODE_RANK:-0}" = 0 ] || return 0
    if [ -n "$dry" ]; then
        "$PY" -m lab.dryrun table "$OUT"
    else
        "$PY" -m lab.report "${OUT:-runs/7b}"
        echo "next: bash train.sh table ${MODEL:-Video-R1/Qwen2.5-VL-7B-COT-SFT} ${OUT:-runs/7b} --data DIR"
    fi
}

case "${1:-toy}" in
    data) shift; there lab.download "$@" ;;
    table) shift; there lab.table "$@" ;;
    7b) shift; recipe "$@" ;;
    rule)
        shift
        [ -f "${1:-}" ] || { echo "error: rule '${1:-}': no such file; bash train.sh rule FILE" >&2; exit 2; }
        HF_HUB_OFFLINE=1 exec "$PY" -m lab.study --rule "$@"
        ;;
    toy)
        [ $# = 0 ] || shift
        [[ ! " $* " =~ " "(-h|--help)" " ]] || exec "$PY" ktr.py --help
        toy "$@"
        ;;
    *) echo "usage: bash train.sh, or bash train.sh toy|7b [options of ktr.py], or bash train.sh data DIR, rule FILE or table RUN .." >&2; exit 2 ;;
esac
