"""How long a hand waits for a number after it let go of a slider, on a real model: this build beside an older one.

    python benchmarks/explorer.py --runs runs/real-2 --old ../older-checkout

Both builds work on the same models and rows with one thread each, in turns, each time in a new process. Writes the key `explorer` of
data/benchmarks/workbench.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOVES = {"first": {"share": 0.5}, "share": {"share": 0.35}, "share again": {"share": 0.6}, "last layers": {"last_layers": 0.2}, "attention": {"attention": 0.1}}
DATE = "2026-11-30"

WORK = """
import inspect, json, resource, sys, time
from pathlib import Path
import torch
from merge_lab.chat import load_task
from merge_lab.checkpoints import load_tokenizer
from merge_lab.explorer import MergeExplorer
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig

runs, moves, options = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
experts = ["french", "docstrings", "german"]
models = [str(runs / "experts" / name / "final_merged") for name in experts]
tests = {name: load_task(runs / "tasks" / name, "test") for name in experts}
merger = Merger.from_config(MergerConfig(models, mode="scalar", dtype="float32"))
explorer = MergeExplorer(lambda: merger, load_tokenizer(models[0]), tests, **{k: float(v) for k, v in options.items()})
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
for i in range(merger.n_components):  # weights that are mapped come into memory as they are read
    merger.component_forward(i, input_ids=torch.tensor([[1, 2]]))
before, heard, rows = resident(), [], []
explorer.listeners.append(lambda e: heard.append((time.perf_counter(), time.process_time(), e.error, list(e.outcome.answers["merged"]))))
for name, move in moves.items():
    heard.clear()
    began, used = time.perf_counter(), time.process_time()
    explorer.move(**move)
    assert explorer.worker.wait(900) and not heard[0][2], heard
    first, last = heard[0], heard[-1]
    rows.append(dict(move=name, loss_s=first[0] - began, loss_cpu_s=first[1] - used, token_s=first[0] - began, done_s=last[0] - began, done_cpu_s=last[1] - used))
look = next(iter(vars(merger)["_looks"].values())) if "_looks" in vars(merger) else None
facts = dict(look=look.told, tokens=look.tokens, held=look.bytes, estimated=look.estimated_bytes) if look else {}
scores = explorer.outcome.scores.query("model == 'merged'").set_index("task")["loss"].to_dict()
print("RESULT" + json.dumps(dict(rows=rows, losses=scores, grown=resident() - before, components=sum(p.nbytes for p in merger.parameters()), **facts)))
"""


def measure(checkout: Path, runs: str, moves: dict, **options) -> dict:
    "What one process of a build says."
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, "-c", WORK, runs, json.dumps(moves), json.dumps(options)]
    done = subprocess.run(words, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.split("RESULT")[1])


def main():
    import torch
    import transformers

    from merge_lab.run_folder import write_json

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", required=True, help="Folder of `merge-lab real` with experts and tasks")
    parser.add_argument("--old", required=True, help="Checkout of the build to compare with")
    parser.add_argument("--repeats", type=int, default=2, help="How often each")
    options = parser.parse_args()
    old, head = Path(options.old).resolve(), lambda where: subprocess.check_output(["git", "-C", where, "rev-parse", "--short", "HEAD"], text=True).strip()
    found = {"old": [], "new": [], "new, all rows": []}
    runs, load = str(Path(options.runs).resolve()), os.getloadavg()[0]
    few = {name: MOVES[name] for name in ("first", "share")}
    for _ in range(options.repeats):
        for name, where, moves, more in (("old", old, few, {}), ("new", ROOT, MOVES, {}), ("new, all rows", ROOT, few, {"operations": "inf"})):
            found[name].append(measure(where, runs, moves, **more))
            print(name, json.dumps(found[name][-1]), flush=True)
    file = ROOT / "data/benchmarks/workbench.json"
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    facts = dict(
        command="python benchmarks/explorer.py --runs runs/real-2 --old ../older-checkout", date=DATE, machine=f"{os.cpu_count()} cores, CPU, one torch thread, load {load:.1f} when it began",
        what="seconds from a slider's move to the new loss, the first answer tokens and all answers; SmolLM2-135M, three experts, 24 rows and 2 prompts of each of three tasks",
        versions=versions, old=head(old), runs=found,
    )  # fmt: skip
    write_json(file, json.loads(file.read_text()) | {"explorer": facts})


if __name__ == "__main__":
    main()
