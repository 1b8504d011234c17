"""What a learned share of two layers is worth: the bundled deep model, and every way to make it shorter.

    python benchmarks/layer_merge.py --make-model runs/deep   # train the model again
    python benchmarks/layer_merge.py                          # measure the bundled one: writes data/benchmarks/layer_merge.json

Text is the documentation of the running Python, split so that no run of twelve words stands on two sides
(`merge_lab.calibration.split_text`); questions are those of data/mmlu, whose test questions are never trained on.
"""

import argparse
import copy
import functools
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers

from merge_lab.calibration import apart_from, prepare_calibration_data, split_text
from merge_lab.chat import format_choice, letters, load_mmlu
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.depth import find_merge_pairs, layer_similarity, remove_layers, seconds_per_token
from merge_lab.run_folder import bundled_path, write_json
from merge_lab.systems.layer_merge import compare_variants, LayerMergeConfig, run, THIS_RUN, VARIANTS
from merge_lab.tinylm import save_tiny, tiny_model, train_tokenizer
from merge_lab.toy_corpus import choice_key, subjects, text_corpus, text_hash

SHAPE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    initializer_range=0.05,
)
STAGES = [(3, 500, 5e-3), (6, 300, 4e-3), (12, 160, 3e-3)]  # layers, steps, rate
TRAINED_ON = dict(  # hashes of the text that the bundled model has read, and of what was held out
    train="4e386a93dd431371",
    validation="fbcffa28c88da97d",
    test="77e3b3b69336e5b4",
    questions="8dad378870657225",
)
CHOICES = [(100, 0.1), (300, 0.03)]  # steps and rate, chosen between on validation text
PARTS = ["choices", "seeds", "defaults", "questions", "depths", "accuracy", "times", "ways"]
TRAINING = dict(num_steps=100, learning_rate=0.1)
DEFAULT = "learned per weight, best start (CE)"  # what `merge-lab layer-merge --strategy pairs` does
WAYS = {"block": {}, "pairs": dict(max_steps=TRAINING["num_steps"], learning_rate=TRAINING["learning_rate"])}  # strategies of the command line, and their options
OVER_DEPTH = [
    "remove the same layers",
    "remove the last layers",
    "published ratio",
    "uniform 0.5",
    "learned (CE)",
    "learned (KL)",
    DEFAULT,
]
ASKED = ["remove the same layers", "published ratio", DEFAULT]  # for accuracy: slow
ALL_ASKED = 3  # layers removed, where all of OVER_DEPTH are asked


def held_questions() -> set:
    "Keys of the questions that accuracy is measured on."
    tests = load_mmlu(bundled_path("mmlu"), "test")
    return {
        choice_key([row["question"], *row["choices"]])
        for rows in tests.values()
        for row in rows
    }


def question_sets(n: int, seed: int) -> Iterator[str]:
    "Prompts of six solved questions on one subject, none of them held out."
    source, held = random.Random(seed), held_questions()
    for _ in range(n):
        subject = source.choice(list(subjects))
        title = subject.replace("_", " ")
        parts = [
            f"The following are multiple choice questions (with answers) about {title}."
        ]
        while len(parts) < 7:
            row = subjects[subject](source)
            if choice_key(row) not in held:
                answer = letters.index(row[5])
                asked = dict(question=row[0], choices=row[1:5], answer=answer)
                parts.append(format_choice(asked, "letter"))
        yield "\n\n".join(parts)


def training_text() -> tuple[list[str], list[str]]:  # prose, sets of questions
    "All that the model reads. Raises `ValueError` if a held-out text or question is in it."
    text, sets = split_text(text_corpus("prose", None)), list(question_sets(1460, 1))
    held = text["test"] + text["validation"]
    if len(apart_from(text["train"], held)) < len(text["train"]):
        raise ValueError("a held-out paragraph is in the training text.")
    read = "\n\n".join(sets)
    for rows in load_mmlu(bundled_path("mmlu"), "test").values():
        for row in rows:
            if format_choice(row) in read:
                raise ValueError(f"a test question is in the training text: {row}")
    return text["train"], sets


