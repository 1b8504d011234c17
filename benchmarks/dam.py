"""What DAM does on the bundled models: scores, coefficients, regularisers, and teachers that run against stored ones.

    python benchmarks/dam.py                    # everything: about an hour on one core
    python benchmarks/dam.py --parts teachers cost
    python benchmarks/dam.py --parts scores --seeds 1

Models are made, trained and exported by the three commands of DAM, and the exported checkpoints are scored by plain
transformers. Each part replaces its own rows in data/benchmarks/dam.json and leaves the others alone.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers
from torch import Tensor

from merge_lab.chat import build_dataset, ChatCollator, load_task
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import call
from merge_lab.components import load_model
from merge_lab.devices import set_seed
from merge_lab.evaluation import evaluate_tasks
from merge_lab.memory import track_memory
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import coefficient_penalty, Objective
from merge_lab.run_folder import read_history, write_json
from merge_lab.systems import dam, mask_merge
from merge_lab.teacher_cache import STORED_TOPK
from merge_lab.teacher_dataset import stored_teacher, TopkCollator
from merge_lab.tinylm import tiny_model

TASKS = ["rewrite", "summarize", "extract"]
BASE = "data/models/base"
EXPERTS = [f"data/models/{task}" for task in TASKS]
DATA = [f"data/tasks/{task}" for task in TASKS]
EVERYTHING = ["--use_embedding_layers", "--merge_layernorms"]
VARIANTS = {  # name -> options of dam-merge
    "DAM": EVERYTHING,
    "DAM, base blended": [*EVERYTHING, "--use_base_model"],
    "DAM, linear layers only": [],
}
TRAINING = {"learning_rate": 3e-2, "max_steps": 600, "per_device_train_batch_size": 32}
SHORT = {"max_steps": 100}  # where runs are only compared with each other
PENALTIES = {  # name -> option of dam-train, weight
    "none": None,
    "similarity": ("lambda_coef", 1.0),
    "l1": ("lambda_coef_l1", 1.0),
    "l2": ("lambda_coef_l2", 1.0),
    "overlap": ("lambda_coef_overlap", 10.0),
    "angle_overlap": ("lambda_coef_angle", 10.0),
}


def options_of(values: dict) -> list[str]:
    "A dict as words of a command line."
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def alone(command: str, words: list[str]) -> dict[str, float]:
    "Run a command in a process of its own; what it took, its start included."
    program = "import sys, torch; torch.set_num_threads(int(sys.argv[1])); from merge_lab.cli import main; sys.exit(main(sys.argv[2:]))"
    process = subprocess.Popen([sys.executable, "-c", program, str(torch.get_num_threads()), command, *words])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} {' '.join(words)} ended with status {status}")
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}


class Lab:
    "Where runs are kept, and what every part needs."

    def __init__(self, folder: Path, seeds: int, training: dict, output: Path):
        self.folder, self.seeds, self.training, self.output = folder, range(seeds), training, output
        self.part = ""  # what is being measured
        self.tokenizer = load_tokenizer(BASE)
        self.tests = {task: load_task(path, "test") for task, path in zip(TASKS, DATA)}

    def keep(self, found: dict):
        "Write what was found; what else the file holds stays."
        held = json.loads(self.output.read_text()) if self.output.exists() else {}
        command = f"python benchmarks/dam.py --parts {self.part} --seeds {len(self.seeds)}"
        commands = {"commands": held.get("commands", {}) | {self.part: command}}
        write_json(self.output, held | facts(self) | commands | found)

    def untrained(self, variant: str) -> str:
        "The untrained model of a variant, made once."
        path = str(self.folder / variant / "untrained")
        if not Path(path).exists():
            call(
                "dam-merge",
                [BASE, *EXPERTS, "--output_dir", path, "--dtype", "float32", *VARIANTS[variant]],
            )
        return path

    def dataset(self) -> str:
        "The data with stored teachers, made once, in a process of its own."
        path = str(self.folder / "dataset")
        words = ["--k", "50", "--datasets", *DATA, "--model_paths", *EXPERTS]
        words += ["--base_model", BASE, "--output_dir", path, "--dtype", "float32"]
        if not (self.folder / "dataset.json").exists():
            words += ["--device", "cpu", "--batch_size", "64", "--overwrite"]
            write_json(self.folder / "dataset.json", alone("dam-topk", words))
        return path

    def train(self, variant: str, name: str, **options) -> Path:
        "Train once, from stored teachers unless told otherwise, in a process of its own; the folder of the run."
        path = self.folder / variant / name
        if not (path / "merged" / "model.safetensors").exists():
            values = {
                "untrained_merged_model_name": self.untrained(variant),
                "hf_disk_dataset_dir": self.dataset(),
                "generate_logits_on_fly": False,
                "output_dir": path,
                "save_steps": 0,
                "teacher_cache_gb": 0,  # components that teach run in every step
                "device": "cpu",
                "overwrite": True,
                **self.training,
                **options,
            }
            write_json(path / "cost.json", alone("dam-train", options_of(values)))
        return path

    def score(self, model, name: str, **labels) -> list[dict]:
        "Loss and exact match on the test split of every task."
        table = evaluate_tasks(model, self.tokenizer, self.tests, progress=False).reset_index()
        print(f"{name} {labels or ''}: exact match {table['exact_match'].tolist()}", flush=True)
        columns = table[["task", "n", "loss", "exact_match"]].round(6)
        return [{"model": name, **labels, **row} for row in columns.to_dict("records")]

    def score_merged(self, folder: Path, name: str, **labels) -> list[dict]:
        "Scores of an exported checkpoint, read by plain transformers."
        return self.score(load_plain(folder / "merged"), name, **labels)


def load_plain(folder: Path):
    "A checkpoint as anyone would load it."
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def measure_baselines(lab: Lab) -> dict:
    "Base, experts and averages, on every task: nothing is trained."
    rows = lab.score(load_model(BASE, dtype="float32"), "base")
    for task, path in zip(TASKS, EXPERTS):
        rows += lab.score(load_model(path, dtype="float32"), f"expert {task}")
    for variant in VARIANTS:
        merger = dam.DAMMerger.from_pretrained(lab.untrained(variant)).eval()
        rows += lab.score(merger, variant.replace("DAM", "uniform average"))
    return {"baselines": rows}


def measure_scores(lab: Lab) -> dict:
    "DAM in its variants and mask merges, on every task; those that fall short are trained once only."
    rows, makers = [], {variant: partial(lab.train, variant) for variant in VARIANTS}
    makers |= {name: partial(train_masks, lab, name) for name in MASKS}
    plan = [(model, seed) for seed in lab.seeds for model in makers if seed == 0 or model not in ONCE]
    for model, seed in plan:
        rows += lab.score_merged(makers[model](f"seed {seed}", seed=seed), model, seed=seed)
        lab.keep({"scores": rows})  # it takes long: what is there is worth keeping
    return {"scores": rows, **coefficients(lab)}


MASKS = {  # comparison with fewer or other coefficients -> mode of the mask merge
    "mask merge, output rows": "vector_output",
    "mask merge, one per weight": "scalar",
    "one per component": "scalar",
}
ONCE = {"DAM, linear layers only", "mask merge, one per weight", "one per component"}


class OneForAll(transformers.TrainerCallback):
    "Gives all masks the sum of their gradients: what starts equal stays equal, as one coefficient per component."

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        masks = [mask for mask in model.parameters() if mask.grad is not None]
        total = torch.stack([mask.grad for mask in masks]).sum(0)
        for mask in masks:
            mask.grad.copy_(total)


def train_masks(lab: Lab, model: str, name: str, seed: int) -> Path:
    "A mask merge on the same data, steps and teachers; the folder of the run."
    folder = lab.folder / model / name
    config = mask_merge.MaskMergeConfig(
        model_paths=EXPERTS,
        dataset_configs=dict.fromkeys(DATA),
        mode=MASKS[model],
        dtype="float32",
        temperature=2.0,
        lr_scheduler_type="linear",
        seed=seed,
        save_steps=0,
        device="cpu",
        overwrite=True,
        output_dir=str(folder),
        **lab.training,
    )
    if (folder / "merged" / "model.safetensors").exists():
        return folder
    ready = mask_merge.prepare(config)
    set_seed(config.seed)
    merger = Merger.from_config(config)
    trainer, _, stopper = mask_merge.make_trainer(merger, ready, progress=False)
    if model == "one per component":
        trainer.add_callback(OneForAll())
    mask_merge.train(trainer, stopper, ready)
    merger.eval().save_merged(ready.merged_dir)
    return folder


def coefficients(lab: Lab) -> dict:
    "Coefficients of the run with the base blended, per layer and, of some weights, per column."
    run = lab.train("DAM, base blended", "seed 0", seed=0)
    merger = dam.DAMMerger.from_pretrained(run)
    leaves, columns = merger.leaves(), {}
    for layer in (0, 3):
        for module in ("self_attn.q_proj", "mlp.up_proj"):
            alphas = leaves[f"model.layers.{layer}.{module}"].alphas()
            columns[f"{layer}.{module}"] = [[round(a, 3) for a in alpha.tolist()] for alpha in alphas]
    table = merger.alphas().round(4)
    return {
        "names": merger.names,
        "alphas": json.loads(table.to_json(orient="records")),
        "columns": columns,
    }


def measure_regularisers(lab: Lab) -> dict:
    "Each regulariser alone, against none: what it does to the coefficients, the loss and the scores."
    rows = []
    for seed in lab.seeds:
        for name, penalty in PENALTIES.items():
            options = SHORT if penalty is None else SHORT | {penalty[0]: penalty[1]}
            run = lab.train("DAM", f"regulariser {name} {seed}", seed=seed, **options)
            merger = dam.DAMMerger.from_pretrained(run)
            scores = lab.score_merged(run, name, seed=seed)
            rows.append({
                "run": name,
                "seed": seed,
                "weight": penalty[1] if penalty else 0.0,
                "kl": read_history(run / "history.jsonl")["kl"].tail(20).mean(),
                **penalties_of(merger),
                **{f"exact_match_{row['task']}": row["exact_match"] for row in scores},
            })
            lab.keep({"regularisers": rows})
    return {"regularisers": rows}


def penalties_of(merger: Merger) -> dict[str, float]:
    "Value of every regulariser, whether it was weighed or not."
    objective = Objective(angles=dam.task_angles(merger))
    names = [name for name in PENALTIES if name != "none"]
    with torch.no_grad():
        return {name: round(coefficient_penalty(merger, name, objective).item(), 5) for name in names}


def gradient_of(merger: Merger, batch: dict[str, Tensor], compared: str = "kl") -> tuple[float, Tensor]:
    "Loss and gradient of all masks."
    loss = merger(objective=Objective({compared: 1.0}, temperature=2.0), **batch)["loss"]
    gradients = torch.autograd.grad(loss, [mask for mask in merger.parameters() if mask.requires_grad])
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def stored_batch(teachers: list[Merger], rows: list[dict], tokenizer, k: int) -> dict[str, Tensor]:
    "The rows as training reads them from disk: teachers through float16, unless k is the vocabulary."
    collate, stored = ChatCollator(tokenizer), []
    for source, teacher in enumerate(teachers):
        own = [row for row in rows if row["source"] == source]
        stored += [row | found for row, found in zip(own, stored_teacher(teacher, own, collate, k, 2.0))]
    return TopkCollator(tokenizer, k)(stored)


def single(model) -> Merger:
    "A component alone, as a teacher."
    return Merger([model], MergerConfig()).eval()


def measure_teachers(lab: Lab) -> dict:
    "Loss and gradient from k stored tokens against those from the components, before and after training."
    rows = bundled_rows(lab)
    teachers = [single(load_model(path, dtype="float32")) for path in EXPERTS]
    ks = (1, 2, 5, 10, 20, 50, 100, len(lab.tokenizer))
    batches = {0: ChatCollator(lab.tokenizer)(rows)} | {k: stored_batch(teachers, rows, lab.tokenizer, k) for k in ks}
    whens, found = {"before training": lab.untrained("DAM"), "after training": lab.train("DAM", "seed 0", seed=0)}, []
    for (when, folder), compared in itertools.product(whens.items(), ("kl", "mse")):
        merger = dam.DAMMerger.from_pretrained(folder).eval()
        _, reference = gradient_of(merger, batches[0], compared)
        for k, batch in batches.items():
            loss, gradient = gradient_of(merger, batch, compared)
            cosine = torch.cosine_similarity(gradient, reference, dim=0).item()
            facts_ = {"when": when, "compared": compared, "k": k, "loss": loss}
            found.append(facts_ | {"cosine": cosine, "norm": gradient.norm().item()})
    return {"teachers": found, "vocabulary": len(lab.tokenizer)}


def measure_noise(lab: Lab) -> dict:
    "Norm of the gradient where nothing is to be learned: three copies of one expert."
    live, found = ChatCollator(lab.tokenizer)(bundled_rows(lab)), {}
    for task, path in zip(TASKS, EXPERTS):
        merger = Merger([load_model(path, dtype="float32") for _ in TASKS], MergerConfig(mode="vector_input")).eval()
        found[task] = gradient_of(merger, live)[1].norm().item()
    return {"noise": found}


def bundled_rows(lab: Lab, split: str = "train") -> list[dict]:
    "Thirty-two rows of every task."
    return list(build_dataset(dict.fromkeys(DATA, 32), lab.tokenizer, split))


LIVE, STORED = "components run", "top-50 stored"


def measure_runs(lab: Lab) -> dict:
    "Whole runs with components as teachers and with 50 stored tokens: what they end with, and what they take."
    batch, rows, coefficients = ChatCollator(lab.tokenizer)(bundled_rows(lab, "test")), [], {}
    for seed in lab.seeds:
        for teachers, name in {LIVE: f"components run, seed {seed}", STORED: f"seed {seed}"}.items():
            run = lab.train("DAM", name, seed=seed, generate_logits_on_fly=teachers == LIVE)
            merger = dam.DAMMerger.from_pretrained(run).eval()
            coefficients[teachers, seed] = torch.tensor(merger.alpha_values()["alpha"].tolist())
            with torch.inference_mode():
                kl, kl_top = (merger(objective=Objective(temperature=2.0, k=k), **batch)["loss"].item() for k in (None, 50))
            scores = {row["task"]: row for row in lab.score_merged(run, f"DAM, {teachers}", seed=seed)}
            rows.append({
                "teachers": teachers, "seed": seed, **json.loads((run / "cost.json").read_text()), "kl": kl, "kl_top50": kl_top,
                **{f"{name}_{task}": row[name] for task, row in scores.items() for name in ("loss", "exact_match")},
            })
            lab.keep({"runs": rows})
    lab.dataset()
    storing = json.loads((lab.folder / "dataset.json").read_text())
    return {"runs": rows, "storing": storing, "apart": distances(coefficients)}


def distances(coefficients: dict[tuple[str, int], Tensor]) -> list[dict]:
    "Root mean square between the coefficients of every two runs."
    found = []
    for (first, one), (second, other) in itertools.combinations(coefficients, 2):
        apart = (coefficients[first, one] - coefficients[second, other]).square().mean().sqrt().item()
        found.append({"first": first, "first_seed": one, "second": second, "second_seed": other, "rms": apart})
    return found


def wide_rows(vocabulary: int, rows: int = 6, length: int = 96) -> list[dict]:
    "Random tokens, half of them scored, two rows for each of three sources."
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator).tolist()
    half = [-100] * (length // 2)
    return [
        {"input_ids": row, "labels": half + row[length // 2 :], "source": i % 3} for i, row in enumerate(ids)
    ]


def measure_cost(lab: Lab, repeats: int = 9) -> dict:
    "Time and memory of a step with components as teachers and with 50 stored tokens, taking turns."
    wide = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=4, vocab_size=16384)
    setups = {
        "bundled": (lambda i: load_model(EXPERTS[i], dtype="float32"), bundled_rows(lab)),
        "random, 16k tokens": (lambda i: tiny_model("llama", seed=i, **wide), wide_rows(wide["vocab_size"])),
    }
    found = []
    for setup, (model, rows) in setups.items():
        stored = stored_batch([single(model(i)) for i in range(3)], rows, lab.tokenizer, 50)
        live = {name: value for name, value in stored.items() if name not in STORED_TOPK}
        merger = Merger([model(i) for i in range(3)], MergerConfig(mode="vector_input"))
        for name, cost in compare_cost(merger, {LIVE: live, STORED: stored}, repeats).items():
            found.append({"setup": setup, "teachers": name, "scored tokens": scored(live), **cost})
            print(found[-1], flush=True)
    files = list(Path(lab.dataset()).glob("*.arrow"))
    return {"cost": found, "dataset_bytes": sum(file.stat().st_size for file in files)}


def scored(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"] != -100).sum())


def compare_cost(merger: Merger, batches: dict[str, dict], repeats: int) -> dict[str, dict]:
    "CPU seconds and peak temporary bytes of a step on each batch, in alternation."
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(repeats + 1):
        for name, batch in batches.items():
            taken = seconds_of(gradient_of, merger, batch)
            seconds[name] += [taken] * (turn > 0)  # the first turn warms up
    found = {}
    for name, batch in batches.items():
        with track_memory(merger) as use:
            gradient_of(merger, batch)
        found[name] = {
            "median": statistics.median(seconds[name]),
            "fastest": min(seconds[name]),
            "slowest": max(seconds[name]),
            "bytes": use.peak_bytes - use.parts["components"],
        }
    return found


def seconds_of(run: Callable, *arguments) -> float:
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


PARTS = {
    "baselines": measure_baselines,
    "scores": measure_scores,
    "regularisers": measure_regularisers,
    "teachers": measure_teachers,
    "noise": measure_noise,
    "runs": measure_runs,
    "cost": measure_cost,
}


def facts(lab: Lab) -> dict:
    "What the figures depend on."
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, {torch.get_num_threads()} thread used",
        "training": lab.training,
        "training of regularisers": lab.training | SHORT,
        "penalties": {name: pair for name, pair in PENALTIES.items() if pair},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="What to measure")
    parser.add_argument("--seeds", type=int, default=2, help="Orders of the data, from 0 on")
    parser.add_argument("--threads", type=int, default=1, help="Of torch")
    parser.add_argument("--folder", type=Path, help="Keep runs here, and use those that are there; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path("data/benchmarks/dam.json"))
    arguments = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab(arguments.folder or Path(temporary), arguments.seeds, dict(TRAINING), arguments.output)
        for lab.part in arguments.parts:
            lab.keep(PARTS[lab.part](lab))


if __name__ == "__main__":
    main()
