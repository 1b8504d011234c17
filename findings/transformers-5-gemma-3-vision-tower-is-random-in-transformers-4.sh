#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6 (torch 2.13.0, CPU): a small Gemma 3 with a vision tower, saved by the newer, loaded by the older.
# Expected: save_pretrained turns names back into those that Gemma 3's checkpoints have always had, as it does for the text model, so that both read one model.
# Seen: 5.23 writes the tower without the `vision_model.` that stood in its names. It reads its own file whole; 4.57 finds no tensor of the tower (all of them are
# missing, as many are unexpected), draws it at random and only warns: the text model is right, and what is seen of a picture differs with every seed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
cat > "$folder/save.py" <<'EOF'
import sys

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

torch.manual_seed(0)
text = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=16)
vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
tokens = dict(image_token_index=299, boi_token_index=298, eoi_token_index=297, mm_tokens_per_image=4)
Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens)).save_pretrained(sys.argv[1])
EOF
cat > "$folder/load.py" <<'EOF'
import sys

import torch
import transformers
from transformers import Gemma3ForConditionalGeneration

transformers.logging.set_verbosity_error()
seen, towers = [], []
for seed in (1, 2):
    torch.manual_seed(seed)
    model, told = Gemma3ForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
    towers.append({name: tensor for name, tensor in model.state_dict().items() if "vision_tower" in name})
    seen.append((len(told["missing_keys"]), len(told["unexpected_keys"])))
    assert all("vision_tower" in name for name in told["missing_keys"])
drawn = [name for name, tensor in towers[0].items() if tensor.dim() > 1 and not torch.equal(tensor, towers[1][name])]
print(transformers.__version__, "missing and unexpected:", seen[0], "of", len(towers[0]), "tensors of the tower; matrices that differ with the seed:", len(drawn))
whole = seen[0] == (0, 0) and not drawn
lost = seen[0] == (len(towers[0]), len(towers[0])) and len(drawn) > 5
sys.exit(0 if (whole if transformers.__version__.startswith("5") else lost) else 1)
EOF
"$folder/venv/bin/python" "$folder/save.py" "$folder/saved" 2> "$folder/said" || { tail -20 "$folder/said"; exit 1; }
"$folder/venv/bin/python" "$folder/load.py" "$folder/saved" 2> "$folder/said" || { tail -20 "$folder/said"; echo "another behaviour in 5.23.0"; exit 1; }
"$folder/venv/bin/pip" install --quiet "transformers==4.57.6"
"$folder/venv/bin/python" "$folder/load.py" "$folder/saved" 2> "$folder/said" || { tail -20 "$folder/said"; echo "another behaviour in 4.57.6"; exit 1; }
echo "as stated"
