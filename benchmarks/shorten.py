"""What a shorter SmolLM2 is worth: every way to take layers away, on prose and on chats.

    python benchmarks/shorten.py --model runs/real/base --chat runs/real/tasks/*   # adds to data/benchmarks/shorten.json
    python benchmarks/shorten.py ... --heal-steps 200 --keep runs/shorten           # goes on with what is in that folder

Text comes in windows of 256 tokens; those that are scored are of other documents than those that are learned from. Cost is
processor time, so that it can be compared on a machine that does other things as well. `merge-lab demo --real` makes model and tasks.
"""

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers

from merge_lab.block_training import BlockSteps, learn_block, try_blocks
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.cuts import shared_copy, text_loss
from merge_lab.depth import find_merge_pairs, layer_similarity
from merge_lab.run_folder import bundled_path, write_json
from merge_lab.strategies import shorten, STRATEGIES
from merge_lab.student import heal
from merge_lab.text_windows import text_windows

LENGTH = 256  # tokens of a window
SIZES = {"prose": (64, 4, 24), "chat": (30, 3, 24)}  # windows to learn from, held out, scored
WITHOUT_TEXT = ("remove-last",)


def batched(windows: Sequence, size: int) -> list[dict]:
    "Windows as batches whose every token is learned."
    found = []
    for start in range(0, len(windows), size):
        ids = torch.stack([window.input_ids for window in windows[start : start + size]])
        found.append(dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids))
    return found


