#!/usr/bin/env bash
# treescope 0.1.10 with torch 2.13.0 (CPU): any tensor, and so any module, in what is shown.
# Expected: treescope.render_to_text(torch.zeros(2)) names its dtype and shape, as it does with torch 2.9.
# Seen: AttributeError: 'Tensor' object has no attribute 'names' (torch 2.13 has no named tensors any more), so treescope.display(model)
# of any torch model fails. What holds no tensors is shown.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "treescope==0.1.10" numpy
"$folder/venv/bin/python" - <<'EOF'
import sys

import torch
import treescope

print("torch", torch.__version__, "treescope", treescope.__version__)
print(treescope.render_to_text({"a list": [1, 2]}))
try:
    print(treescope.render_to_text(torch.nn.Linear(2, 2)))
except AttributeError as error:
    print("AttributeError:", error)
    sys.exit(0)
sys.exit("a module is shown: the behaviour has changed")
EOF
