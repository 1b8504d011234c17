"""Nested precision on a real model: bytes and divergence of every precision beside round-to-nearest and HQQ, the time of `quantize`, static mixes and headroom.

    merge-lab real --output_dir runs/real                     # makes the base
    python benchmarks/nested.py quantize score opponents alone static company     # a part at a time, or several; what is there is kept
    python benchmarks/nested.py time --old 4cd01d5         # `quantize` as it comes, beside an older build out of this repository's history; once more adds a turn

The base was made plain from a 4-bit grid, so its hidden channels are permuted first, which changes no logit (`same_function`); `--how none` leaves the grid as
it is. Divergence is from the plain model's predictions in float32, on test windows. Raw data go to data/benchmarks/nested.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from merge_lab.architecture import decoder_layers
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.nested_model import layer_linears, linear_bytes, memory_table
from merge_lab.routed_model import LayerwiseQuantizeForCausalLM
from merge_lab.run_folder import write_json
from merge_lab.same_function import leave_grid
from merge_lab.static_mix import budget_of, headroom, least_divergent, measured_costs, moved_mixes
from merge_lab.systems.quantize import QuantizeConfig, run_quantize
from merge_lab.text_windows import collate, exact_logits, text_windows, window_divergences, window_losses
from merge_lab.token_levels import best_mixes
from merge_lab.writer import write_tokenizer

PREFIX = 32  # tokens of a window that are not scored


def processor_seconds() -> float:
    "Of this process, its threads included."
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Bench:
    "A base, its folder, and the file of results."

    def __init__(self, options):
        self.options, self.file = options, Path(options.output)
        self.base = Path(options.folder) / f"base-{options.how}"
        self.nested = Path(options.folder) / f"nested-{options.how}-{options.method}"
        self.known = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.rows = self.known.setdefault(options.how, {})
        self.known["about"] = {
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "windows": options.windows,
            "seq_len": options.seq_len,
            "text": options.text,
        }

    def keep(self, key: str, **values):
        "Write a result down."
        self.rows.setdefault(key, {}).update(values)
        write_json(self.file, self.known)
        print(key, values, flush=True)

    def make_base(self):
        "The base off its grid."
        if (self.base / "config.json").exists():
            return
        model = load_model(self.options.model, "auto")
        if self.options.how != "none":
            leave_grid(model, self.options.how)
        model.save_pretrained(self.base)
        write_tokenizer(load_tokenizer(self.options.model), self.base)

    def quantize(self):
        "Time and size of the folder."
        if (self.nested / "config.json").exists():
            return
        begun, used = time.perf_counter(), processor_seconds()
        config = QuantizeConfig(str(self.base), str(self.nested), method=self.options.method, num_samples=self.options.calibration, resume=self.nested.exists())
        run_quantize(config)
        size = {
            name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for name, folder in (("folder_bytes", self.nested), ("original_bytes", self.base))
        }
        self.keep(
            f"quantize {self.options.method}",
            seconds=time.perf_counter() - begun,
            processor_seconds=processor_seconds() - used,
            calibration=self.options.calibration,
            layer_weights=self.layer_weights(),
            **size,
        )

    def layer_weights(self) -> int:
        "Weights of the decoder layers."
        return sum(p.numel() for layer in decoder_layers(load_model(self.base, "auto")) for p in layer.parameters())

    def draw(self):
        "Test windows, their labels, and the plain model's logits."
        text = text_windows(load_tokenizer(self.base), [self.options.text], self.options.seq_len, self.options.windows, "test", 0)
        self.ids, self.labels = collate(text, PREFIX)
        self.exact = self.logits_of(load_model(self.base, "float32"))
        self.keep("plain", ce=window_losses(self.exact, self.labels).mean().item(), windows=len(text))

    @torch.no_grad()
    def logits_of(self, model) -> torch.Tensor:
        "Logits of the test windows."
        return torch.cat([model(input_ids=part).logits for part in self.ids.split(4)])

    def score(self, key: str, model, **facts):
        "Divergence and cross-entropy of a plain model."
        found = self.logits_of(model)
        apart = window_divergences(found, self.exact, self.labels)
        self.keep(key, kl=apart.mean().item(), error=(apart.std() / len(apart) ** 0.5).item(), ce=window_losses(found, self.labels).mean().item(), **facts)

    def wanted(self, key: str) -> bool:
        "Whether it is not scored yet."
        return "kl" not in self.rows.get(key, {})

    def rounded(self, function) -> torch.nn.Module:
        "The plain base with each linear's weight replaced by what a function makes of it."
        model = load_model(self.base, "float32")
        for layer in decoder_layers(model):
            for linear in layer_linears(layer).values():
                linear.weight.data.copy_(function(linear.weight.data))
        return model

    def dequantized(self, model, bits: dict[str, int]) -> torch.nn.Module:
        "The plain base with the nested weights at one precision for each linear."
        plain = load_model(self.base, "float32")
        for n, (layer, own) in enumerate(zip(decoder_layers(plain), decoder_layers(model.model))):
            for name, linear in layer_linears(layer).items():
                chosen = bits[f"{n}.{name}"]
                linear.weight.data.copy_(own.get_submodule(name).nested(chosen).dequantize(chosen))
        return plain


def nearest(weight, bits, size=64):
    "Round to nearest in groups, scale and zero in 16 bits."
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return ((groups - low) / step).round().clamp(0, 2**bits - 1).mul(step).add(low).flatten(1)


def hqq(weight, bits, size=64):
    "HQQ with its own settings, groups of 64."
    from hqq.core.quantize import Quantizer

    packed, facts = Quantizer.quantize(weight, nbits=bits, channel_wise=True, group_size=size, optimize=True, axis=1, device="cpu", compute_dtype=torch.float32)
    return Quantizer.dequantize(packed, facts)


@torch.no_grad()
def score_nested(bench: Bench):
    "All precisions of the folder; bytes are counted, not computed."
    model = LayerwiseQuantizeForCausalLM.from_quantized(bench.nested)
    table, weights = memory_table(model), bench.layer_weights()
    for bits in model.precisions:
        key = f"{bench.options.method} {bits}"
        if bits in bench.options.bits and bench.wanted(key):
            read, held = (int(table.loc[f"{bits} bits", name]) for name in ("read_bytes_per_token", "held_bytes"))
            plain = bench.dequantized(model, dict.fromkeys(linear_bytes(model), bits))
            bench.score(key, plain, read_bytes=read, held_bytes=held, real_bits=8 * read / weights)


@torch.no_grad()
def score_opponents(bench: Bench):
    "Round-to-nearest and HQQ in groups of 64: 32 bits of scale and zero for each."
    for name, function in (("nearest-64", nearest), ("hqq-64", hqq)):
        for bits in bench.options.bits:
            if (name == "nearest-64" or bits in (3, 4)) and bench.wanted(f"{name} {bits}"):
                bench.score(f"{name} {bits}", bench.rounded(partial(function, bits=bits)), real_bits=bits + 0.5)


def score_alone(bench: Bench):
    "Compensated codes of one precision alone: the same rounding and layout, with nothing to be nested in."
    for bits in (3, 4):
        if bits in bench.options.bits and bench.wanted(f"alone {bits}"):
            folder, options = Path(bench.options.folder) / f"alone-{bench.options.how}-{bits}", bench.options
            if not (folder / "config.json").exists():
                run_quantize(QuantizeConfig(str(bench.base), str(folder), seed_precision=bits, parent_precision=bits, num_samples=options.calibration, resume=folder.exists()))
            model = LayerwiseQuantizeForCausalLM.from_quantized(folder)
            read, plain = int(memory_table(model).read_bytes_per_token.iloc[-1]), bench.dequantized(model, dict.fromkeys(linear_bytes(model), bits))
            bench.score(f"alone {bits}", plain, read_bytes=read, real_bits=8 * read / bench.layer_weights())


def score_static(bench: Bench):
    "The best static mix for each linear at each budget, and what an oracle would save of it; costs are measured on training text."
    begun, used, options = time.perf_counter(), processor_seconds(), bench.options
    model = LayerwiseQuantizeForCausalLM.from_quantized(bench.nested, [3, 4, 5, 6, 8])
    few = text_windows(load_tokenizer(bench.base), [options.text], options.seq_len, options.cost_windows, "train", 0)
    costs = measured_costs(model, few, PREFIX)
    rows = headroom(model, costs, options.budgets).to_dict("records")
    bench.keep("headroom", seconds=time.perf_counter() - begun, processor_seconds=processor_seconds() - used, rows=rows)
    for target, bits in zip(sorted(options.budgets), best_mixes(model, costs.sum(2).mean((0, 1)), options.budgets)):
        read = sum(own[bits[name]] for name, own in linear_bytes(model).items())
        bench.score(f"static {target:g}", bench.dequantized(model, bits), read_bytes=read, real_bits=read / budget_of(model, 1), bits=bits)


def score_company(bench: Bench):
    "The best mixes by costs of each linear alone, and moved in company where validation windows like it; both on test windows, beside the model at 8 bits. A seed is another draw of all windows."
    options, tokenizer = bench.options, load_tokenizer(bench.base)
    model = LayerwiseQuantizeForCausalLM.from_quantized(bench.nested, [3, 4, 5, 6, 8])
    model.slot.keep_all = True  # memory for time
    done = [{row["seed"] for row in bench.rows.get(f"company {target:g}", {}).get("rows", [])} for target in options.budgets]
    for seed in (seed for seed in options.seeds if not all(seed in seeds for seeds in done)):
        begun = processor_seconds()
        seen, held, test = (text_windows(tokenizer, [options.text], options.seq_len, options.cost_windows, split, seed) for split in ("train", "validation", "test"))
        exact, asked = exact_logits(model, held), exact_logits(model, test)
        costs, taken = measured_costs(model, seen, PREFIX, seed).sum(2).mean((0, 1)), {}
        for target, mix in zip(sorted(options.budgets), best_mixes(model, costs, options.budgets)):
            tried = moved_mixes(model, mix, budget_of(model, target), seen, PREFIX, seed=seed)
            chosen, *scores = least_divergent(model, tried, held, PREFIX, exact)
            scores += [least_divergent(model, [each], test, PREFIX, asked)[1] for each in (mix, chosen)]
            on_held, alone, moved = (float(some.kl.mean()) for some in scores)
            print(f"seed {seed}, {target:g} bits: {alone:.4f} alone, {moved:.4f} in company", flush=True)
            taken[target] = dict(seed=seed, alone=alone, in_company=moved, on_validation=on_held, changed=sum(mix[name] != bits for name, bits in chosen.items()), proposed=len(tried) - 1)
        for target, row in taken.items():
            known = [old for old in bench.rows.get(f"company {target:g}", {}).get("rows", []) if old["seed"] != seed]
            bench.keep(f"company {target:g}", rows=[*known, row | dict(processor_seconds=round((processor_seconds() - begun) / len(taken), 1))])


def quantize_once(root: Path, model: str) -> dict[str, float]:
    "Seconds and bytes of `merge-lab quantize` with its defaults, in a process of its own on one thread."
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", "import sys; from merge_lab.cli import main; sys.exit(main())", "quantize", model, "--output_dir", f"{folder}/out"]
        subprocess.run(words, cwd=folder, env=os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1"), check=True)
        size = sum(file.stat().st_size for file in Path(folder, "out").glob("*.safetensors"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return dict(seconds=time.perf_counter() - begun, processor_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, folder_bytes=size)


def score_time(bench: Bench):
    "Ours and an older build in turns; each turn is added to those that are there."
    with tempfile.TemporaryDirectory() as old:
        archive = subprocess.run(["git", "archive", bench.options.old], cwd=HERE, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "x", "-C", old], input=archive.stdout, check=True)
        for name, root in ((bench.options.old, Path(old)), ("ours", HERE)):
            turns = bench.rows.get(f"time {name}", {}).get("turns", [])
            bench.keep(f"time {name}", turns=[*turns, quantize_once(root, str(bench.base.resolve()))])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["base", "quantize", "score", "opponents", "alone", "static", "company", "time"]
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--model", default="runs/real/base")
    parser.add_argument("--folder", default="runs/nested-benchmark", help="models that are made on the way")
    parser.add_argument("--how", default="permute", choices=["permute", "rotate", "none"])
    parser.add_argument("--method", default="compensated", choices=["compensated", "nearest", "clusters"])
    parser.add_argument("--calibration", type=int, default=32, help="windows of `quantize` (default: 32)")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5, 6, 7, 8])
    parser.add_argument("--text", default="prose")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--cost_windows", type=int, default=8, help="training windows that costs are measured on (default: 8)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.5, 4.0, 4.5], help="bits a weight, tables and scales included")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the windows of `company` (default: 0 1 2)")
    parser.add_argument("--old", default="4cd01d5", help="build that `time` is measured beside (default: 4cd01d5)")
    parser.add_argument("--output", default="data/benchmarks/nested.json")
    options = parser.parse_args()
    bench = Bench(options)
    bench.make_base()
    if "quantize" in options.parts:
        bench.quantize()
    if {*options.parts} - {"base", "quantize", "company", "time"}:
        bench.draw()
    if "score" in options.parts:
        score_nested(bench)
    if "opponents" in options.parts:
        score_opponents(bench)
    if "alone" in options.parts:
        score_alone(bench)
    if "static" in options.parts:
        score_static(bench)
    if "company" in options.parts:
        score_company(bench)
    if "time" in options.parts:
        score_time(bench)


if __name__ == "__main__":
    main()
