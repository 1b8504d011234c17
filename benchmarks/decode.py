"""Time of a token on a CPU: a quantised model read at several precisions beside the plain model in bfloat16 and float32.

    merge-lab quantize runs/real/base --output_dir runs/quantized
    python benchmarks/decode.py --model runs/real/base --quantized runs/quantized

One process, one row, one thread by default. Contestants take turns, some tokens each, so that a slow spell of the machine meets all; the prompt is not counted.
"Planes" are products with the codes as they lie; "made plain" turns each weight into a plain one for each token; "held plain" does so once and holds all.
Agreement: of the next tokens that planes and plain weights predict, one token at a time along a text. Raw data go to data/benchmarks/decode.json.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.nested_model import memory_table
from merge_lab.routed_model import LayerwiseQuantizeForCausalLM
from merge_lab.run_folder import write_json
from merge_lab.text_windows import text_windows

PROMPT = 32  # tokens


def processor_name() -> str:
    "What the system calls it."
    file = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0] if names else platform.processor()


@contextmanager
def reading(model, bits: int | None, direct: bool, keep_all: bool):
    "A quantised model at one precision, one way to multiply; nothing for a plain one."
    if bits is None:
        yield
        return
    slot, before = model.slot, (model.slot.direct, model.slot.keep_all)
    slot.direct, slot.keep_all = direct, keep_all
    slot.clear()
    with model.set_precision(bits):
        yield
    slot.direct, slot.keep_all = before
    slot.clear()


@torch.no_grad()
def decode(model, ids: torch.Tensor, count: int, given: torch.Tensor | None = None) -> tuple[list[float], list[float], torch.Tensor]:
    "Seconds and processor seconds of each token after the prompt, and logits; tokens are the likeliest ones, or given."
    forward = getattr(model, "infer_forward", model)
    output, seconds, processor, logits = forward(input_ids=ids, use_cache=True), [], [], []
    for n in range(count):
        token = output.logits[:, -1:].argmax(-1) if given is None else given[:, n : n + 1]
        begun, used = time.perf_counter(), time.process_time()
        output = forward(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
        logits.append(output.logits[:, -1].float())
    return seconds, processor, torch.cat(logits)


def contestants(options) -> dict[str, tuple]:
    "By name: model, bits, direct, keep_all."
    nested = LayerwiseQuantizeForCausalLM.from_quantized(options.quantized)
    found = {name: (load_model(options.model, name), None, False, False) for name in ("bfloat16", "float32")}
    found |= {f"planes, {bits} bits": (nested, bits, True, False) for bits in options.bits}
    return found | {"held plain, 4 bits": (nested, 4, False, True), "made plain, 4 bits": (nested, 4, False, False)}


def take_turns(found: dict, ids, options) -> dict[str, dict]:
    "Median seconds of a token over all turns; the first of each turn warms up."
    seconds, processor = {name: [] for name in found}, {name: [] for name in found}
    for turn in range(options.turns):
        for name, (model, *how) in found.items():
            few = 3 if name.startswith("made plain") else options.tokens
            with reading(model, *how):
                took, used, _ = decode(model, ids, few + 1)
            seconds[name] += [took[1:]]
            processor[name] += [used[1:]]
        print(turn, {name: round(1000 * statistics.median(turns[-1])) for name, turns in processor.items()}, flush=True)
    both = (("seconds", seconds), ("processor_seconds", processor))
    return {name: {f"{kind}_of_turns": [statistics.median(turn) for turn in values[name]] for kind, values in both} for name in found}


def agreement(model, bits: int, windows, count: int) -> dict[str, float]:
    "Planes beside plain weights, the latter in the model's dtype, one token at a time."
    alike, apart = [], []
    for window in windows:
        ids = window.input_ids[None]
        given, logits = ids[:, PROMPT : PROMPT + count], {}
        for direct in (True, False):
            with reading(model, bits, direct, not direct):
                logits[direct] = decode(model, ids[:, :PROMPT], given.shape[1], given)[2].log_softmax(-1)
        alike += (logits[True].argmax(-1) == logits[False].argmax(-1)).tolist()
        apart += (logits[False].exp() * (logits[False] - logits[True])).sum(-1).tolist()
    return dict(tokens=len(alike), same_token=statistics.mean(alike), kl=statistics.mean(apart))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/real/base", help="folder of the model; merge-lab real makes it (default: %(default)s)")
    parser.add_argument("--quantized", default="runs/quantized", help="what merge-lab quantize made of it (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5, 6, 8], help="precisions that are read, 4 and 8 among them (default: 3 4 5 6 8)")
    parser.add_argument("--tokens", type=int, default=12, help="of a turn (default: 12)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2, help="texts along which predictions are compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="data/benchmarks/decode.json")
    options = parser.parse_args()
    if not {4, 8} <= set(options.bits):
        parser.error(f"--bits {options.bits}: expected 4 and 8 among them.")
    torch.set_num_threads(options.threads)
    found, windows = contestants(options), text_windows(load_tokenizer(options.model), ["prose"], 96, options.windows, "test", 0)
    rows = take_turns(found, windows[0].input_ids[None, :PROMPT], options)
    nested = found["planes, 4 bits"][0]
    table = memory_table(nested)
    for bits in options.bits:
        rows[f"planes, {bits} bits"] |= dict(read_bytes=int(table.loc[f"{bits} bits", "read_bytes_per_token"]))
    about = dict(versions={name: version(name) for name in ("torch", "transformers")}, machine=processor_name(), threads=options.threads, tokens=options.tokens)
    about |= dict(avx512="avx512bw" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else None)
    file = Path(options.output)
    known = json.loads(file.read_text()) if file.exists() else {}
    known[f"{options.threads} thread{'s' * (options.threads > 1)}"] = dict(about=about, rows=rows, agreement={bits: agreement(nested, bits, windows, 64) for bits in (4, 8)})
    write_json(file, known)
    for name, row in rows.items():
        print(f"{name:20} {1000 * statistics.median(row['processor_seconds_of_turns']):8.1f} ms of a processor, {1000 * statistics.median(row['seconds_of_turns']):8.1f} ms")


if __name__ == "__main__":
    main()
