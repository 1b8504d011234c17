#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6 (tokenizers only, no torch; protobuf 6.33.0, which 4.57 asks for): one tokenizer, saved by the newer, loaded by the older.
# Expected: a tokenizer with further special tokens loads, or the error says which key is of a newer format.
# Seen: 5.23 writes those tokens as a list under `extra_special_tokens`. 4.57 takes that key for a mapping and stops with
# "'list' object has no attribute 'keys'", also where the class name is one that it knows; without further tokens the same folder
# loads. With the list under its older name, `additional_special_tokens`, both load it and give the same ids.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.6; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "transformers==$version" "protobuf==6.33.0"
done
cat > "$folder/save.py" <<'EOF'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = Path(sys.argv[1])
words = Tokenizer(models.WordLevel({"<unk>": 0, "call": 1, "the": 2, "tool": 3}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
for name, more in (("plain", {}), ("more", {"extra_special_tokens": ["<tool>"]})):
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **more).save_pretrained(folder / name)
    file = folder / name / "tokenizer_config.json"
    told = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # a class that both have
    file.write_text(json.dumps(told))
told["additional_special_tokens"] = told.pop("extra_special_tokens")
(folder / "older").mkdir()
(folder / "older" / "tokenizer.json").write_bytes((folder / "more" / "tokenizer.json").read_bytes())
(folder / "older" / "tokenizer_config.json").write_text(json.dumps(told))
EOF
cat > "$folder/load.py" <<'EOF'
import sys

import transformers
from transformers import AutoTokenizer

seen = {}
for name in ("plain", "more", "older"):
    try:
        seen[name] = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{name}").encode("call <tool> the tool")
    except AttributeError as error:
        seen[name] = str(error)
print(transformers.__version__, seen)
five = transformers.__version__.startswith("5")
same = seen["older"] == [1, 4, 2, 3] and (seen["more"] == [1, 4, 2, 3] if five else seen["more"] == "'list' object has no attribute 'keys'")
sys.exit(0 if same and isinstance(seen["plain"], list) else 1)
EOF
"$folder/5.23.0/bin/python" "$folder/save.py" "$folder/saved" 2> "$folder/said" || { tail -20 "$folder/said"; exit 1; }
for version in 5.23.0 4.57.6; do "$folder/$version/bin/python" "$folder/load.py" "$folder/saved" 2> "$folder/said" || { tail -20 "$folder/said"; echo "another behaviour in $version"; exit 1; }; done
echo "as stated"
