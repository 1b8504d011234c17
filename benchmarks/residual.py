"""What a correction beside the coefficients adds for the numbers that it trains: the bundled toy pair, by granularity and rank.

    python benchmarks/residual.py --out data/benchmarks/residual.json

Short runs of mask merge on the two bundled experts. A row tells the loss on held-out rows where a run began and of the masks that it kept.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from merge_lab.run_folder import write_json
from merge_lab.systems.mask_merge import demo_config, run


def measure(mode: str, rank: int, seed: int, steps: int) -> dict:
    "One run."
    options = dict(mode=mode, residual_rank=rank, seed=seed, max_steps=steps, eval_samples=0, report=False, save_merged=False)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        made = run(demo_config(output_dir=folder, **options), progress=False)
    facts = dict(mode=mode, rank=rank, seed=seed, trained=made.merger.n_coefficients)
    return facts | dict(start=made.held_out["start"], loss=made.held_out["loss"], processor_seconds=time.process_time() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["scalar", "vector_input"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/residual.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for mode in args.modes:
        for rank in args.ranks:
            for seed in args.seeds:
                rows.append(measure(mode, rank, seed, args.steps))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    facts = dict(command="python benchmarks/residual.py", steps=args.steps, machine=f"{platform.machine()}, {os.cpu_count()} cores, CPU, 1 thread")
    write_json(args.out, facts | dict(versions={name: version(name) for name in ("torch", "transformers", "merge_lab")}, rows=rows))
