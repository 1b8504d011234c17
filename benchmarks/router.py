"""What it is worth to choose each layer's precision by the input: fixed, static and routed bits at equal budgets.

    python benchmarks/router.py                  # seeds 0, 1 and 2: writes data/benchmarks/router.json
    python benchmarks/router.py --seeds 0        # one seed; the others in the file are kept

Everything is made here from what every machine has: a small Llama is trained on the documentation and the source of
Python's own library and on the bundled tasks, quantised at 3 to 8 bits, and given routers. Routers are trained and
selected on training and validation text; only the last step, `score`, reads test text. A seed is a new base model, new
windows and new routers.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from operator import itemgetter
from pathlib import Path

import pandas as pd
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.memory import track_memory
from merge_lab.nested_model import memory_table
from merge_lab.precision_costs import fit_costs, fit_price, greedy_assignments, measure_costs
from merge_lab.routed_model import LayerwiseQuantizeForCausalLM, Routers
from merge_lab.run_folder import write_json
from merge_lab.systems.quantize import QuantizeConfig, run_quantize
from merge_lab.systems.router import RouterConfig, RouterTrainer
from merge_lab.text_windows import bits_by_kind, collate, exact_logits, LOCAL_TEXT, read_documents, score_windows, text_windows, window_losses
from merge_lab.tinylm import save_tiny, tiny_model, tiny_tokenizer, train_tokenizer
from merge_lab.toy_corpus import text_corpus, text_hash

KINDS = list(LOCAL_TEXT)
SEQ_LEN, PREFIX, STEPS = 128, 32, 600
TARGETS = (3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75, 5.0)
SHAPE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    initializer_range=0.02,
    tie_word_embeddings=True,
)


def make_base(folder: Path, seed: int, steps: int = STEPS, rate: float = 3e-3):
    "Train a small Llama on equal shares of prose, code and tasks; keep it if it is there."
    if (folder / "config.json").exists():
        return
    texts = [
        t for kind in KINDS for t in read_documents(kind, "train", tiny_tokenizer())
    ]
    tokenizer = train_tokenizer([text[:3000] for text in texts[::3]], 1024)
    found = {kind: text_windows(tokenizer, [kind], SEQ_LEN, 10_000) for kind in KINDS}
    rows = {
        kind: torch.stack([window.input_ids for window in windows])
        for kind, windows in found.items()
    }
    model = tiny_model("llama", vocab_size=1024, seed=seed, **SHAPE).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=0.1, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.05
    )
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = [r[torch.randint(len(r), (4,), generator=draw)] for r in rows.values()]
        batch = torch.cat(chosen)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"base {seed}: step {step + 1}, loss {loss.item():.3f}", flush=True)
    save_tiny(model.eval(), folder, tokenizer)


def quantise(base: Path, folder: Path, seed: int) -> LayerwiseQuantizeForCausalLM:
    "The base model at 3 to 8 bits, with fresh routers."
    if not (folder / "config.json").exists():
        text = dict(dataset=KINDS, seq_len=SEQ_LEN, num_examples=96, random_state=seed)
        run_quantize(
            QuantizeConfig(str(base), str(folder), device="cpu", overwrite=True, **text)
        )
    torch.manual_seed(seed)
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder)
    model.slot.keep_all = True  # memory for time
    return model


def draw_windows(folder: Path, seed: int) -> dict[str, list]:
    "Windows of each split; only the test's are the same for all seeds."
    tokenizer, sizes = load_tokenizer(folder), dict(train=240, validation=210, test=240)
    return {
        split: text_windows(
            tokenizer, KINDS, SEQ_LEN, n, split, 0 if split == "test" else seed
        )
        for split, n in sizes.items()
    }


class Bench:
    "One seed: a model, its windows, and the scores that are compared."

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        self.model = quantise(
            folder / f"base-{seed}", folder / f"quantized-{seed}", seed
        )
        self.windows = draw_windows(folder / f"base-{seed}", seed)
        self.exact = exact_logits(self.model, self.windows["test"])
        self.rows, self.measured, self.started = [], {}, time.perf_counter()
        self.losses_file = folder / f"losses-{seed}.pt"  # of the opponents
        self.losses = torch.load(self.losses_file) if self.losses_file.exists() else {}

    def score(self, method: str, assignment=None, **extra) -> dict:
        "Score the test windows; `assignment` None leaves the choice to the routers."
        scores = self.scores_of(assignment)
        row = dict(seed=self.seed, method=method, **extra)
        row |= {
            name: float(scores[name].mean())
            for name in ("bits", "ce", "kl", "read_bytes")
        }
        if assignment is not None:
            self.losses.setdefault(method, {})[row["bits"]] = torch.tensor(
                scores.ce.to_numpy()
            )
            row["assignment"] = assignment
        else:
            row["against"] = {
                name: self.compare(scores, line) for name, line in self.losses.items()
            }
            row["layers"] = bits_by_kind(scores).T.round(3).to_dict("list")
        row["by_kind"] = (
            scores.groupby("kind", sort=False)[["bits", "ce", "kl"]]
            .mean()
            .round(6)
            .T.to_dict()
        )
        self.rows.append(row)
        seconds = time.perf_counter() - self.started
        print(
            f"[{seconds:4.0f} s] {method} {extra} bits {row['bits']:.3f} CE {row['ce']:.5f} "
            f"KL {row['kl']:.5f} {row.get('against', '')}",
            flush=True,
        )
        return row

    def scores_of(self, assignment) -> pd.DataFrame:
        "Scores of the test windows; an assignment that two opponents share is measured once."
        key = None if assignment is None else tuple(assignment)
        if key is None or key not in self.measured:
            with self.model.set_precision(assignment):
                self.measured[key] = score_windows(
                    self.model, self.windows["test"], PREFIX, exact=self.exact
                )
        return self.measured[key]

    def compare(self, scores, line: dict) -> dict[str, float]:
        "Mean and standard error of the windows' cross-entropy above a line through assignments."
        bits = scores.bits.mean()
        low = max(b for b in line if b <= bits)
        high = min(b for b in line if b >= bits)
        share = (bits - low) / (high - low) if high > low else 0.0
        above = torch.tensor(scores.ce.to_numpy())
        above = above - (1 - share) * line[low] - share * line[high]
        return dict(
            mean=float(above.mean()), error=float(above.std() / len(above) ** 0.5)
        )


def measure_opponents(bench: Bench, costs: torch.Tensor):
    "Fixed precisions, and static assignments by measured costs and by measuring each trial whole."
    model, layers = bench.model, len(bench.model.routers.layers)
    for bits in model.precisions:
        bench.score("fixed", [bits] * layers)
    mean, first = costs.mean(0), model.precisions[0]
    few = bench.windows["validation"][::6]
    exact = exact_logits(model, few)

    def summed(assignment):
        return sum(mean[n, bits - first].item() for n, bits in enumerate(assignment))

    def measured(assignment):
        with model.set_precision(assignment):
            return score_windows(model, few, PREFIX, exact=exact).kl.mean()

    for method, measure in (
        ("static, summed costs", summed),
        ("static, measured whole", measured),
    ):
        total = int(5.25 * layers)
        for path in greedy_assignments(measure, layers, model.precisions, total):
            bench.score(method, path[0])


WAYS = {
    "soft": dict(pretrain="none", learning_rate=1e-2, straight_through=False),
    "straight-through": dict(pretrain="none", learning_rate=1e-2),
    "end-to-end": dict(learning_rate=1e-3),  # from costs
}


def other_way(bench: Bench, method: str, target: float = 4.0):
    "Routers trained end to end at one budget; the best epoch by validation."
    folder = bench.folder / f"{method}-{bench.seed}"
    train, validation = bench.windows["train"][::2], bench.windows["validation"][::5]
    torch.manual_seed(bench.seed)
    model = bench.model
    shape = len(model.routers.layers), model.config.hidden_size, model.precisions
    model.routers = Routers(*shape)
    config = RouterConfig(
        "quantized",
        static=False,
        seq_len=SEQ_LEN,
        prefix_length=PREFIX,
        batch_size=4,
        num_epochs=2,
        num_costs=80,
        target_bits=target,
        weight_ce=1.0,
        weight_precision=0.1,
        keep_weights=True,
        save_dir=str(folder),
        **WAYS[method],
    )
    RouterTrainer(model, config, train, validation).fit()
    best = torch.load(folder / "best_router_checkpoint.pt", weights_only=True)
    model.load_state_dict(best["model_state_dict"])
    fit_price(model, bench.windows["validation"], PREFIX, target)
    bench.score(method, target=target, epoch=best["epoch"])


def noise_of(bench: Bench, costs: torch.Tensor) -> list[dict]:
    "The cost of reading the first layer at 4 bits, by divergence and by cross-entropy: mean and spread over windows."
    top, train = bench.model.precisions[-1], bench.windows["train"]
    rises, layers = [], len(bench.model.routers.layers)
    for bits in (top, 4):
        with bench.model.set_precision([bits] + [top] * (layers - 1)):
            rises.append(score_windows(bench.model, train, PREFIX).ce)
    kinds = [window.kind for window in train]
    frame = pd.DataFrame(
        dict(
            kind=kinds,
            divergence=costs[:, 0, 1].tolist(),
            cross_entropy=rises[1] - rises[0],
        )
    )
    table = frame.groupby("kind", sort=False).agg(["mean", "std"])
    return [
        dict(
            kind=kind,
            measure=measure,
            mean=table.loc[kind, (measure, "mean")],
            std=table.loc[kind, (measure, "std")],
        )
        for kind in table.index
        for measure in ("divergence", "cross_entropy")
    ]


def memory_of(bench: Bench) -> list[dict]:
    "Bytes held and read by the decoder layers, and the peak of live tensors in one forward pass."
    table = memory_table(bench.model).reset_index().to_dict("records")
    ids = collate(bench.windows["test"][:8], PREFIX)[0]
    for keep in (False, True):
        bench.model.slot.clear()
        bench.model.slot.keep_all = keep
        with bench.model.set_precision(4), track_memory() as use:
            bench.model.infer_forward(ids)
        slot = sum(
            w.numel() * w.element_size()
            for held in bench.model.slot.held.values()
            for w in held.values()
        )
        table.append(
            dict(
                model=f"forward, keep_all={keep}",
                peak_bytes=int(use.peak_bytes),
                dequantised_bytes=slot,
            )
        )
    return table


def measure_core(bench: Bench) -> dict:
    "Opponents, routers fitted to measured costs at every budget, memory."
    plain = load_model(bench.folder / f"base-{bench.seed}")
    ids, labels = collate(bench.windows["test"], PREFIX)
    with torch.no_grad():
        exact = [
            window_losses(plain(input_ids=i).logits, j)
            for i, j in zip(ids.split(32), labels.split(32))
        ]
    costs, pooled = measure_costs(bench.model, bench.windows["train"], PREFIX)
    measure_opponents(bench, costs)
    torch.save(bench.losses, bench.losses_file)
    share = fit_costs(bench.model.routers, costs, pooled)
    for target in TARGETS:
        fit_price(bench.model, bench.windows["validation"], PREFIX, target)
        price = (bench.model.routers.price * bench.model.routers.unit).item()
        bench.score("router", target=target, price=price)
    windows = {split: len(windows) for split, windows in bench.windows.items()}
    return dict(
        seed=bench.seed,
        float_ce=torch.cat(exact).mean().item(),
        explained=share,
        noise=noise_of(bench, costs),
        memory=memory_of(bench),
        windows=windows,
    )


def describe() -> dict:
    "What the figures were made with."
    text = {kind: text_hash(text_corpus(kind, None)) for kind in ("prose", "code")}
    versions = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    return dict(
        command="python benchmarks/router.py",
        machine=f"{os.cpu_count()} cores, CPU, one thread",
        versions=versions,
        text=text,
        base=SHAPE | dict(vocab_size=1024, steps=STEPS),
        seq_len=SEQ_LEN,
        prefix_length=PREFIX,
    )


def update(file: Path, seed: int, facts: dict | None, rows: list[dict]):
    "Put one seed's rows into the file; a method that was measured again replaces its rows."
    old = json.loads(file.read_text()) if file.exists() else dict(facts=[], rows=[])
    new = {(seed, row["method"]) for row in rows}
    kept = [row for row in old["rows"] if (row["seed"], row["method"]) not in new]
    known = [row for row in old["facts"] if facts is None or row["seed"] != seed]
    found = dict(
        facts=sorted(known + ([facts] if facts else []), key=itemgetter("seed")),
        rows=sorted(kept + rows, key=itemgetter("seed")),
    )
    write_json(file, describe() | found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parts = ["base", "core", *WAYS]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/router-benchmark"),
        help="models that are made on the way",
    )
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/router.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for seed in args.seeds:
        make_base(args.folder / f"base-{seed}", seed)
        if {*args.parts} - {"base"}:
            bench = Bench(seed, args.folder)
            facts = measure_core(bench) if "core" in args.parts else None
            for method in WAYS:
                if method in args.parts:
                    other_way(bench, method)
            update(args.out, seed, facts, bench.rows)


if __name__ == "__main__":
    main()
