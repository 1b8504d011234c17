#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, CPU), its DataCollatorWithFlattening: two texts in one row, positions that start again.
# Expected: the second text's logits do not depend on the first, or an error says that the model cannot keep texts apart.
# Seen with the collator's defaults: Llama keeps them apart to rounding; LFM2, Qwen3-Next, Jamba, MiniMax, RecurrentGemma, MPT and
# Bloom do not, and none says so. With return_seq_idx=True LFM2 and Qwen3-Next raise (their kernels are not installed), but Jamba,
# MiniMax, RecurrentGemma, MPT and Bloom go on mixing in silence: fine-tuning on packed rows trains on a neighbour's text.
# Random weights exaggerate nothing that matters here: what counts is 0 or not 0. Convolutions are scaled up to what trained ones reach.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
cat > "$folder/leak.py" <<'EOF'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

transformers.logging.set_verbosity_error()
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8)
MODELS = {
    "llama": {},
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "qwen3_next": LINEAR | dict(layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, num_experts=2, use_mamba_kernels=False),
    "minimax": dict(layer_types=["linear_attention", "full_attention"], num_local_experts=2, head_dim=8, block_size=8),
    "recurrent_gemma": dict(lru_width=32, head_dim=8, attention_window_size=16),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2),
    "bloom": dict(n_layer=2, n_head=4),
}
EXPECTED = {name: ("mixed", "mixed") for name in MODELS} | {"llama": ("apart", "apart"), "lfm2": ("mixed", "refused"), "qwen3_next": ("mixed", "refused")}


def ask(model, one, two, seq_idx):
    batch = DataCollatorWithFlattening(return_seq_idx=seq_idx)([{"input_ids": one}, {"input_ids": two}])
    batch.pop("labels")
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([two]), use_cache=False).logits[0]
        try:
            packed = model(**batch, use_cache=False).logits[0, len(one) :]
        except ValueError:
            return "refused", float("nan")
    apart = float((packed - alone).abs().max() / alone.abs().max())
    return "mixed" if apart > 1e-3 else "apart", apart


seen = {}
for name, options in MODELS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | options)).eval()
    for key, parameter in model.named_parameters():
        if "conv" in key:
            parameter.data.mul_(5)
    one, two = (torch.randint(3, 60, (n,)).tolist() for n in (9, 7))
    answers = [ask(model, one, two, seq_idx) for seq_idx in (False, True)]
    seen[name] = tuple(kind for kind, _ in answers)
    print(f"{name:16} positions only: {answers[0][0]} ({answers[0][1]:.1e})   with seq_idx: {answers[1][0]} ({answers[1][1]:.1e})")
if seen != EXPECTED:
    sys.exit(f"the behaviour has changed: {seen}")
EOF
"$folder/venv/bin/python" "$folder/leak.py" 2> "$folder/said" || { tail -20 "$folder/said"; exit 1; }
