"""How much data a mask merge needs: few prompts, no prompts, all rows; answers of the data, of the components, of the blend.

    python benchmarks/few_rows.py --toys                          # bundled pairs, three seeds
    merge-lab real --output_dir runs/real                         # makes base, tasks and experts
    python benchmarks/few_rows.py --root runs/real --rows 8       # a real pair

Each merge is judged on the same test rows by how much of the way from base to expert it has gone; on toys also by exact match. What is
there already in the output is not measured again, so that a run that was stopped goes on.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from merge_lab.chat import load_task, write_jsonl
from merge_lab.checkpoints import load_tokenizer
from merge_lab.conversations import question_of
from merge_lab.evaluation import evaluate_tasks, load_tests
from merge_lab.lineup import line_up
from merge_lab.run_folder import bundled_path, write_json
from merge_lab.search import judge_of
from merge_lab.systems.mask_merge import MaskMergeConfig, run

OWN = {"answers": "components", "answers_per_prompt": 8}
LAYERS = {"train_mode": "layerwise"}
VARIANTS = {  # name -> options of a mask merge; prompts alone are given where components answer
    "given answers, KL": {},
    "given answers, layer by layer": LAYERS,
    "own answers, KL": OWN,
    "own answers, hidden states": OWN | {"loss_func_name": "hidden"},
    "own answers, layer by layer": OWN | LAYERS,
    "own answers, layer by layer, then KL": OWN | LAYERS | {"finish_steps": 20},
    "on-policy, reverse KL": OWN | {"on_policy": 1.0, "loss_func_name": "reverse_kl"},
    "on-policy, Jensen-Shannon": OWN | {"on_policy": 1.0, "loss_func_name": "jsd"},
    "half on-policy, Jensen-Shannon": OWN | {"on_policy": 0.5, "loss_func_name": "jsd"},
}
FREE = {  # nothing is given
    "no data, KL": OWN | {"written_prompts": 64, "answers_per_prompt": 1},
    "no data, layer by layer": OWN | LAYERS | {"written_prompts": 64, "answers_per_prompt": 1},
    "no data, layer by layer, then KL": OWN | LAYERS | {"written_prompts": 64, "answers_per_prompt": 1, "finish_steps": 20},
}
TOYS = [("rewrite", "summarize"), ("rewrite", "extract"), ("quiz", "sort")]
TEST_ROWS = 150
TOY_OPTIONS = {"mode": "vector_output", "learning_rate": 0.2, "max_steps": 100, "per_device_train_batch_size": 32, "answer_tokens": 40, "dtype": "float32"}


def some_rows(task: Path, n: int | None, seed: int, asked_only: bool, folder: Path) -> Path:
    "A task's training rows, or some of them in a folder of their own; without their answers if only questions are to be seen."
    if n is None:
        return task
    rows = load_task(task, n=n, seed=seed)
    write_jsonl(folder / task.name / "train.jsonl", [question_of(row) if asked_only else row for row in rows])
    return folder / task.name


def merge(experts, base, tasks, n, seed, options):
    "One merge in this process: what it took, what held-out rows said, and the merger."
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        asked_only = options.get("answers") == "components"
        for task in tasks:
            (folder / "data" / task.name).mkdir(parents=True)
        data = {} if options.get("written_prompts") else {str(some_rows(task, n, seed, asked_only, folder / "data")): None for task in tasks}
        config = MaskMergeConfig(
            model_paths=experts, base_model=base, dataset_configs=data, eval_samples=0, save_merged=False, report=False, seed=seed, output_dir=f"{place}/run", **options
        )
        began, worked = time.perf_counter(), time.process_time()
        result = run(config, progress=False)
        used = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked, "held_out": {k: v for k, v in (result.held_out or {}).items() if k in ("start", "loss", "step", "looks")}}
        return used, result.merger


def measure(experts, base, tasks, cases, options, output: Path, name: str, test_rows: int, answered: bool):
    "All cases of a pair that are not measured yet."
    written = json.loads(output.read_text()) if output.exists() else {}
    cases = [(f"{name}: {variant}, {told}, seed {seed}", n, seed, more) for variant, more, told, n, seed in cases]
    cases = [case for case in cases if case[0] not in written]
    if not cases:
        return
    lineup, tests = line_up(experts, base), load_tests(tasks, n=test_rows)
    judge = judge_of(lineup, tests)
    for key, n, seed, more in cases:
        used, merger = merge(experts, base, tasks, n, seed, more | options)
        losses = judge.losses(lineup, merger.merged_state_dict())
        row = used | {"losses": losses, "shares": judge.shares(losses)}
        if answered:
            table = evaluate_tasks(merger, load_tokenizer(experts[0]), tests)
            row["exact_match"] = table["exact_match"].to_dict()
        row |= {"versions": {package: version(package) for package in ("torch", "transformers")}, "machine": platform.processor() or platform.machine()}
        written = json.loads(output.read_text()) if output.exists() else {}
        write_json(output, written | {key: row})
        print(f"{key}: worst task {min(row['shares'].values()):.3f}, {used['processor_seconds']:.0f} s {row.get('exact_match', '')}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of merge-lab real")
    parser.add_argument("--toys", action="store_true", help="measure the bundled pairs")
    parser.add_argument("--pairs", nargs="+", default=["+".join(pair) for pair in TOYS], help="bundled pairs that are measured")
    parser.add_argument("--tasks", nargs="+", default=["french", "docstrings"], help="tasks of the root whose experts are merged")
    parser.add_argument("--rows", nargs="+", default=["4", "8", "16", "32", "128", "all"], help="training rows of each task")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS, *FREE], choices=[*VARIANTS, *FREE])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test_rows", type=int, default=TEST_ROWS, help=f"test rows of each task (default: {TEST_ROWS})")
    parser.add_argument("--option", nargs="*", default=[], help="further options of the merge, name=value as JSON")
    parser.add_argument("--output", default="data/benchmarks/few_rows.json")
    asked = parser.parse_args()
    more = {word.partition("=")[0]: json.loads(word.partition("=")[2]) for word in asked.option}
    numbers = [None if n == "all" else int(n) for n in asked.rows]
    cases = [(variant, VARIANTS[variant], "all rows" if n is None else f"{n} rows", n, seed) for variant in asked.variants if variant in VARIANTS for n in numbers for seed in asked.seeds]
    cases += [(variant, FREE[variant], "0 rows", 0, seed) for variant in asked.variants if variant in FREE for seed in asked.seeds]
    told = "".join(f", {name} {value}" for name, value in more.items()) + ("" if asked.test_rows == TEST_ROWS else f", scored on {asked.test_rows} rows")
    for pair in [pair.split("+") for pair in asked.pairs] if asked.toys else ():
        experts = [str(bundled_path(f"models/{task}")) for task in pair]
        tasks = [bundled_path(f"tasks/{task}") for task in pair]
        measure(experts, str(bundled_path("models/base")), tasks, cases, TOY_OPTIONS | more, Path(asked.output), "+".join(pair) + told, asked.test_rows, True)
    if asked.root:
        root = Path(asked.root)
        experts = [str(root / "experts" / task / "final_merged") for task in asked.tasks]
        tasks = [root / "tasks" / task for task in asked.tasks]
        measure(experts, str(root / "base"), tasks, cases, more, Path(asked.output), f"{root.name}: {'+'.join(asked.tasks)}{told}", asked.test_rows, False)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
