# Sourced by train.sh and test.sh, which set HERE: $PY becomes a Python that has the packages, that of
# .venv if need be. A machine with a GPU gets the releases of torch and transformers that were tested
# on one.
PY=${PYTHON:-python3}
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed (PYTHON=...)" >&2; exit 1; }
# (torch and transformers are not imported for it: that takes seconds)
ready='import av, decord, numpy, PIL, pytest, rouge_score, tqdm, xdist
from importlib import metadata, util
for name, least in {"torch": (2, 11), "transformers": (5, 17)}.items():
    assert util.find_spec(name), f"{name} is missing"
    assert (*map(int, metadata.version(name).split(".")[:2]),) >= least, f"{name} is too old"'
if ! "$PY" -c "$ready" 2>/dev/null; then
    [ -x "$HERE/.venv/bin/python" ] || "$PY" -m venv "$HERE/.venv"
    PY=$HERE/.venv/bin/python
    if ! "$PY" -c "$ready" 2>/dev/null; then
        packages=$HERE/requirements.txt
        ! nvidia-smi -L >/dev/null 2>&1 || packages=$HERE/requirements-gpu.txt
        echo "installing the packages of $(basename "$packages") into .venv ..." >&2
        "$PY" -m pip install --quiet -r "$packages"
    fi
    "$PY" -c "$ready" || { echo "error: the packages did not install; see above" >&2; exit 1; }
fi
