# Sourced by train.sh and test.sh: $PY becomes a Python that has the packages, that of .venv if need be.
PY=${PYTHON:-python3}
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed (PYTHON=...)" >&2; exit 1; }
# (torch and transformers are not imported for it: that takes seconds)
ready='import av, decord, numpy, PIL, pytest, rouge_score, tqdm, xdist
from importlib import metadata, util
for name, least in {"torch": (2, 11), "transformers": (5, 17)}.items():
    assert util.find_spec(name), f"{name} is missing"
    assert (*map(int, metadata.version(name).split(".")[:2]),) >= least, f"{name} is too old"'
if ! "$PY" -c "$ready" 2>/dev/null; then
    [ -x .venv/bin/python ] || "$PY" -m venv .venv
    PY=.venv/bin/python
    "$PY" -c "$ready" 2>/dev/null || echo "installing the packages of requirements.txt into .venv ..." >&2
    "$PY" -c "$ready" 2>/dev/null || "$PY" -m pip install --quiet -r requirements.txt
    "$PY" -c "$ready" || { echo "error: the packages of requirements.txt did not install; see above" >&2; exit 1; }
fi