def grown(shallow):
    "The model with every layer twice in a row."
    tall = shaped(shallow.config.vocab_size, 2 * shallow.config.num_hidden_layers)
    weights = shallow.state_dict()

    def source(name: str) -> str:
        return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.", name)

    tall.load_state_dict({name: weights[source(name)] for name in tall.state_dict()})
    return tall


def shaped(vocab_size: int, n_layers: int):
    return tiny_model("llama", vocab_size, num_hidden_layers=n_layers, **SHAPE)


def train(model, prose, questions, n_steps: int, rate: float, draw: torch.Generator):
    "Next tokens of windows of 256: six of prose, two of questions a step."
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=0.1, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=n_steps, pct_start=0.1
    )
    for step in range(n_steps):
        streams = [questions if i % 4 == 3 else prose for i in range(8)]
        starts = [
            int(torch.randint(len(stream) - 256, (1,), generator=draw))
            for stream in streams
        ]
        rows = torch.stack(
            [s[start : start + 256] for s, start in zip(streams, starts)]
        )
        loss = model.train()(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            depth = model.config.num_hidden_layers
            print(f"{depth} layers, step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def make_model(folder: str | Path):
    "Train the bundled deep model: three layers, doubled twice."
    paragraphs, sets = training_text()
    tokenizer = train_tokenizer(paragraphs + sets[:30], 768)
    prose, questions = (
        torch.tensor([t for text in part for t in encode(tokenizer, text)])
        for part in (paragraphs, sets)
    )
    draw, model = torch.Generator().manual_seed(0), None
    for n_layers, n_steps, rate in STAGES:
        model = grown(model) if model else shaped(len(tokenizer), n_layers)
        model = train(model, prose, questions, n_steps, rate, draw)
    save_tiny(model.to(torch.bfloat16), folder, tokenizer)


def encode(tokenizer, text: str) -> list[int]:
    return [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def loader_of(tokenizer, seed: int, n_samples: int = 100):
    "The function that makes the calibration batches of a seed."
    path = Path(tempfile.gettempdir()) / f"layer_merge_{os.getpid()}.txt"
    text = split_text(text_corpus("prose", None))["train"]
    path.write_text("\n\n".join(text), encoding="utf-8")
    return functools.partial(
        prepare_calibration_data, tokenizer, path, n_samples, 4, 128, seed=seed
    )


def chosen(model, loader, n_pairs: int, seed: int) -> tuple:  # similarity, pairs
    similarity = layer_similarity(model, loader(), "npib", seed=seed)
    return similarity, find_merge_pairs(similarity, n_pairs)


def plain(table) -> list[dict]:
    "Rows of a table for JSON; the time of a pass has a part of its own."
    return table.drop(columns="seconds_per_token").reset_index().to_dict("records")


def measure_choice(model, tokenizer, text: dict, seed: int) -> list[dict]:
    "Validation perplexity of what learns on blended weights; with more steps, of the best only."
    loader, rows = loader_of(tokenizer, seed), []
    similarity, pairs = chosen(model, loader, 3, seed)
    learning = {k: v for k, v in VARIANTS.items() if v.learn and v.blend == "weights"}
    best = [name for name, kind in learning.items() if kind.search and kind.per_module]
    for (steps, rate), names in zip(CHOICES, (list(learning), best)):
        table = compare_variants(
            model,
            tokenizer,
            pairs,
            loader,
            names,
            similarity,
            dict(texts=text["validation"]),
            num_steps=steps,
            learning_rate=rate,
            progress=False,
        )
        setting = dict(seed=seed, num_steps=steps, learning_rate=rate)
        rows += [{**row, **setting} for row in plain(table) if row["alphas"]]
    return rows


def measure_seed(model, tokenizer, text: dict, seed: int) -> list[dict]:
    "Test perplexity of every variant with a quarter of the layers removed."
    loader = loader_of(tokenizer, seed)
    similarity, pairs = chosen(model, loader, 3, seed)
    table = compare_variants(
        model,
        tokenizer,
        pairs,
        loader,
        similarity=similarity,
        evaluation=dict(texts=text["test"]),
        progress=False,
        **TRAINING,
    )
    depth = range(len(similarity) - 1)
    beside = [float(similarity.loc[i, i + 1]) for i in depth]
    return [dict(row, seed=seed, pairs=pairs, beside=beside) for row in plain(table)]


def measure_defaults(model, tokenizer, text: dict, seed: int) -> list[dict]:
    "Test perplexity of what the command line does by default: more steps at a lower rate."
    loader, config = loader_of(tokenizer, seed), LayerMergeConfig()
    similarity, pairs = chosen(model, loader, config.n_pairs, seed)
    setting = dict(num_steps=config.num_steps, learning_rate=config.learning_rate)
    table = compare_variants(
        model,
        tokenizer,
        pairs,
        loader,
        [DEFAULT],
        similarity,
        dict(texts=text["test"]),
        progress=False,
        **setting,
    )
    return [dict(row, seed=seed, **setting) for row in plain(table) if row["alphas"]]


def measure_questions(model, tokenizer, text: dict, seed: int) -> list[dict]:
    "Test perplexity on prose where pairs and shares come from the bundled questions, as without `data_dir`."
    config = LayerMergeConfig()
    sizes = (config.num_samples, config.batch_size, config.max_length)
    loader = functools.partial(
        prepare_calibration_data, tokenizer, bundled_path("mmlu"), *sizes, seed=seed
    )
    similarity, pairs = chosen(model, loader, config.n_pairs, seed)
    table = compare_variants(
        model,
        tokenizer,
        pairs,
        loader,
        ASKED,
        similarity,
        dict(texts=text["test"]),
        progress=False,
        **TRAINING,
    )
    return [dict(row, seed=seed, pairs=pairs) for row in plain(table)]


def over_depth(model, tokenizer, n_pairs: int, variants, evaluation: dict) -> list:
    "Scores with this many layers removed, seed 0."
    loader = loader_of(tokenizer, 0)
    similarity, pairs = chosen(model, loader, n_pairs, 0)
    table = compare_variants(
        model,
        tokenizer,
        pairs,
        loader,
        variants,
        similarity,
        evaluation,
        progress=False,
        **TRAINING,
    )
    return [dict(row, n_pairs=n_pairs) for row in plain(table)]


def measure_depth(model, tokenizer, text: dict, n_pairs: int) -> list[dict]:
    "Test perplexity by the number of layers removed."
    return over_depth(model, tokenizer, n_pairs, OVER_DEPTH, dict(texts=text["test"]))


def measure_accuracy(model, tokenizer, text: dict, n_pairs: int) -> list[dict]:
    "Share of held-out questions that are answered rightly, by the number of layers removed."
    asked = dict(mmlu_dir=bundled_path("mmlu"))
    variants = OVER_DEPTH if n_pairs == ALL_ASKED else ASKED
    return over_depth(model, tokenizer, n_pairs, variants, asked)


def measure_times(model, depths: list[int], rounds: int = 15) -> list[dict]:
    "Time of a token in a forward pass and size, by depth: how a layer came to be does not change what it costs."
    models = [
        remove_layers(copy.deepcopy(model), range(n_pairs)) for n_pairs in [0, *depths]
    ]
    times = [[seconds_per_token(short) for short in models] for _ in range(rounds)]
    return [
        dict(
            layers=short.config.num_hidden_layers,
            parameters=sum(p.numel() for p in short.parameters()),
            seconds_per_token=statistics.median(column),
            fastest=min(column),
            slowest=max(column),
        )
        for short, column in zip(models, zip(*times))
    ]


def measure_ways(model, tokenizer, text: dict, seed: int) -> list[dict]:
    "Test perplexity and ends found of whole runs with a quarter of the layers removed: a learned block as it is by default, and pairs."
    rows = []
    with tempfile.TemporaryDirectory() as place:
        files = {name: Path(place) / f"{name}.txt" for name in ("train", "test")}
        for name, file in files.items():
            file.write_text("\n\n".join(text[name]), encoding="utf-8")
        for way, more in WAYS.items():
            shared = dict(data_dir=str(files["train"]), eval_text=str(files["test"]), n_pairs=3, max_length=128, dtype="float32", save_steps=0)
            start = time.process_time()
            made = run(LayerMergeConfig(strategy=way, seed=seed, output_dir=f"{place}/{way}", **shared, **more), progress=False)
            table, seconds = made.table[["layers", "perplexity", "cloze"]], time.process_time() - start
            if not rows:
                rows.append(dict(way="original", seed=seed, seconds=0.0, **table.loc["original"]))
            rows.append(dict(way=way, seed=seed, seconds=seconds, **table.loc[THIS_RUN]))
    return rows


def described(text: dict) -> dict:
    "What the figures are, and what they were measured on."
    return dict(
        what="Perplexity of a 12-layer Llama (0.57 M parameters) with layers merged, removed or kept",
        command="python benchmarks/layer_merge.py",
        settings=dict(calibration="100 paragraphs, up to 128 tokens", batch_size=4)
        | TRAINING,
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        ),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, CPU, "
        f"{torch.get_num_threads()} thread",
        text=hashes(text),
        paragraphs={name: len(part) for name, part in text.items()},
    )


def hashes(text: dict) -> dict[str, str]:
    return {name: text_hash(part) for name, part in text.items()}


def held_out_text(folder: Path) -> dict[str, list[str]]:
    "The split of this Python's documentation. Raises `ValueError` if the bundled model has read another."
    text = split_text(text_corpus("prose", None))
    known = {name: TRAINED_ON[name] for name in text}
    if folder == bundled_path("models/deep") and hashes(text) != known:
        raise ValueError(
            f"Python {platform.python_version()} has another documentation than the one the bundled model was trained on, "
            "so it may have read what it would be measured on. Train one on this text (--make-model FOLDER) and give it as --model."
        )
    return text


def keep(out: Path, text: dict, name: str, rows: list[dict], minutes: float):
    "Write rows of a part, and how long they took."
    held = json.loads(out.read_text()) if out.exists() else {}
    took = held.get("minutes", {}) | {name: round(minutes, 1)}
    write_json(out, {**held, **described(text), "minutes": took, name: rows})


def measure(
    folder: Path, parts: list[str], seeds: list[int], depths: list[int], out: Path
):
    "Measure, and write after every seed; rows of what is not asked for stay."
    text = held_out_text(folder)
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype="float32")
    jobs = [("choices", measure_choice, "seed", seed) for seed in seeds]
    jobs += [("seeds", measure_seed, "seed", seed) for seed in seeds]
    jobs += [("defaults", measure_defaults, "seed", seed) for seed in seeds]
    jobs += [("questions", measure_questions, "seed", seed) for seed in seeds]
    jobs += [("ways", measure_ways, "seed", seed) for seed in seeds]
    jobs += [("depths", measure_depth, "n_pairs", depth) for depth in depths]
    jobs += [("accuracy", measure_accuracy, "n_pairs", depth) for depth in depths[::2]]
    for name, job, key, value in (job for job in jobs if job[0] in parts):
        start = time.perf_counter()
        rows = job(model, tokenizer, text, value)
        minutes = (time.perf_counter() - start) / 60
        held = json.loads(out.read_text()) if out.exists() else {}
        kept = [row for row in held.get(name, []) if row[key] != value]
        merged = sorted(kept + rows, key=lambda row: row[key])
        keep(out, text, name, merged, minutes)
        print(f"{name}, {key} {value}: {minutes:.1f} minutes", flush=True)
    if "times" in parts:
        keep(out, text, "times", measure_times(model, depths), 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--make-model", metavar="FOLDER", help="train the model, save it here, stop")
    add("--model", type=Path, default=bundled_path("models/deep"), help="to measure")
    add("--parts", nargs="+", default=PARTS, choices=PARTS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add(
        "--depths",
        nargs="+",
        type=int,
        default=[1, 2, 3, 4, 5, 6],
        help="layers to remove",
    )
    add("--out", type=Path, default=bundled_path("benchmarks") / "layer_merge.json")
    add("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.make_model:
        make_model(options.make_model)
    else:
        folder, out = options.model, options.out
        measure(folder, options.parts, options.seeds, options.depths, out)


if __name__ == "__main__":
    main()
