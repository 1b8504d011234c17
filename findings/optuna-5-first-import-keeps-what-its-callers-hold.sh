#!/usr/bin/env bash
# optuna 5.0.0, installed alone: imported for the first time inside a function, below callers that hold something large (a model, say).
# Expected: what the callers held is freed once they have returned, as after the second import, or an import of another package.
# Seen: it stays for as long as the process lives. optuna keeps the ModuleNotFoundError of each package that it can do without and does not find (redis, of its journal
# storage), and its traceback keeps the frame of every caller above the import with all its variables. Imported in a thread of its own it holds nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "optuna==5.0.0"
cat > "$folder/held.py" <<'EOF'
import gc
import importlib
import sys
import threading
import weakref


class Model:
    pass


def trained(how):
    model = Model()
    held = weakref.ref(model)
    if how == "here":
        importlib.import_module("optuna")
    else:
        thread = threading.Thread(target=importlib.import_module, args=("optuna",))
        thread.start()
        thread.join()
    return held


def is_held(how):
    held = trained(how)
    gc.collect()
    return held() is not None


first, second = is_held(sys.argv[1]), is_held("here")
errors = sorted({str(error) for error in gc.get_objects() if isinstance(error, ModuleNotFoundError) and error.__traceback__})
print(f"optuna {sys.modules['optuna'].__version__}, imported {sys.argv[1]}: held after the first import {first}, after the second {second}; errors that are kept: {errors}")
sys.exit((first, second) != (sys.argv[1] == "here", False) or errors != ["No module named 'redis'"])
EOF
"$folder/venv/bin/python" "$folder/held.py" here && "$folder/venv/bin/python" "$folder/held.py" apart || { echo "the behaviour has changed"; exit 1; }
