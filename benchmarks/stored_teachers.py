"""What is lost when k tokens of a teacher are stored: the gradient of the coefficients, beside that of the whole vocabulary.

    merge-lab real --output_dir runs/real                      # makes base, tasks and experts
    python benchmarks/stored_teachers.py --root runs/real      # two real experts

The rest of a distribution is one bucket, or half of the k tokens are drawn from it. Each draw is told with its cosine to the exact gradient and
its distance as a share of that gradient's length; so is the mean of all draws, which has less noise and the same bias: none.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from merge_lab.chat import ChatCollator, encode_rows, load_task
from merge_lab.chat_templates import chat_tokenizer
from merge_lab.losses import shift_labels
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Batch, Objective, teacher_topk
from merge_lab.run_folder import write_json
from merge_lab.teacher_cache import STORED_TOPK


def stored(merger: Merger, batch: dict, k: int, temperature: float, drawn: bool) -> dict:
    "The batch with what would be stored of each row's own component."
    labels = shift_labels(batch["labels"], batch["attention_mask"])
    aligned, shape = Batch(batch["input_ids"], batch["attention_mask"], labels, batch["source"], 1), labels.shape
    found = [torch.zeros(*shape, k), torch.zeros(*shape, k, dtype=torch.int32), torch.zeros(shape), torch.zeros(shape)]
    for i in range(merger.n_components):
        at = aligned.scored & (aligned.source == i)[:, None]
        uniform = torch.rand(int(at.sum())) if drawn else None
        for whole, part in zip(found, teacher_topk(merger, aligned, i, k, temperature, uniform=uniform)):
            whole[at] = part.to(whole.dtype)
    return batch | dict(zip(STORED_TOPK, found))


def gradient(merger: Merger, batch: dict, temperature: float) -> torch.Tensor:
    masks = [p for p in merger.parameters() if p.requires_grad]
    loss = Objective({"kl": 1.0}, temperature)(merger, **batch)["loss"]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, masks)])


def told(found: torch.Tensor, exact: torch.Tensor) -> dict:
    return {"cosine": torch.cosine_similarity(found, exact, dim=0).item(), "off": ((found - exact).norm() / exact.norm()).item()}


def measure(root: Path, experts: list[str], rows: int, ks: list[int], temperatures: list[float], draws: int, seed: int) -> list[dict]:
    torch.manual_seed(seed)
    paths = [str(root / "experts" / name / "final_merged") for name in experts]
    tokenizer = chat_tokenizer(paths[0], paths)
    tasks = [load_task(root / "tasks" / name, "train", rows, seed, None) for name in experts]
    batch = ChatCollator(tokenizer)([row for i, task in enumerate(tasks) for row in encode_rows(tokenizer, task, i, 512)])
    merger = Merger.from_config(MergerConfig(model_paths=paths, dtype="float32"))
    tokens, results = int((batch["labels"] != -100).sum()), []
    for temperature in temperatures:
        exact = gradient(merger, batch, temperature)
        for k in ks:
            drawn = [gradient(merger, stored(merger, batch, k, temperature, True), temperature) for _ in range(draws)]
            row = {"temperature": temperature, "k": k, "scored_tokens": tokens, "experts": experts, "seed": seed}
            row["bucket"] = told(gradient(merger, stored(merger, batch, k, temperature, False), temperature), exact)
            row |= {"drawn": [told(one, exact) for one in drawn], "mean of draws": told(sum(drawn) / draws, exact)}
            results.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/real"), help="folder of merge-lab real")
    parser.add_argument("--experts", nargs="+", default=["french", "docstrings"], help="two or more of its experts")
    parser.add_argument("--rows", type=int, default=8, help="rows of each task")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 50], help="tokens that are stored")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/stored_teachers.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = {"machine": f"{platform.machine()}, CPU", "versions": {name: version(name) for name in ("torch", "transformers", "merge_lab")}}
    rows = measure(args.root, args.experts, args.rows, args.k, args.temperatures, args.draws, args.seed)
    write_json(args.out, {"command": "python benchmarks/stored_teachers.py --root runs/real", **facts, "rows": rows})
