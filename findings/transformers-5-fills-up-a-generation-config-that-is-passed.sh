#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0 (torch 2.13.0, CPU), `model.generate(..., generation_config=GenerationConfig(...))`.
# A checkpoint's generation_config.json holds a penalty (no_repeat_ngram_size, repetition_penalty), a least length, or a cut of the
# distribution (min_p). Expected: who passes a whole GenerationConfig is given what it says and nothing else.
# Seen: both versions fill what the passed config leaves open from the checkpoint's, and say nothing. 4.57.6 can be asked not to (the setting as
# None, or use_model_defaults=False). In 5.23.0 None counts as open, too, and that option is refused, so that only a value without
# effect, setting by setting, or another model.generation_config helps. "Greedy" scores of two merges can so be told under different
# penalties, and samples that are taken for a model's own words are cut. (Weights do not matter: random ones repeat themselves, which a penalty forbids.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/fill.py" <<'EOF'
import sys

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
small = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
LlamaForCausalLM(LlamaConfig(**small, bos_token_id=None, eos_token_id=None)).save_pretrained(sys.argv[1])
GenerationConfig(no_repeat_ngram_size=1).save_pretrained(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
prompt = torch.tensor([[5, 6, 7]])


def repeats(setting={}, **more):
    "Whether a token comes twice, which the checkpoint's setting forbids."
    asked = GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0, **setting)
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=asked, **more)[0]
    return len(said.unique()) < len(said)


found = {"passed config alone": repeats(), "with the setting as None": repeats(dict(no_repeat_ngram_size=None))}
try:
    found["use_model_defaults=False"] = repeats(use_model_defaults=False)
except ValueError:
    found["use_model_defaults=False"] = "refused"
model.generation_config = GenerationConfig()
found["checkpoint's own replaced"] = repeats()
print(transformers.__version__, found)
old = transformers.__version__ < "5"
expected = {"passed config alone": False, "with the setting as None": old, "use_model_defaults=False": old or "refused", "checkpoint's own replaced": True}
if found != expected:
    sys.exit("changed: the checkpoint's settings no longer fill up a config that is passed, or can be left out in another way")
EOF
for version in 4.57.6 5.23.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "torch==2.13.0" "transformers==$version"
  "$folder/$version/bin/python" "$folder/fill.py" "$folder/model-$version"
done
echo "as described"
