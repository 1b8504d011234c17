#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0, CPU): an adapter of a Llama of 6 layers, on the same model without its layers 2 and 3.
# Expected: refused, or a warning that the file has tensors for layers that this model lacks; for an adapter that lacks layers of the model, peft does warn.
# Seen: `PeftModel.from_pretrained` says nothing. A third of the adapter is dropped, and layers 4 and 5, which are 2 and 3 now, get what was learned for the two that are gone.
# transformers' own `load_adapter` prints a report of the tensors it does not use. Depth-pruned models are where this meets people: the names of all adapters still fit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"
cat > "$folder/deeper.py" <<'EOF'
import contextlib
import copy
import io
import logging
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

place = Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
whole = LlamaForCausalLM(config).eval()


def without(model, gone):
    "The model without some layers."
    short = copy.deepcopy(model)
    short.model.layers = torch.nn.ModuleList([layer for i, layer in enumerate(short.model.layers) if i not in gone])
    short.config.num_hidden_layers = len(short.model.layers)
    for i, layer in enumerate(short.model.layers):
        layer.self_attn.layer_idx = i
    return short


def loaded(model, folder):
    "The model with the adapter, and the warnings that speak of its tensors."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    return made, [str(each.message) for each in said if "adapter" in str(each.message) and "key" in str(each.message)]


def deltas(model, i):
    "What the adapter adds to a layer's first projection."
    part = model.base_model.model.model.layers[i].self_attn.q_proj
    return part.get_delta_weight("default")


for name, model in {"deep": whole, "short": without(whole, (2, 3))}.items():
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear"))
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(place / name)
    if name == "deep":
        learned = [deltas(tuned, i).clone() for i in range(6)]

made, said = loaded(without(whole, (2, 3)), place / "deep")
has, wants = (set(get_peft_model_state_dict(model)) for model in (made, PeftModel.from_pretrained(copy.deepcopy(whole), place / "deep")))
with contextlib.redirect_stderr(io.StringIO()) as report, contextlib.redirect_stdout(report):
    logging.getLogger("transformers").addHandler(logging.StreamHandler(report))
    without(whole, (2, 3)).load_adapter(str(place / "deep"))
_, said_of_fewer = loaded(whole, place / "short")
got = [next(j for j, delta in enumerate(learned) if torch.equal(deltas(made, i), delta)) for i in range(4)]
print("warnings for an adapter of 6 layers on 4:", len(said), " for one of 4 layers on 6:", len(said_of_fewer))
for now, before in enumerate((0, 1, 4, 5)):
    print(f"layer {now} (before: {before}) has what was learned for layer {got[now]}")
print("tensors that were dropped:", len(wants - has), "of", len(wants), " transformers' report:", "UNEXPECTED" in report.getvalue())
if said or not said_of_fewer or got != [0, 1, 2, 3] or 3 * len(wants - has) != len(wants) or "UNEXPECTED" not in report.getvalue():
    sys.exit("the behaviour has changed")
EOF
"$folder/venv/bin/python" "$folder/deeper.py" "$folder" 2> "$folder/said" || { tail -20 "$folder/said"; exit 1; }
