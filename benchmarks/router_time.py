"""How long the default `merge-lab router` takes on a quantised model, and what it says that it gained.

    python benchmarks/router_time.py FOLDER      # made by `merge-lab quantize`; benchmarks/nested.py makes those of SmolLM2
    python benchmarks/router_time.py FOLDER --granularity token --target_bits 3.5

Written into data/benchmarks/router_time.json: wall-clock and processor seconds of the whole command, and what it kept.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from merge_lab.run_folder import read_json, write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="quantised model")
    parser.add_argument("--output", default=str(HERE / "data/benchmarks/router_time.json"))
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        command = [sys.executable, "-m", "merge_lab.cli", "router", options.folder, "--output_dir", str(run), *more]
        began = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(HERE)})
        seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        static = read_json(run / "static.json")
    row = dict(
        command=" ".join(["merge-lab router", Path(options.folder).name, *more]), seconds=round(seconds, 1), processor_seconds=round(used.ru_utime + used.ru_stime, 1),
        kept=static["kept"], static=static["static"], routed=static["routed"],
    )  # fmt: skip
    file = Path(options.output)
    known = read_json(file)["rows"] if file.exists() else []
    about = dict(cores=os.cpu_count(), threads=os.environ.get("OMP_NUM_THREADS"), python=platform.python_version(), versions={name: metadata.version(name) for name in ("torch", "transformers")})
    write_json(file, dict(rows=[old for old in known if old["command"] != row["command"]] + [row | dict(about=about)]))
    print(row)


if __name__ == "__main__":
    main()