def read_text(tokenizer, chats: Sequence[str], seed: int, batch_size: int) -> dict:
    "Batches to learn from, held out, and to score by kind; those that are scored are the same for every seed."
    sources, text = {"prose": ["prose"], "chat": list(chats)}, dict(train=[], held_out=[], test={})
    for kind, (train, held_out, test) in SIZES.items():
        for name, split, n in (("train", "train", train), ("held_out", "validation", held_out)):
            text[name] += text_windows(tokenizer, sources[kind], LENGTH, n, split, seed)
        text["test"][kind] = batched(text_windows(tokenizer, sources[kind], LENGTH, test, "test", 0), 4)
    order = torch.randperm(len(text["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
    return {
        "train": batched([text["train"][i] for i in order], batch_size),
        "held_out": batched(text["held_out"], batch_size),
        "test": text["test"],
    }


def scores(model, text: dict) -> dict:
    "Perplexity by kind."
    return {kind: math.exp(text_loss(model, batches)) for kind, batches in text["test"].items()}


def block_row(model, n: int, text: dict, how: BlockSteps, seed: int) -> tuple:  # model, what is to be told
    "A learned block, and what was found on the way."
    tried = try_blocks(model, n, text["train"][:12], text["held_out"])
    block = range(int(tried["first"][0]), int(tried["last"][0]) + 1)
    every = max(1, how.steps // 4)
    learnt = learn_block(model, block, text["train"], text["held_out"], how, seed, progress=False, eval_steps=every, save_steps=0)
    looks = learnt.history["held_out_loss"].dropna().tolist() if len(learnt.history) else []
    told = dict(block=[block[0], block[-1]], tried=tried.to_dict("records"), looks=looks, rank=how.rank, hidden_steps=how.hidden_steps, steps=how.steps)
    return learnt.model, told


def made_short(model, name: str, n: int, text: dict, how: BlockSteps, seed: int) -> tuple:  # model, what is to be told
    "One strategy."
    if STRATEGIES[name].block:
        return block_row(model, n, text, how, seed)
    pairs, similarity = [(0, 1, 0.5)] * n, None
    if STRATEGIES[name].start or name == "remove-same":
        similarity = layer_similarity(model, text["train"], "npib", seed=seed)
        pairs = find_merge_pairs(similarity, n)
    twin = shared_copy(model) if STRATEGIES[name].start is None else copy.deepcopy(model)
    return shorten(twin, pairs, STRATEGIES[name], text["train"], similarity, seed=seed, progress=False)[0], {}


def short_row(model, name: str, n: int, text: dict, how: BlockSteps, seed: int, folder: Path | None) -> tuple:  # model, row
    "One strategy: the shorter model, its scores and cost; read from the folder if it is there, and else kept there."
    if folder is not None and (folder / "row.json").exists():
        return load_model(folder, dtype=model.dtype), json.loads((folder / "row.json").read_text())
    start = time.process_time()
    short, told = made_short(model, name, n, text, how, seed)
    row = dict(strategy=name, n=n, seed=seed, healed=0, processor_seconds=time.process_time() - start, **scores(short, text), **told)
    if folder is not None:
        short.save_pretrained(folder)
        write_json(folder / "row.json", row)
    return short, row


def healed_row(model, short, row: dict, text: dict, steps: int, folder: Path | None) -> dict:
    "The same after healing, which goes on where it was stopped if there is a folder; its cost is that of both."
    place, file = (None, None) if folder is None else (folder / f"healed-{steps}", folder / f"healed-{steps}.json")
    before = json.loads(file.read_text()) if file is not None and file.exists() else 0.0
    start = time.process_time()
    options = dict(teacher=model, seed=row["seed"], progress=False, held_out=text["held_out"], eval_steps=50, save_steps=0)
    try:
        short = heal(copy.deepcopy(short), text["train"], steps, folder=place, resume=before > 0, **options)
    finally:
        spent = before + time.process_time() - start
        if file is not None:
            write_json(file, spent)
    return row | dict(healed=steps, processor_seconds=row["processor_seconds"] + spent, **scores(short, text))


def described(options) -> dict:
    "What the figures are."
    return dict(
        what="Perplexity of SmolLM2-135M-Instruct with layers taken away, on windows of 256 tokens of prose and of chats",
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, CPU, {torch.get_num_threads()} thread, {options.dtype}",
        windows={kind: dict(zip(("learned from", "held out", "scored"), sizes)) for kind, sizes in SIZES.items()},
        batch_size=options.batch_size,
    )


def measure(options):
    "Measure, and write after every strategy; a row of the same strategy, number, seed and healing is replaced."
    tokenizer, model = load_tokenizer(options.model), load_model(options.model, dtype=options.dtype)
    for seed in options.seeds:
        text = read_text(tokenizer, options.chat, seed, options.batch_size)
        jobs = [("original", 0)] + [(name, n) for n in options.layers for name in options.strategies]
        for name, n in jobs:
            how = BlockSteps(options.rank, options.hidden_steps, options.steps, options.rate)
            if not n:
                keep(options.out, described(options), [dict(strategy=name, n=0, seed=seed, healed=0, processor_seconds=0.0, **scores(model, text))])
                continue
            folder = options.keep and options.keep / f"{name}-{n}-{seed}"
            short, row = short_row(model, name, n, text, how, seed, folder)
            keep(options.out, described(options), [row])
            if options.heal_steps:
                keep(options.out, described(options), [healed_row(model, short, row, text, options.heal_steps, folder)])


def keep(out: Path, about: dict, rows: list[dict]):
    "Add rows to what is there."
    key = ("strategy", "n", "seed", "healed")
    held = json.loads(out.read_text())["rows"] if out.exists() else []
    new = {tuple(row[name] for name in key) for row in rows}
    kept = [row for row in held if tuple(row[name] for name in key) not in new]
    write_json(out, {**about, "rows": sorted(kept + rows, key=lambda row: tuple(row[name] for name in key))})
    for row in rows:
        print({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items() if name != "tried"}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of SmolLM2")
    add("--chat", nargs="+", required=True, help="folders of chats with train, validation and test")
    add("--strategies", nargs="+", default=["block", "map", "map-cosine", "remove-block", "remove-influence", "remove-greedy", "remove-last"], choices=list(STRATEGIES))
    add("--layers", nargs="+", type=int, default=[7], help="how many go")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--heal-steps", type=int, default=0)
    add("--keep", type=Path, help="folder of shorter models and of healing, which goes on with what is there")
    add("--rank", type=int, default=64)
    add("--hidden-steps", type=int, default=300)
    add("--steps", type=int, default=100, help="from predictions")
    add("--rate", type=float, default=1e-3)
    add("--batch-size", type=int, default=2, help="windows of a step")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--threads", type=int, default=1, help="of torch")
    add("--out", type=Path, default=bundled_path("benchmarks") / "shorten.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure(options)


if __name__ == "__main__":
    main()
