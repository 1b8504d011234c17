#!/usr/bin/env bash
# mergekit 0.1.5, mergekit-extract-lora (peft 0.21.2, transformers 5.23.0, torch 2.13.0, CPU): a fine-tune of all weights, full rank.
# Expected: base and extracted adapter together give the fine-tune, or what an adapter of this kind cannot hold is named.
# Seen: a Llama comes back to rounding. A Qwen2, whose queries, keys and values have biases, does not: the adapter has "bias": none,
# the moved biases are left out, and the command ends with status 0 and says nothing. With biases that did not move it is exact.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "mergekit==0.1.5"
cat > "$folder/extract.py" <<'EOF'
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

ROOT, PROGRAM = Path(sys.argv[1]), Path(sys.executable).with_name("mergekit-extract-lora")
SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
WORDS = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
IDS = torch.arange(2, 30)[None]


def lost(name, config, moved):
    "What base and adapter together lack of the fine-tune, as a share of what it changed; whether anything was said of a bias."
    torch.manual_seed(0)
    place = ROOT / name
    for part in ("base", "tuned"):
        PreTrainedTokenizerFast(tokenizer_object=WORDS, unk_token="w0", eos_token="w1").save_pretrained(place / part)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(place / "base")
    tuned = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if any(part in key for part in moved):
                parameter.add_(0.02 * torch.randn_like(parameter))
    tuned.save_pretrained(place / "tuned")
    command = [PROGRAM, "--model", place / "tuned", "--base-model", place / "base", "--out-path", place / "lora", "--max-rank", "128"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        wanted, start = tuned(IDS).logits, base(IDS).logits
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / "lora").eval()(IDS).logits
    return ((found - wanted).norm() / (wanted - start).norm()).item(), "bias" in (done.stdout + done.stderr).lower()


weights = ("proj.weight", "embed", "lm_head")
seen = {
    "llama": lost("llama", LlamaConfig(**SMALL), weights),
    "qwen2, biases as they were": lost("still", Qwen2Config(**SMALL), weights),
    "qwen2, biases moved": lost("moved", Qwen2Config(**SMALL), (*weights, "bias")),
}
for name, (share, told) in seen.items():
    print(f"{name:28} lost: {share:.1e}   a word of biases: {told}")
gone, told = seen.pop("qwen2, biases moved")
if gone < 0.05 or told or any(share > 1e-4 for share, _ in seen.values()):
    sys.exit(f"the behaviour has changed: {seen}, {gone}, {told}")
EOF
"$folder/venv/bin/python" "$folder/extract.py" "$folder" 2> "$folder/said" || { tail -20 "$folder/said"; exit 1; }
