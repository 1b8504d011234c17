"""How long the workbench notebook takes from top to bottom, without a browser.

    python benchmarks/workbench.py

Runs nbs/workbench.ipynb with nbclient, each time in an empty folder and a new kernel, and writes
data/benchmarks/workbench.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def execute(folder: Path) -> tuple[nbformat.NotebookNode, float]:
    "The notebook with its outputs, and the seconds it took, the kernel's start included."
    notebook = nbformat.read(ROOT / "nbs/workbench.ipynb", 4)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    resources = {"metadata": {"path": str(folder)}}
    started = time.perf_counter()
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.execute(env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    return notebook, time.perf_counter() - started


def main():
    import torch
    import transformers

    from merge_lab.run_folder import write_json

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="How often")
    parser.add_argument("--out", default=str(ROOT / "data/benchmarks/workbench.json"), help="File to write")
    options = parser.parse_args()
    seconds = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(round(execute(Path(folder))[1], 1))
        print(f"{seconds[-1]} s", flush=True)
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    facts = dict(
        command="python benchmarks/workbench.py", what="nbclient, nbs/workbench.ipynb from top to bottom, kernel start included",
        machine=f"{os.cpu_count()} cores, CPU, one torch thread", cores=os.cpu_count(), versions=versions, limit=180,
    )  # fmt: skip
    kept = {name: value for name, value in json.loads(Path(options.out).read_text()).items() if name == "explorer"} if Path(options.out).exists() else {}
    write_json(options.out, facts | {"seconds": seconds} | kept)


if __name__ == "__main__":
    main()
