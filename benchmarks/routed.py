"""What a choice of precision by the prompt could win on a real model, and what the best static mix costs: one kind of text at a time, and mixed, over seeds.

    python benchmarks/nested.py quantize --model runs/real/base        # makes the quantised folder
    python benchmarks/routed.py                                        # seeds 0, 1 and 2; what is there is kept

The base is off its grid (see nested.py). A seed is another draw of windows for costs and for the test. For each budget: the divergence of the best static mix, a precision for each linear, on test windows; what oracles over
prompts would save of it, by linear and by layer, judged by the draw of labels that they saw and by another one; and on mixed text, what a router would save that knows each window's kind and reads it at the kind's own best
mix of the same bytes. `merge-lab router` trains a router where an oracle by layer saves something by its own draw, and keeps it where it beats the static mix on validation windows.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from merge_lab.checkpoints import load_tokenizer
from merge_lab.routed_model import LayerwiseQuantizeForCausalLM
from merge_lab.run_folder import bundled_path, write_json
from merge_lab.static_mix import headroom, measured_costs
from merge_lab.text_windows import exact_logits, score_windows, text_windows
from merge_lab.token_levels import best_mixes

PREFIX, PRECISIONS = 32, [3, 4, 5, 6, 8]
CHAT = "rewrite"  # the one chat task


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nested", default="runs/nested-benchmark/nested-permute-compensated", help="quantised folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.5, 4.0, 4.5], help="bits a weight, tables and scales included")
    parser.add_argument("--windows", type=int, default=8, help="of each kind, for costs and again for the test (default: 8)")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("data/benchmarks/routed.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = LayerwiseQuantizeForCausalLM.from_quantized(args.nested, PRECISIONS), load_tokenizer(args.nested)
    model.slot.keep_all = True
    kinds = {"prose": "prose", "code": "code", "chat": str(bundled_path(f"tasks/{CHAT}"))}
    known = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    about = dict(windows=args.windows, seq_len=args.seq_len, prefix=PREFIX, precisions=PRECISIONS, chat=CHAT, versions={name: version(name) for name in ("torch", "transformers")}, machine=platform.processor() or platform.machine())
    if known.setdefault("about", about) != about:
        parser.error(f"{args.output} holds what was measured of {known['about']}, and this is {about}. Name another --output.")

    def note(**row):
        known["rows"].append(row)
        write_json(args.output, known)
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)

    def mix_of(costs, target):
        return best_mixes(model, costs.sum(2).mean((0, 1)), [target])[0]

    for seed in args.seeds:
        if {row["budget"] for row in known["rows"] if row["seed"] == seed and row["text"] == "mixed"} >= set(args.budgets):
            continue
        known["rows"], began = [row for row in known["rows"] if row["seed"] != seed], time.process_time()
        costs, tests = {}, {}
        for kind, source in kinds.items():
            few = text_windows(tokenizer, [source], args.seq_len, args.windows, "train", seed)
            costs[kind] = measured_costs(model, few, PREFIX, seed)
            windows = text_windows(tokenizer, [source], args.seq_len, args.windows, "test", seed)
            tests[kind] = windows, exact_logits(model, windows)
        costs["mixed"] = torch.cat(list(costs.values()), 1)

        def divergences(kind, mix, tests=tests):
            windows, exact = tests[kind]
            with model.set_precision(mix):
                return score_windows(model, windows, PREFIX, exact=exact).kl

        oracles = {text: headroom(model, own, args.budgets).set_index(["real_bits", "unit", "choice"]) for text, own in costs.items()}
        for target in args.budgets:
            own, shared = {kind: divergences(kind, mix_of(costs[kind], target)) for kind in kinds}, mix_of(costs["mixed"], target)
            static = {kind: divergences(kind, shared) for kind in kinds}
            for text in (*kinds, "mixed"):
                table = oracles[text].loc[target]
                saved = {f"oracle_{unit}_{draw or 'other'}": float(table.loc[(unit, "prompt"), f"saved{'_' * bool(draw)}{draw}"]) for unit in ("linear", "layer") for draw in ("seen", "")}
                kl = sum(found.mean() for found in static.values()) / len(static) if text == "mixed" else own[text].mean()
                by_kind = dict(by_kind=float(sum(found.mean() for found in own.values()) / len(own))) if text == "mixed" else {}
                note(seed=seed, text=text, budget=target, static=float(kl), **by_kind, **saved, trains=saved["oracle_layer_seen"] > 0, processor_seconds=time.process_time() - began)


if __name__ == "__main__":
    main()
