"""What a step costs on chat-like lengths: ours beside an older build of ours, and beside one step of trl's SFTTrainer.

    python benchmarks/step.py --rows 8 --old 4cd01d5           # an older build, out of this repository's history
    python benchmarks/step.py --rows 32 --dtype bfloat16
    python benchmarks/step.py --lengths 512 --rows 8           # rows of equal length
    python benchmarks/step.py --lengths 512 --rows 8 --profile # which operations a step of ours spends its time on

Models of SmolLM2-135M's shape with random weights. Each contestant is a process of its own; they take turns, one step each, so that
a slow spell of the machine meets all. Lengths: log-normal, median 250 tokens, sigma 0.8, at most 2,048; the second half of each row
is scored. "Later passes" read what the teachers said of these rows in the first. Time is the processes' own (of one thread by
default, which other work on the machine disturbs least). Raw data go to data/benchmarks/step.json, with the commit of ours; a setting
that is measured again takes the place of what was there, since contestants of two runs do not stand side by side.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "trl")
SHAPE = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
    tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
CONTESTANTS = ("old", "old, later passes", "ours", "ours, later passes", "base given", "adapters", "adapters, later passes", "merged adapters",
               "sft", "sft, adapter")


def row_lengths(rows, lengths, seed=0):
    "Tokens of each row: log-normal, or as many as are asked for."
    import torch

    if lengths:
        return [lengths] * rows
    drawn = torch.empty(rows).log_normal_(5.521, 0.8, generator=torch.Generator().manual_seed(seed))  # exp(5.521) = 250
    return drawn.round().clamp(16, 2048).int().tolist()


def make_models(folder, dtype):
    "A base, two full fine-tunes 1 % away, two adapters of rank 16 on all linears, and the same two merged into the base."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    for i in range(2):
        other = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        with torch.no_grad():
            for weight in other.parameters():
                weight += torch.randn_like(weight) * 0.01 * weight.std() if weight.ndim > 1 else 0
        other.save_pretrained(folder / f"tune-{i}")
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False))
        adapted.save_pretrained(folder / f"adapter-{i}")
        adapted.merge_and_unload().save_pretrained(folder / f"merged-{i}")


def batch_of(rows, lengths, seed):
    "Right-padded random rows; sources take turns, the second half of each is scored."
    import torch

    sizes, draw = row_lengths(rows, lengths, seed), torch.Generator().manual_seed(seed)
    ids, mask = torch.full((rows, max(sizes)), 2), torch.zeros(rows, max(sizes), dtype=torch.long)
    for row, size in enumerate(sizes):
        ids[row, :size], mask[row, :size] = torch.randint(3, SHAPE["vocab_size"], (size,), generator=draw), 1
    labels = ids.clone()
    for row, size in enumerate(sizes):
        labels[row, : size // 2] = labels[row, size:] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels, source=torch.arange(rows) % 2)


def merger_step(folder, who, args):
    "A function that does one training step of a merger."
    import torch
    from merge_lab.merger import Merger

    try:
        from merge_lab.merger_config import MergerConfig
        from merge_lab.teacher_cache import TeacherCache
    except ImportError:  # the older build
        from merge_lab.merger import MergerConfig
        from merge_lab.objective import TeacherCache
    from merge_lab.objective import Objective

    kind = "adapter" if who.startswith("adapters") else "merged" if who.startswith("merged") else "tune"
    config = MergerConfig(model_paths=[str(folder / f"{kind}-{i}") for i in range(2)], dtype=args.dtype)
    if hasattr(config, "base_model"):
        config.base_model = str(folder / "base") if who == "base given" or kind != "tune" else "mean"
    if kind == "merged":
        config.thin_deltas = True
    merger = Merger.from_config(config).train()
    merger.config.use_cache = False
    objective = Objective()
    if who.endswith("later passes"):
        objective.teachers = TeacherCache(folder / f"{who}.cache", merger, 2**33)
    optimizer = torch.optim.AdamW([p for p in merger.parameters() if p.requires_grad], lr=0.0)

    def step(batch):
        for part in range(0, args.rows, args.micro):
            rows = {name: value[part : part + args.micro] for name, value in batch.items()}
            longest = int(rows["attention_mask"].sum(1).max())
            rows = {name: value[:, :longest] if value.ndim == 2 else value for name, value in rows.items()}
            merger(**rows, objective=objective, num_items_in_batch=(batch["labels"] != -100).sum())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def sft_step(folder, who, args):
    "A function that does one step of trl's SFTTrainer on the same rows, all weights or an adapter."
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer
    import torch

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=args.dtype)
    sft = SFTConfig(
        output_dir=str(folder / "sft"), per_device_train_batch_size=args.micro, gradient_accumulation_steps=args.rows // args.micro,
        max_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=args.dtype == "bfloat16", max_length=None,
        disable_tqdm=True, learning_rate=1e-9, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, shuffle_dataset=False,
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if who == "sft, adapter" else None
    row = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    tokenizer = args.tokenizer()
    trainer = SFTTrainer(model=model, args=sft, train_dataset=row, processing_class=tokenizer, peft_config=adapter)
    trainer.create_optimizer()

    def step(batch):
        trainer.model.train()
        for part in range(0, args.rows, args.micro):
            rows = []
            for ids, mask, labels in zip(*(batch[name][part : part + args.micro] for name in ("input_ids", "attention_mask", "labels"))):
                size = int(mask.sum())
                rows.append({"input_ids": ids[:size].tolist(), "labels": labels[:size].tolist()})
            trainer.training_step(trainer.model, trainer.data_collator(rows), torch.tensor((batch["labels"] != -100).sum()))
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return step


def tiny_tokenizer():
    "A tokenizer that trl asks for its padding only."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 2}, "a")), eos_token="</s>", pad_token="</s>")


def give_back():
    "What the allocator keeps of freed memory goes back to the system, since contestants wait side by side."
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def work(args):
    "A contestant: a line in, a step done, a line out."
    folder, args.tokenizer = Path(args.folder), tiny_tokenizer
    step = (sft_step if args.worker.startswith("sft") else merger_step)(folder, args.worker, args)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the error stream
    print("ready", file=out)
    for line in sys.stdin:
        batch = batch_of(args.rows, args.lengths, int(line))
        wall, own = time.perf_counter(), time.process_time()
        step(batch)
        used = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - own}
        give_back()
        print(json.dumps(used | {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), file=out)


PRODUCTS = ("mm", "addmm", "bmm", "matmul", "linear")


def profiled(args):
    "Seconds of one step of ours by kind of operation, as torch's profiler counts them; then by operation."
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), args.dtype)
        step, batch = merger_step(Path(folder), "ours", args), batch_of(args.rows, args.lengths, seed=0)
        step(batch)
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            step(batch)
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in prof.key_averages()}
    kinds = dict.fromkeys(("products", "attention", "other"), 0.0)
    for name, seconds in spent.items():
        bare = name.removeprefix("aten::").strip("_")
        kinds["products" if bare in PRODUCTS else "attention" if "attention" in bare else "other"] += seconds
    return {"seconds": kinds, "operations": dict(sorted(spent.items(), key=lambda pair: -pair[1])[:25])}


def commit_here():
    "The commit of this checkout, with a plus where files differ from it."
    said = [subprocess.run(["git", *words], cwd=HERE, stdout=subprocess.PIPE, text=True, check=False).stdout.strip() for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "merge_lab"))]
    return said[0] + "+" * bool(said[1])


def start(who, folder, args, old):
    "The process of a contestant, when it is ready."
    code = old if who.startswith("old") else HERE
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--worker", who, "--folder", str(folder), "--rows", str(args.rows), "--micro", str(args.micro)]
    command += ["--lengths", str(args.lengths), "--dtype", args.dtype]
    with open(folder / f"{who}.log", "w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{who} did not start:\n{(folder / f'{who}.log').read_text()[-3000:]}")
    return process


def ask(process, seed):
    "One step on the batch of a seed."
    process.stdin.write(f"{seed}\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise SystemExit(f"a contestant ended with {process.wait()}: {process.args[3]}; if the system ran out of memory, fewer rows at once (--micro) need less")
    return json.loads(line)


def take_turns(args, folder, old):
    "Steps of every contestant, in turns: the first of each warms up (and is what later passes read)."
    found = {who: [] for who in args.contestants}
    running = {who: start(who, folder, args, old) for who in args.contestants}
    for turn in range(args.repeats + 1):
        for who, process in running.items():
            row = ask(process, seed=0)
            found[who] += [row] if turn else []
            print(f"{turn}/{args.repeats} {who}: {row['processor_seconds']:.1f} s of processor time, {row['peak_resident_bytes'] / 2**30:.2f} GiB", flush=True)
    for process in running.values():
        process.stdin.close()
        process.wait()
    return found


def summary(found, real, padded):
    "A line for each contestant."
    times = {who: statistics.median(row["processor_seconds"] for row in rows) for who, rows in found.items()}
    lines = [f"{real} tokens, {padded} when padded", f"{'':28}{'seconds':>9}{'spread':>9}{'of old':>8}{'of sft':>8}{'GiB':>7}"]
    for who, rows in found.items():
        took = [row["processor_seconds"] for row in rows]
        ratios = [f"{times[who] / times[other]:8.2f}" if other in times else " " * 8 for other in ("old", "sft")]
        lines.append(f"{who:28}{times[who]:9.1f}{max(took) - min(took):9.1f}{''.join(ratios)}{max(r['peak_resident_bytes'] for r in rows) / 2**30:7.2f}")
    return "\n".join(lines)


def write(args, found):
    "Keep what was found of a setting."
    file = HERE / (args.output or f"data/benchmarks/step{'_profile' if args.profile else ''}.json")
    written = json.loads(file.read_text()) if file.exists() else {}
    named = f"{args.rows} rows, {args.micro} at once, {args.lengths or 'log-normal'} tokens, {args.dtype}"
    where = {"versions": {name: version(name) for name in PACKAGES}, "machine": platform.processor() or platform.machine()}
    written[named] = found | {"ours": commit_here(), "threads": args.threads} | where
    file.write_text(json.dumps(written, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="rows of an optimizer step (default: 8)")
    parser.add_argument("--micro", type=int, default=8, help="rows of a forward pass (default: 8)")
    parser.add_argument("--lengths", type=int, default=0, help="tokens of every row; 0: log-normal (default)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each (default: 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--old", default="4cd01d5", help="commit of the older build (default: 4cd01d5)")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--profile", action="store_true", help="tell what one step of ours spends its time on, instead")
    parser.add_argument("--output", help="default: data/benchmarks/step.json, with --profile step_profile.json beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if args.profile:
        found = profiled(args)
        total = sum(found["seconds"].values())
        print("\n".join(f"{kind:12}{seconds:8.1f} s  {seconds / total:4.0%}" for kind, seconds in found["seconds"].items()))
        return write(args, found)
    with tempfile.TemporaryDirectory() as folder:
        folder, old = Path(folder), Path(folder) / "old"
        if any(who.startswith("old") for who in args.contestants):
            old.mkdir()
            archive = subprocess.run(["git", "archive", args.old], cwd=HERE, stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "x", "-C", str(old)], input=archive.stdout, check=True)
        make_models(folder, args.dtype)
        found = take_turns(args, folder, old)
    sizes = row_lengths(args.rows, args.lengths)
    parts = [sizes[i : i + args.micro] for i in range(0, args.rows, args.micro)]
    padded = sum(max(part) * len(part) for part in parts)
    print(summary(found, sum(sizes), padded))
    write(args, {"tokens": sum(sizes), "padded": padded, "old": args.old, "times": found})


if __name__ == "__main__":
    main()
