"""Kill each system and each export at random, look at what is left, and go on: `python benchmarks/kills.py --times 50`.

A process is forked for each trial, so that a kill hits the work and not the imports. After the kill no file may be damaged and no
checkpoint may be a mix of two; then the run is taken up again, and must end with the bytes of an undisturbed one, or be refused in a sentence.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads and forks do not go together
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch

from merge_lab.cli import main
from merge_lab.origins import check_sums
from merge_lab.run_folder import damage_of, is_run, sha256_of
from merge_lab.weight_files import read_header, UnreadableComponent
from small_runs import ADAPTERS, DAM, LAYERS, LORA, make_ground, MERGE, QUANTIZE, ROUTER, TOPK, TRAIN

EXPORT = "export run --output_dir out --overwrite --tokens 8 --format"
SUBJECTS = {  # words of a command that writes into out, and the file that is compared
    "mask-merge": (MERGE + TRAIN.replace("max_steps 2", "max_steps 6") + " --save_steps 1", "merged/model.safetensors"),
    "dam-topk": (TOPK + " --part_size 2", "data-00000-of-00001.arrow"),
    "dam-train": (DAM.replace("max_steps 1", "max_steps 6") + " --held_out_rows 1 --save_steps 1 --eval_samples 0", "merged/model.safetensors"),
    "layer-merge": (LAYERS.replace("max_steps 1", "max_steps 6") + " --n_pairs 1 --data_dir chat_a --num_samples 4 --held_out_rows 2 --save_steps 1", "merged/model.safetensors"),
    "lora": (LORA.replace("max_steps 1", "max_steps 6") + " --eval_dataset none --save_steps 1", "final_merged/model.safetensors"),
    "lora-merge": (ADAPTERS.replace("max_steps 1", "max_steps 6") + " --held_out_rows 1 --eval_samples 0 --save_steps 1", "merged/model.safetensors"),
    "quantize": (QUANTIZE, "layer-00001.safetensors"),
    "router": (ROUTER + " --save_steps 1", "best_router_checkpoint.safetensors"),
    "export hf": (f"{EXPORT} hf", "model.safetensors"),
    "export mergekit": (f"{EXPORT} mergekit", "mergekit_config.yml"),
    "export masks": (f"{EXPORT} masks", "masks.safetensors"),
    "align": ("align a b --output_dir out", "a/model.safetensors"),
}


def forked(words: str, log: Path) -> int:  # process
    "Run a command in a copy of this process; what it says goes to a file."
    child = os.fork()
    if child:
        return child
    status = 99
    with contextlib.suppress(BaseException):
        os.setsid()
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = main(words.split())
    os._exit(status)


def ended(child: int) -> int | None:  # status; below 0: the signal; None: at work
    "How a process is."
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def done(words: str, log: Path) -> tuple[int, float]:  # status, seconds
    "Run a command to its end."
    started, child = time.monotonic(), forked(words, log)
    while (status := ended(child)) is None:
        time.sleep(0.01)
    return status, time.monotonic() - started


def killed(words: str, log: Path, after: float) -> bool:  # whether it was at work
    "Run a command and kill it."
    child = forked(words, log)
    time.sleep(after)
    if ended(child) is not None:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


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
    for place in folder.rglob("manifest.json"):
        if damage := damage_of(place.parent):
            told.append(f"corrupt: {damage}")
    return told


def taken_up(words: str, wanted: str, left: Path, log: Path) -> str:  # identical, refused, or what is wrong
    "Go on with what a kill left."
    resumes = is_run(Path("out")) and not words.startswith(("export", "align"))
    status, _ = done(words + " --resume" * resumes, log)
    if status == 2 and resumes:  # nothing to go on from is a clear answer, if it can be begun anew
        told = log.read_text().strip().splitlines()[-1]
        status, _ = done(words + " --overwrite", log)
        return "refused" if status == 0 and sha256_of(left) == wanted and told.startswith("merge-lab") else f"refused, and not begun anew: {told}"
    if status != 0:
        return f"status {status}: {log.read_text().strip()[-400:]}"
    return "identical" if sha256_of(left) == wanted else "other bytes"


def trial(name: str, ground: Path, chance: random.Random, seconds: float, wanted: str, log: Path) -> tuple[str, list[str]]:
    "One kill, in a fresh copy of the ground: what came of it, and what was damaged. Empty: it had ended."
    words, left = SUBJECTS[name]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(shutil.copytree(ground, Path(place) / "ground"))
        if not killed(words, log, chance.uniform(0, seconds)):
            return "", []
        damage = damage_in(Path("out")) if Path("out").exists() else []
        found = taken_up(words, wanted, Path("out", left), log)
        os.chdir(ground)
        return found, damage


def measure(name: str, ground: Path, times: int, seed: int) -> dict:
    "Counts of one subject."
    chance, log = random.Random(f"{name} {seed}"), Path(tempfile.gettempdir()) / f"kills-{os.getpid()}.log"
    words, left = SUBJECTS[name]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(shutil.copytree(ground, Path(place) / "ground"))
        status, seconds = done(words, log)
        if status != 0:
            raise SystemExit(f"{name}: does not run: {log.read_text()[-2000:]}")
        wanted = sha256_of(Path("out", left))
        os.chdir(ground)
    row, tries = {"hits": 0, "identical": 0, "refused": 0, "corrupt": 0, "mixed": 0, "wrong": []}, 0
    while row["hits"] < times and tries < 4 * times:
        tries += 1
        found, damage = trial(name, ground, chance, seconds, wanted, log)
        row["hits"] += bool(found)
        if found in ("identical", "refused"):
            row[found] += 1
        elif found:
            row["wrong"].append(found)
        row["corrupt"] += sum(told.startswith("corrupt") for told in damage)
        row["mixed"] += sum(told.startswith("mixed") for told in damage)
        row["wrong"] += damage
    return row


def report(found: dict) -> str:
    "The counts as a table."
    names = ("hits", "identical", "refused", "corrupt", "mixed")
    lines = [f"{'':18}" + "".join(f"{name:>11}" for name in names)]
    lines += [f"{subject:18}" + "".join(f"{row[name]:>11}" for name in names) for subject, row in found.items()]
    lines.append(f"{'all':18}" + "".join(f"{sum(row[name] for row in found.values()):>11}" for name in names))
    return "\n".join([*lines, *(f"{subject}: {told}" for subject, row in found.items() for told in row["wrong"])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="hits of each subject")
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file for the counts, e.g. data/benchmarks/kills.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    out, found = asked.out and Path(asked.out).absolute(), {}
    with tempfile.TemporaryDirectory() as ground:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            child = os.fork()  # what makes the ground leaves nothing in this process
            if not child:
                os._exit(make_ground(ground) is None)
            assert os.waitpid(child, 0)[1] == 0, "the ground could not be made"
        for subject in asked.subjects:
            found[subject] = measure(subject, Path(ground), asked.times, asked.seed)
            print(subject, {name: value for name, value in found[subject].items() if name != "wrong"}, flush=True)
        os.chdir(tempfile.gettempdir())
    print(report(found))
    if out:
        out.write_text(json.dumps({"times": asked.times, "seed": asked.seed, "counts": found}, indent=1) + "\n")
    raise SystemExit(any(row["wrong"] for row in found.values()))
