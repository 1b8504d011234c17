"""What LoRA learns of the bundled tasks, and what is left of it when two adapters become one.

    python benchmarks/lora.py                            # everything, seeds 42, 43: about 30 minutes of one core
    python benchmarks/lora.py --parts adapters merge --seeds 43

Writes data/benchmarks/lora.json and lora_merge.json; rows of other parts and seeds that the files hold are kept, and the
command of each part is kept with it. Adapters are trained once a seed and kept in --folder. Scores are exact match and loss
on 100 test questions of each task.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from merge_lab.adapters import fixed_loss, load_adapter, load_base, probe_logits
from merge_lab.chat import load_task, prompt_of
from merge_lab.checkpoints import load_tokenizer
from merge_lab.evaluation import evaluate_tasks
from merge_lab.masks import MODES
from merge_lab.run_folder import bundled_path, write_json
from merge_lab.sft_data import add_task_prefix, mix_tasks, prepare_dataset
from merge_lab.systems.lora import SmoLoRA, train_with_ranks, use_curriculum
from merge_lab.systems.lora_merge import LoRAMergeConfig, peft_baselines, run

TASKS = ("rewrite", "summarize")
BASE = bundled_path("models/base")
DATA = {task: bundled_path(f"tasks/{task}") for task in TASKS}
TESTS = {task: load_task(DATA[task], "test", n=100) for task in TASKS}
PARTS = ("adapters", "merge", "ranks", "curriculum", "prefix")


def pipeline(folder, rows, seed, **sft):
    "Rank 16 on every linear layer, 350 steps of 32 rows."
    return SmoLoRA(
        BASE,
        rows,
        output_dir=folder,
        device="cpu",
        lora=dict(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="aggressive"),
        sft=dict(
            max_steps=350,
            learning_rate=4e-3,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=1,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=25,
            seed=seed,
            disable_tqdm=True,
        )
        | sft,
    )


def scores_of(model, tests=TESTS, **options):
    return evaluate_tasks(model, load_tokenizer(BASE), tests, progress=False, **options)


def asked_elsewhere(folder, prompt) -> str:
    "The answer of a new process that knows the folder only."
    script = (
        "from merge_lab.systems.lora import SmoLoRA\n"
        f"lora = SmoLoRA({str(BASE)!r}, output_dir={str(folder)!r}, device='cpu')\n"
        f"print(lora.inference({prompt!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def adapter(folder, task, seed) -> dict:
    "Train, merge, score, and ask from a new process; one row."
    lora = pipeline(folder / f"{task}-{seed}", DATA[task], seed)
    wall, cpu = time.perf_counter(), time.process_time()
    curves = lora.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row = dict(task=task, seed=seed, wall_seconds=wall, cpu_seconds=cpu)
    row["merge"] = lora.save()
    row["exact_match"] = scores_of(lora.model).exact_match.to_dict()
    prompt = prompt_of(TESTS[task][0])[0]["content"]
    answer = asked_elsewhere(lora.output_dir, prompt)
    row["same_answer_in_new_process"] = answer == lora.inference(prompt)
    row["curve"] = dict(step=curves.index.tolist(), loss=curves.loss.round(4).tolist())
    return row


SCHEDULES = {
    "growing": [4, 8, 16],
    "fixed 4": [4],
    "fixed 16": [16],
    "fixed 16, restarted": [16],
}


def ranks(folder, seed):
    """150 steps with a rank that grows, or one rank throughout; losses on a fixed batch.

    Each stage has its own warm-up and decay of the learning rate, so one rank is trained both ways: once, and in three stages.
    """
    for schedule, stages in SCHEDULES.items():
        times, name = (3 if "restarted" in schedule else 1), schedule.replace(", ", "-")
        where = folder / f"ranks-{name.replace(' ', '-')}-{seed}"
        lora = pipeline(where, DATA["summarize"], seed, max_steps=150 // times)
        table = train_with_ranks(lora, stages)
        for _ in range(times - 1):
            lora.train()
            last = fixed_loss(lora.model, lora.tokenizer, lora.dataset)
            table = table.assign(loss_last=last, steps=150)
        table = table.reset_index().assign(seed=seed, schedule=schedule)
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        test = scores_of(lora.model, {"summarize": TESTS["summarize"]}).loc["summarize"]
        rows[-1]["test_loss"] = float(test.loss)
        yield from rows


def in_order(folder, seed, ordered: bool) -> dict:
    "Both tasks at random, or the short rows first; the loss on both at the end."
    rows = mix_tasks({t: prepare_dataset(DATA[t]) for t in TASKS}, False, seed=seed)
    lora = pipeline(folder / f"curriculum-{ordered}-{seed}", rows, seed, max_steps=125)
    if ordered:
        use_curriculum(lora)
    curves = lora.train()
    loss = scores_of(lora.model, metrics=["loss"]).loss.to_dict()
    curve = curves.loss.round(4).to_dict()
    return dict(curriculum=ordered, seed=seed, loss=loss, curve=curve)


def without_instruction(rows) -> datasets.Dataset:
    "The same conversations, asked with the sentence alone."
    bare = []
    for row in rows:
        question, answer = row["messages"]
        sentence = question["content"].split(": ", 1)[1]
        bare.append({"messages": [{**question, "content": sentence}, answer]})
    return datasets.Dataset.from_list(bare)


def with_prefix(folder, seed, prefix: bool) -> dict:
    "One adapter on both tasks, told apart by a prefix or by nothing."
    tasks = {
        t.capitalize(): without_instruction(prepare_dataset(DATA[t])) for t in TASKS
    }
    rows = mix_tasks(tasks, prefix, seed=seed)
    lora = pipeline(folder / f"prefix-{prefix}-{seed}", rows, seed, max_steps=600)
    lora.train()
    tests = {task: without_instruction(rows) for task, rows in TESTS.items()}
    if prefix:
        tests = {
            task: add_task_prefix(rows, task.capitalize())
            for task, rows in tests.items()
        }
    found = scores_of(lora.model, {task: list(rows) for task, rows in tests.items()})
    return dict(prefix=prefix, seed=seed, exact_match=found.exact_match.to_dict())


def row_of(model, **facts) -> dict:
    found = scores_of(model)
    for name in ("exact_match", "loss"):
        facts |= {f"{name}_{task}": float(found[name][task]) for task in TASKS}
    return facts


def map_of(alphas) -> dict[str, list]:
    "The alphas of a blend by layer, kind of module and component: what its map shows."
    columns = ["module", "layer", "kind", "parameter", "component", "mean", "std"]
    return alphas[columns].round(4).to_dict("list")


def blend(folder, adapters, seed, mode, share="module") -> dict:
    "Train one blend; score its exported adapter."
    config = LoRAMergeConfig(
        adapters=adapters,
        datasets=[str(path) for path in DATA.values()],
        n_samples=1000,
        mode=mode,
        share=share,
        max_steps=200,
        learning_rate=0.03,
        initial_alpha=0.5,
        device="cpu",
        seed=seed,
        save_steps=0,
        output_dir=str(folder / f"blend-{mode}-{share}-{seed}"),
        overwrite=True,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    result = run(config)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    merger = result["merger"].eval()
    exported = load_adapter(load_base(BASE, "cpu"), Path(config.output_dir) / "adapter")
    gap = (probe_logits(exported) - probe_logits(merger.model)).abs().max().item()
    alphas = {"alphas": map_of(result["alphas"])} if mode == "vector_output" else {}
    return row_of(
        exported,
        method="learned",
        mode=mode,
        share=share,
        seed=seed,
        trained_values=sum(p.numel() for p in merger.parameters() if p.requires_grad),
        wall_seconds=wall,
        cpu_seconds=cpu,
        export_gap=gap,
        merge_gap=result["report"]["max_logit_difference"],
        history=result["history"].loss.round(4).tolist()[::10],
        **alphas,
    )


def merges(folder, seed):
    "Rows of the two adapters, of peft's combinations and of the trained blends."
    adapters = [str(folder / f"{t}-{seed}" / "adapter_checkpoint") for t in TASKS]
    for task, path in zip(TASKS, adapters):
        single = load_adapter(load_base(BASE, "cpu"), path)
        yield row_of(single, method=f"adapter {task}", seed=seed)
    for weight in (0.5, 1.0):
        combined = peft_baselines(BASE, adapters, weight, device="cpu", seed=seed)
        for method, model in combined:
            yield row_of(model, method=f"peft {method}", weight=weight, seed=seed)
    for mode in MODES:
        yield blend(folder, adapters, seed, mode)
    for share in ("layer", "adapter"):
        yield blend(folder, adapters, seed, "scalar", share)


KEYS = ("method", "mode", "share", "weight", "task", "schedule", "rank", "curriculum")
KEYS += ("prefix", "seed")


def command_of(part: str, rows: list[dict]) -> str:
    "What makes the rows that a part has by now."
    seeds = " ".join(map(str, sorted({row["seed"] for row in rows})))
    parts = {"results": "adapters merge"}.get(part, part)
    return f"python benchmarks/lora.py --parts {parts} --seeds {seeds}"


def keep(name: str, part: str, row: dict):
    "Put a row into a file of results, in place of the one measured before."
    path = bundled_path("benchmarks") / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    key = [row.get(k) for k in KEYS]
    others = [r for r in found.get(part, []) if [r.get(k) for k in KEYS] != key]
    rows = sorted([*others, row], key=lambda r: r["seed"])
    found |= dict(
        command="python benchmarks/lora.py",
        commands=found.get("commands", {}) | {part: command_of(part, rows)},
        machine=f"{platform.machine()}, {os.cpu_count()} cores, CPU, "
        f"{torch.get_num_threads()} thread; shared with other work, so wall_seconds are"
        " not of a quiet machine; cpu_seconds are",
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            **{n: version(n) for n in ("transformers", "peft", "trl")},
        ),
    )
    write_json(path, found | {part: rows})


def measure(part: str, folder: Path, seed: int):
    "Rows of one part and seed, kept as they come."
    if part == "adapters":
        for task in TASKS:
            keep("lora", part, adapter(folder, task, seed))
    elif part == "merge":
        for task in TASKS:
            if not (folder / f"{task}-{seed}" / "adapter_checkpoint").exists():
                keep("lora", "adapters", adapter(folder, task, seed))
        for row in merges(folder, seed):
            keep("lora_merge", "results", row)
    elif part == "ranks":
        for row in ranks(folder, seed):
            keep("lora", part, row)
    else:
        function = in_order if part == "curriculum" else with_prefix
        for choice in (False, True):
            keep("lora", part, function(folder, seed, choice))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", default=PARTS, choices=PARTS)
    add("--seeds", nargs="+", type=int, default=[42, 43])
    add("--folder", default="runs/lora-benchmark", help="where adapters are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for seed in given.seeds:
        for part in given.parts:
            measure(part, Path(given.folder).absolute(), seed)
            print(f"{part}, seed {seed}: done", flush=True)


if __name__ == "__main__":
    main()
