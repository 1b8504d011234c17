#!/usr/bin/env bash
# safetensors 0.8.0 (and 0.7.0), numpy 2.3.5, Linux: `save_file` in a folder that others may read, once to its end and once killed.
# Expected: the file has the rights that the umask gives to new files, as it had up to 0.7.0; after a kill nothing hidden stays beside it.
# Seen: 0.8.0 writes a hidden `.tmpXXXXXX` beside the file and renames it. So an earlier file survives a kill (0.7.0 destroys it),
# but the result can be read by its owner alone (0600, whatever the umask is: a server of another user, or a group that shares a disk,
# gets "permission denied"), and a kill leaves the hidden file, from its first moment as large as the whole one, which nothing removes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.7.0 0.8.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "safetensors==$version" numpy==2.3.5
done
cat > "$folder/look.py" <<'EOF'
import os
import signal
import stat
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

version, place = sys.argv[1], Path(sys.argv[2])
os.umask(0o022)
place.mkdir()
file = place / "model.safetensors"
save_file({"x": np.ones(2**26, np.float32)}, file)  # 256 MiB
rights, status = oct(stat.S_IMODE(file.stat().st_mode)), 0
look = lambda: {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in place.iterdir()}
before, zeros = look(), {"x": np.zeros(2**26, np.float32)}
if not (child := os.fork()):
    save_file(zeros, file)
    os._exit(0)
while look() == before:
    pass
os.kill(child, signal.SIGKILL)  # it has begun to write
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
hidden = [path.stat().st_size for path in place.iterdir() if path.name.startswith(".tmp")]
try:
    earlier = bool((load_file(file)["x"] == 1).all())
except Exception:
    earlier = False
save_file({"x": np.zeros(2, np.float32)}, file)
kept = [path.stat().st_size for path in place.iterdir() if path.name.startswith(".tmp")]  # a later save removes none
print(version, dict(rights=rights, ended=ended, earlier_file_is_whole=earlier, hidden_files=len(hidden), mib_in_them=[round(size / 2**20) for size in hidden], kept=kept == hidden))
wanted = ("0o644", -9, False, []) if version == "0.7.0" else ("0o600", -9, True, [256])
sys.exit(0 if (rights, ended, earlier, [round(size / 2**20) for size in hidden]) == wanted and kept == hidden else 1)
EOF
for version in 0.7.0 0.8.0; do "$folder/$version/bin/python" "$folder/look.py" "$version" "$folder/saved-$version" || { echo "another behaviour in $version"; exit 1; }; done
echo "as stated"
