#!/usr/bin/env bash
# transformers 5.22.0 (torch 2.13.0, CPU), Llama 4's text model: several texts on one line, positions that start again, as its DataCollatorWithFlattening makes them.
# Expected: a text says the same on a line as alone, as it does with Llama; chunks of attention (8,192 tokens in released models) begin with the text.
# Seen: chunks are counted from the beginning of the line. Every text is shorter than a chunk, so that no token of it loses anything when it stands alone;
# on a line the text that lies across a multiple of the chunk's size no longer sees its own beginning, without a word. The texts before it are right.
# transformers 5.23.0 counts from the beginning of the text: both agree to rounding there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.22.0"
cat > "$folder/chunks.py" <<'EOF'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Llama4TextConfig

transformers.logging.set_verbosity_error()
CHUNK = 64
torch.manual_seed(0)
config = Llama4TextConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, attention_chunk_size=CHUNK, num_local_experts=2, max_position_embeddings=256,
)
model = AutoModelForCausalLM.from_config(config).eval()
texts = [torch.randint(3, 90, (length,)).tolist() for length in (40, 50, 30)]  # the second one lies on token 64 of the line, the third on none
batch = DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
batch.pop("labels")
apart = []
with torch.no_grad():
    line, start = model(**batch, use_cache=False).logits[0], 0
    for text in texts:
        alone = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        apart.append(((line[start : start + len(text)] - alone).abs().amax(-1) / alone.abs().max()).tolist())
        start += len(text)
border = CHUNK - len(texts[0])
print(f"transformers {transformers.__version__}, largest difference from the text alone: " + ", ".join(f"{max(a):.1e}" for a in apart))
print(f"second text before the border: {max(apart[1][:border]):.1e}, behind it: {max(apart[1][border:]):.1e}")
if not (max(apart[0]) < 1e-4 and max(apart[1][:border]) < 1e-4 and max(apart[1][border:]) > 1e-2 and max(apart[2]) < 1e-4):
    sys.exit("the behaviour has changed")
EOF
"$folder/venv/bin/python" "$folder/chunks.py" 2> "$folder/said" || { tail -20 "$folder/said"; exit 1; }
