"""Time and memory of one training step, side by side: the approaches of earlier systems, and ours.

    python benchmarks/bench.py --device cpu --size tiny
    python benchmarks/bench.py --device cuda --size 3b

All contestants share the same frozen components, masks and batch, run in one process, and take turns, so that a slow spell of
the machine meets all of them. Per cell: median step time, its spread, the ratio to the better of the two earlier approaches, peak
memory, tokens per second, and the share of the measured matrix-product rate that the necessary operations reach.

The earlier approaches run as their systems run them. What torch.compile adds to theirs and to ours stands in rows of its own,
for one share of scored tokens, one batch and one n. "Later passes" are the steps of a run that meets its samples again: what the
teachers said of them in the first pass is read from a file. Writing it, milliseconds in a step, is in no row.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from merge_lab.distributed import frozen_bytes
from merge_lab.masks import IMPLS
from merge_lab.memory import estimate_memory, track_memory
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.teacher_cache import TeacherCache
from merge_lab.token_losses import shift_labels
from merge_lab.training import compiled_layers

SIZES = {
    "tiny": dict(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=16384,
        tie_word_embeddings=True,
    ),
    "3b": dict(  # the shape of Llama-3.2-3B
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "8b": dict(  # the shape of Llama-3-8B
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
}
TOKENS = {
    "tiny": [128, 512, 2048],
    "3b": [128, 1024, 2048, 8192, 32768],
    "8b": [128, 1024, 2048, 8192, 32768],
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def masked_weights(x, weights, alphas, bias, merged):
    "`x @ (mask_a * w_a + mask_b * w_b).T` left to autograd: the weight masks of earlier systems."
    dtype = weights[0].dtype
    return F.linear(x, sum(a.to(dtype) * w for a, w in zip(alphas, weights)), bias)


LATER = ", later passes"  # steps whose samples the teachers have read before
IMPLS["autograd"] = (masked_weights, "for comparison only")


def plain_kl(merger, input_ids, labels, source, attention_mask=None, **_):
    "Full logits of student and teacher in fp32, as earlier systems compute it."
    student = merger.model(input_ids=input_ids).logits
    teacher = torch.cat(
        [
            merger.component_forward(int(i), input_ids=row[None]).logits
            for row, i in zip(input_ids, source)
        ]
    )
    return {"loss": _full_kl(student, teacher, labels)}


def _full_kl(student, teacher, labels):
    log_q = F.log_softmax(student.float(), -1)
    log_p = F.log_softmax(teacher.float(), -1)
    token_losses = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    scored = shift_labels(labels) != -100
    return (token_losses * scored).sum() / scored.sum()


class FunctionalCall:
    "Merge all weights, then call a plain model with them."

    def __init__(self, merger: Merger):
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                merger.config, dtype=merger.model.dtype
            )
        self.model.train()

    def _tensors(self, merger: Merger, component: int | None):
        tensors = {
            name.replace("template.", ""): buffer
            for name, buffer in merger.model.named_buffers()
        }
        for name, leaf in merger.leaves().items():
            for key in leaf.parameter_names:
                weights = list(leaf.weights[key])
                if component is not None or key not in leaf.masks:
                    tensors[f"{name}.{key}"] = weights[component or 0]
                else:
                    alphas = [alpha.to(weights[0].dtype) for alpha in leaf.alphas(key)]
                    tensors[f"{name}.{key}"] = sum(
                        a * w for a, w in zip(alphas, weights)
                    )
        if self.model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        return tensors

    def _logits(self, merger, component, input_ids):
        tensors = self._tensors(merger, component)
        kwargs = dict(input_ids=input_ids, use_cache=False)
        return torch.func.functional_call(
            self.model, tensors, kwargs=kwargs, tie_weights=True
        ).logits

    def __call__(self, merger, input_ids, labels, source, **_):
        student = self._logits(merger, None, input_ids)
        with torch.no_grad():
            teacher = torch.cat(
                [
                    self._logits(merger, int(i), row[None])
                    for row, i in zip(input_ids, source)
                ]
            )
        return {"loss": _full_kl(student, teacher, labels)}


@dataclass(frozen=True)
class Cell:
    "One setting."

    n: int  # components
    batch: int  # samples
    tokens: int  # per sample
    scored: float = 1.0  # share of the tokens that the loss is taken on


@dataclass
class Contestant:
    "One way of computing a step."

    name: str
    impl: str
    objective: Callable
    checkpointing: bool = False
    earlier: bool = False  # an approach of an earlier system
    compiled: bool = False  # decoder layers through torch.compile

    @property
    def later(self) -> bool:
        "Whether the teachers have read its samples before."
        return self.name.endswith(LATER)


def contestants(merger: Merger, folder: Path) -> list[Contestant]:
    "Everyone; files of ours go to the folder."
    ours = Objective({"kl": 1.0}, fused=True)
    again = dataclasses.replace(
        ours, teachers=TeacherCache(folder / f"{merger.n_components}.cache", merger)
    )
    return [
        Contestant("masks on weights", "autograd", plain_kl, earlier=True),
        Contestant("masks on input", "efficient", plain_kl, earlier=True),
        Contestant("functional_call", "autograd", FunctionalCall(merger)),
        Contestant("accurate + full logits", "accurate", plain_kl),
        Contestant("ours", "fused", ours),
        Contestant("ours + checkpointing", "fused", ours, checkpointing=True),
        Contestant("weights, compiled", "autograd", plain_kl, compiled=True),
        Contestant("ours, compiled", "fused", ours, compiled=True),
        Contestant("ours" + LATER, "fused", again),
        Contestant("ours, compiled" + LATER, "fused", again, compiled=True),
    ]


def build(size: str, n: int, device: str, kinds: list[str]) -> Merger:
    "A merger of n random components of this shape, on the device."
    config = LlamaConfig(
        **SIZES[size],
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    models, dtype = [], getattr(torch, DTYPES[device])
    for _ in range(n):
        with torch.device(device):
            models.append(
                AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(
                    False
                )
            )
    merger = Merger(models, MergerConfig(target_kinds=kinds)).train()
    merger.config.use_cache = False
    return merger


def batch_of(
    merger: Merger, batch: int, tokens: int, scored: float = 1.0
) -> dict[str, torch.Tensor]:
    "Random token ids without padding, the last share of them scored; sources take turns."
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(
        3, merger.config.vocab_size, (batch, tokens), generator=generator
    ).to(merger.device)
    source = (torch.arange(batch) % merger.n_components).to(merger.device)
    labels = ids.clone()
    labels[:, : tokens - round(scored * tokens)] = -100
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, source=source
    )


@contextmanager
def as_contestant(merger: Merger, who: Contestant):
    "Switch impl, checkpointing and compilation."
    merger.state.impl = who.impl
    if who.checkpointing:
        merger.checkpoint_activations()
    try:
        with compiled_layers(merger) if who.compiled else nullcontext():
            yield
    finally:
        for module in merger.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def step(merger, who, batch, optimizer):
    "What is timed: forward, backward, optimizer."
    merger(**batch, objective=who.objective)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def timed(merger, who, batch, optimizer, device) -> float:  # seconds
    with as_contestant(merger, who):
        synchronize(device)
        start = time.perf_counter()
        step(merger, who, batch, optimizer)
        synchronize(device)
        return time.perf_counter() - start


def measured_memory(merger, who, batch, optimizer, device) -> dict:
    "Peak bytes: the allocator's on CUDA, live storages by part on the CPU."
    with as_contestant(merger, who):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(merger, who, batch, optimizer)
            torch.cuda.synchronize()
            return {"peak_bytes": torch.cuda.max_memory_allocated()}
        with track_memory(merger) as use:
            step(merger, who, batch, optimizer)
        return {"peak_bytes": use.peak_bytes, "parts": use.parts}


PRODUCTS, ATTENTION = ("aten::mm", "aten::bmm", "aten::addmm"), "scaled_dot_product"


def necessary_share(merger, who, batch, optimizer) -> dict[str, float]:
    "Share of a step's processor time that matrix products and attention take, which no approach can do without (CPU)."
    with as_contestant(merger, who), torch.profiler.profile() as profiler:
        step(merger, who, batch, optimizer)
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    products = sum(spent.get(name, 0) for name in PRODUCTS)
    attention = sum(time for name, time in spent.items() if ATTENTION in name)
    return {
        "products": products / sum(spent.values()),
        "attention": attention / sum(spent.values()),
    }


def gradients(merger, who, batch) -> torch.Tensor:
    with as_contestant(merger, who):
        merger.zero_grad(set_to_none=True)
        merger(**batch, objective=who.objective)["loss"].backward()
        found = torch.cat(
            [p.grad.flatten() for p in merger.parameters() if p.requires_grad]
        )
        merger.zero_grad(set_to_none=True)
        return found


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_cell(
    merger, everyone, cell: "Cell", args, hopeless: set[str]
) -> list[dict]:
    "One setting: everyone takes turns."
    batch = batch_of(merger, cell.batch, cell.tokens, cell.scored)
    first = (args.components[0], args.batches[0], args.scored[0])
    everyone = [who for who in everyone if not who.compiled or (cell.n, cell.batch, cell.scored) == first]
    trained = [p for p in merger.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # all see the same masks
    rows = {}
    for who in everyone:  # the first step warms up, its memory is read
        row = {
            "contestant": who.name,
            "earlier": who.earlier,
            **dataclasses.asdict(cell),
            "times": [],
        }
        rows[who.name] = row
        if who.name in hopeless:
            row["oom"] = True
            continue
        try:
            if args.device == "cuda" or who.compiled or who.later:
                timed(merger, who, batch, optimizer, args.device)
            if args.device == "cuda" or not who.compiled:  # compiled code does not pass where live storages are counted
                row |= measured_memory(merger, who, batch, optimizer, args.device)
            if args.device == "cpu" and not who.compiled:
                row["share"] = necessary_share(merger, who, batch, optimizer)
        except torch.OutOfMemoryError:
            row["oom"] = True
            hopeless.add(who.name)
        merger.zero_grad(set_to_none=False)
        free()
    for _ in range(args.repeats):
        for who in everyone:
            if not rows[who.name].get("oom"):
                try:
                    rows[who.name]["times"].append(
                        timed(merger, who, batch, optimizer, args.device)
                    )
                except torch.OutOfMemoryError:
                    rows[who.name]["oom"] = True
                    merger.zero_grad(set_to_none=False)
                    free()
    optimizer.zero_grad(set_to_none=True)
    return list(rows.values())


def useful_flops(
    merger: Merger, batch: int, tokens: int, taught: bool = False
) -> float:
    "Operations that no approach can avoid: teacher unless it was read before, student, gradient of inputs, gradient of masks."
    weights = sum(
        leaf.weights["weight"][0].numel()
        for name, leaf in merger.leaves().items()
        if "weight" in leaf.weights
        and leaf.weights["weight"][0].ndim == 2
        and "embed" not in name
    )
    config, count = merger.config, batch * tokens
    attention = (
        2
        * batch
        * tokens**2
        * config.num_attention_heads
        * config.head_dim
        * config.num_hidden_layers
    )  # causal
    head = merger.config.vocab_size * merger.config.hidden_size if taught else 0
    passes = 3 if taught else 4
    return 2 * count * (weights * passes + head) + attention * (passes - 3 + 1 + 2.5)


def matmul_rate(device: str) -> float:  # operations per second
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / statistics.median(times[2:])


def finish(rows: list[dict], merger: Merger, rate: float):
    "Medians, ratios and shares of one cell."
    for row in rows:
        row["seconds"] = statistics.median(row["times"]) if row["times"] else None
    earlier = [
        r["seconds"]
        for r in rows
        if r["earlier"] and r["seconds"]
    ]
    for row in rows:
        if row["seconds"]:
            row["spread"] = (max(row["times"]) - min(row["times"])) / row["seconds"]
            row["tokens_per_second"] = row["batch"] * row["tokens"] / row["seconds"]
            row["flops_utilisation"] = (
                useful_flops(
                    merger,
                    row["batch"],
                    row["tokens"],
                    row["contestant"].endswith(LATER),
                )
                / rate
                / row["seconds"]
            )
            row["ratio"] = row["seconds"] / min(earlier) if earlier else None


def over_passes(rows: list[dict]) -> list[dict]:
    "Per cell and contestant, the mean ratio of runs of one, two and three passes over their samples."
    found = []
    ratios = {
        (r["contestant"], r["n"], r["batch"], r["tokens"], r["scored"]): r.get("ratio")
        for r in rows
    }
    for (name, *cell), later in ratios.items():
        base = name.removesuffix(LATER)
        first = ratios[(base, *cell)]
        if base != name and first and later:
            setting = dict(zip(("n", "batch", "tokens", "scored"), cell))
            means = {str(n): (first + (n - 1) * later) / n for n in (1, 2, 3)}
            found.append(dict(contestant=base, **setting, passes=means))
    return found


def add_estimate(row: dict, config, everyone, kinds, device: str):
    "What estimate_memory says of the same step."
    who = next(w for w in everyone if w.name == row["contestant"])
    named = who.impl != "autograd" and not who.compiled and not who.later
    if not named or row["scored"] != 1:  # a config cannot say the others
        return
    estimate = estimate_memory(
        config,
        n_components=row["n"],
        seq_len=row["tokens"],
        batch_size=row["batch"],
        dtype=DTYPES[device],
        impl=who.impl,
        gradient_checkpointing=who.checkpointing,
        target_kinds=kinds,
        device=device,
        objective=who.objective,
    )
    row |= {"estimated_bytes": estimate.peak_bytes, "estimated_parts": estimate.parts}
    if row.get("peak_bytes"):
        row["estimate_error"] = estimate.peak_bytes / row["peak_bytes"] - 1


def machine(device: str) -> dict:
    found = {
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":")[1].strip()
            for line in lines
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def table(rows: list[dict]) -> str:
    lines = [
        f"{'n':>2} {'batch':>5} {'tokens':>6} {'scored':>6} {'contestant':28s} {'s/step':>8} {'ratio':>6} {'spread':>6} "
        f"{'GiB':>7} {'est.':>7} {'tok/s':>8} {'util':>5}"
    ]
    for r in rows:
        head = f"{r['n']:2d} {r['batch']:5d} {r['tokens']:6d} {r['scored']:6.2f} {r['contestant']:28s} "
        if r.get("oom") or not r["seconds"]:
            lines.append(
                head
                + " out of memory"
                + (
                    f", estimate {r['estimated_bytes'] / 2**30:.2f} GiB"
                    if "estimated_bytes" in r
                    else ""
                )
            )
            continue
        ratio = f"{r['ratio']:6.2f}" if r["ratio"] else "     -"
        peak = f"{r['peak_bytes'] / 2**30:7.2f}" if "peak_bytes" in r else "      -"
        estimated = (
            f"{r['estimated_bytes'] / 2**30:7.2f}"
            if "estimated_bytes" in r
            else "      -"
        )
        lines.append(
            head
            + f"{r['seconds']:8.3f} {ratio} {r['spread']:6.2f} {peak} {estimated} "
            f"{r['tokens_per_second']:8.0f} {r['flops_utilisation']:5.2f}"
        )
    return "\n".join(lines)


def write(args, result: dict):
    name = f"{args.device}-{args.size}.json"
    for folder in [args.output, os.environ.get("OUT")]:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_text(json.dumps(result, indent=1) + "\n")


def settings(args) -> list[Cell]:
    "All lengths at the first n, batch and share; other batches, n and shares at one length."
    n, batch, scored = args.components[0], args.batches[0], args.scored[0]
    longest = max(args.tokens)
    cells = [Cell(n, batch, tokens, scored) for tokens in args.tokens]
    for share in args.scored[1:]:
        cells += [Cell(n, batch, tokens, share) for tokens in args.tokens]
    cells += [Cell(n, b, min(512, longest), scored) for b in args.batches[1:]]
    return cells + [
        Cell(m, batch, min(512, longest), scored) for m in args.components[1:]
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="context lengths; default: those of the size",
    )
    parser.add_argument("--components", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--scored",
        type=float,
        nargs="+",
        default=[1.0, 0.5],
        help="share of the tokens that the loss is taken on; in chat data the prompt is not scored",
    )
    parser.add_argument(
        "--kinds", nargs="+", default=["linear"], help="kinds of module that are masked"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--seconds",
        type=float,
        default=900,
        help="no new cell is begun after this time",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-estimate", action="store_true")
    parser.add_argument(
        "--output",
        default=str(Path(__file__).resolve().parent.parent / "data" / "benchmarks"),
    )
    args = parser.parse_args()
    args.tokens = args.tokens or TOKENS[args.size]
    if args.threads:
        torch.set_num_threads(args.threads)
    begun, rate = time.perf_counter(), matmul_rate(args.device)
    result = {
        "command": "python benchmarks/bench.py " + " ".join(sys.argv[1:]),
        "machine": machine(args.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "size": args.size,
        "shape": SIZES[args.size],
        "dtype": DTYPES[args.device],
        "kinds": args.kinds,
        "matmul_flops_per_second": rate,
        "cells": [],
    }
    merger, folder = None, tempfile.TemporaryDirectory()
    for cell in settings(args):
        if time.perf_counter() - begun > args.seconds:
            print(f"out of time: {cell} left out", flush=True)
            continue
        if merger is None or merger.n_components != cell.n:
            merger = everyone = None
            free()
            merger = build(args.size, cell.n, args.device, args.kinds)
            everyone, hopeless = contestants(merger, Path(folder.name)), set()
            result.setdefault("floor_bytes", {})[cell.n] = frozen_bytes(merger)
            if "gradient_difference" not in result:
                small = batch_of(merger, 1, 128)
                plain, ours = (
                    gradients(merger, everyone[i], small).double() for i in (0, 4)
                )
                result["gradient_difference"] = (
                    (plain - ours).norm() / plain.norm()
                ).item()
        rows = run_cell(
            merger, everyone, cell, args, hopeless if cell.batch == 1 else set()
        )
        finish(rows, merger, rate)
        result["cells"] += rows
        print(table(rows), f"\n[{time.perf_counter() - begun:.0f} s]", flush=True)
        write(args, result)
    result["over_passes"] = over_passes(result["cells"])
    write(args, result)
    if not args.no_estimate:
        for row in result["cells"]:
            if time.perf_counter() - begun < args.seconds + 90:
                add_estimate(row, merger.config, everyone, args.kinds, args.device)
        write(args, result)
    floor = useful_flops(merger, 1, 2048) / rate
    print(
        f"\n{result['machine'].get('gpu', result['machine']['processor'])}: {rate / 1e12:.3g} TFLOP/s in a matrix product; floor at "
        f"2,048 tokens: {floor:.3f} s and {result['floor_bytes'][args.components[0]] / 2**30:.2f} GiB"
    )
    print(
        f"gradients of ours and the plain approach differ by {result['gradient_difference']:.1e} (relative)"
    )
    print(table(result["cells"]))
    for row in result["over_passes"]:
        shares = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in row["passes"].items())
        print(
            f"{row['tokens']} tokens, n {row['n']}, batch {row['batch']}, {row['scored']:.0%} scored, {row['contestant']}: "
            f"mean ratio by passes over the data {shares}"
        )


if __name__ == "__main__":
    main()
