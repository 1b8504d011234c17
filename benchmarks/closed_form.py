"""What a start in closed form is worth on a real pair: its recovered share before any step of training, beside the average and RegMean.

    merge-lab real --output_dir runs/real                 # makes base, tasks and experts
    python benchmarks/closed_form.py --root runs/real

Coefficients are solved for on some training rows of each task (`mask_init: least_squares`), by mode, number of rows and ridge, and judged on
test rows by how much of the way from base to expert the merge has gone, as are the average where they start, and whole weights in closed
form (RegMean, RegMean++) on the same rows. Time is the process's own. What is there already in the output is not measured again.
"""

import argparse
import itertools
import json
import os
import platform
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from merge_lab.closed_form import solve_masks
from merge_lab.evaluation import load_tests
from merge_lab.lineup import average, line_up
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.regmean import regmean, regmean_plus
from merge_lab.run_folder import write_json
from merge_lab.search import judge_of

SCALE = 0.9  # of regmean and regmean_plus, where nothing is said


def solved(lineup, rows: list[list[dict]], mode: str, ridge: float, unscored: float) -> dict:
    "The tensors of a merge whose coefficients were solved for."
    merger = Merger.from_config(MergerConfig(lineup.paths, base_model=lineup.base_path, mode=mode))
    solve_masks(merger, [row | {"source": source} for source, some in enumerate(rows) for row in some], ridge, unscored=unscored)
    return merger.merged_state_dict()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder of merge-lab real")
    parser.add_argument("--tasks", nargs="+", default=["french", "docstrings"], help="tasks whose experts are merged (default: french docstrings)")
    parser.add_argument("--modes", nargs="+", default=["vector_input", "vector_output", "scalar"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16, 64], help="training rows of each task")
    parser.add_argument("--ridges", nargs="+", type=float, default=[0.01, 0.1, 1.0], help="pulls towards the average, in units of a system's mean diagonal entry")
    parser.add_argument("--unscored", nargs="+", type=float, default=[1.0], help="weights of tokens of prompts, beside 1 of answers' (default: 1)")
    parser.add_argument("--scales", nargs="+", type=float, default=[SCALE], help=f"factors of RegMean's off-diagonal entries (default: {SCALE:g})")
    parser.add_argument("--without", nargs="+", default=[], choices=["RegMean", "RegMean++"], help="what is left out")
    parser.add_argument("--test_rows", type=int, default=60, help="test rows of each task (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are drawn")
    parser.add_argument("--output", type=Path, default=Path("data/benchmarks/closed_form.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, written = Path(args.root), json.loads(args.output.read_text()) if args.output.exists() else {}
    tasks = [root / "tasks" / task for task in args.tasks]
    lineup = line_up([str(root / "experts" / task / "final_merged") for task in args.tasks], str(root / "base"), tasks, rows=max(args.rows), seed=args.seed)
    judge = judge_of(lineup, load_tests(tasks, n=args.test_rows))
    drawn = lineup.rows

    def note(told: str, make):
        key = f"{root.name}: {'+'.join(args.tasks)}: {told}, {args.test_rows} test rows, seed {args.seed}"
        if key in written:
            return
        began = time.process_time()
        tensors = make()
        spent = time.process_time() - began
        losses = judge.losses(lineup, tensors)
        row = {"losses": losses, "shares": judge.shares(losses), "processor_seconds": spent}
        row |= {"versions": {package: version(package) for package in ("torch", "transformers")}, "machine": platform.processor() or platform.machine()}
        written[key] = row
        write_json(args.output, written)
        print(f"{key}: worst task {judge.worst(losses):.3f}, {spent:.0f} s", flush=True)

    note("average, 0 rows", lambda: average(lineup))
    for n in args.rows:
        lineup.rows = [some[:n] for some in drawn]
        lineup.kept.clear()
        for (name, method), scale in itertools.product((("RegMean", regmean), ("RegMean++", regmean_plus)), args.scales):
            if name not in args.without:
                note(f"{name}{'' if scale == SCALE else f', factor {scale:g}'}, {n} rows", partial(method, lineup, scale))
        for mode, ridge, unscored in itertools.product(args.modes, args.ridges, args.unscored):
            told = "" if unscored == 1 else f", tokens of prompts {unscored:g}"
            note(f"least squares, {mode}, ridge {ridge:g}{told}, {n} rows", partial(solved, lineup, [some[:n] for some in drawn], mode, ridge, unscored))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
