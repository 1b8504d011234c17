#!/usr/bin/env bash
# treescope 0.1.10 with torch 2.13.0 (CPU) and numpy 2.3.5: a tensor, a parameter or a module in what is shown.
# Expected: treescope.render_to_text(torch.zeros(2, 2)) names its dtype and shape.
# Seen: AttributeError: 'Tensor' object has no attribute 'names' (torch 2.13 has no named tensors any more), so treescope.display(model)
# of any torch model fails. What holds no tensors is shown, and so is a plain vector of two numbers; with a `names` of nothing for all tensors, the others are, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "treescope==0.1.10" "numpy==2.3.5"
"$folder/venv/bin/python" - <<'EOF'
import sys

import torch
import treescope

print("torch", torch.__version__, "treescope", treescope.__version__)
SHOWN = {"tensor": torch.zeros(2, 2), "parameter": torch.nn.Parameter(torch.zeros(2)), "module": torch.nn.Linear(2, 2)}
STATED = "AttributeError: 'Tensor' object has no attribute 'names'"


def told(value):
    try:
        return treescope.render_to_text(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


seen = {name: told(value) for name, value in SHOWN.items()}
plain = told({"a list": [1, 2], "a vector": torch.zeros(2)})
torch.Tensor.names = property(lambda tensor: (None,) * tensor.dim())
again = {name: told(value) for name, value in SHOWN.items()}
print(plain, *(f"{name}: {text}" for name, text in seen.items()), f"with names: {again}", sep="\n")
if set(seen.values()) != {STATED} or "torch.tensor([0., 0.])" not in plain or any("float32(2, 2)" not in again[name] for name in ("tensor", "module")):
    sys.exit("the behaviour has changed")
EOF
