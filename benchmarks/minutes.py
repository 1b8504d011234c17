"""How soon a learned merge is good: test losses of a real pair against the processor time of its training, beside an older build of ours.

    merge-lab real --output_dir runs/real                                   # makes base, tasks and experts
    python benchmarks/minutes.py --root runs/real                           # ours by its defaults, the older build by its best settings
    python benchmarks/minutes.py --root runs/real --old_rates 0.05 0.1 0.2  # a rate that is better for the older build is looked for
    python benchmarks/minutes.py --root runs/real --solved 30               # ours from a start in closed form, too

Each contestant is a process of its own. Now and then its training stands still and the merge is scored on the same test rows; the clock, which
is the process's own time of one thread, stands as well. The older build scores other tokens of a row, so its merges are written and scored by this one. The older build's defaults ruin a real pair, so it gets the constraint and the
mode that were best for it. Told is the time to 0.95 of the recovered share (0: base, 1: expert; the worse task) that ours ends with, and to 0.95 of
what each ends with itself. What is in the output already is not measured again.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
LOOKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 80, 100, 125, 150)
OLD = {"constrain_mode": "sum1", "mode": "vector_output"}


def work(asked: dict):
    "Train as asked; a line of JSON to stdout for every look."
    import torch
    import transformers

    torch.set_num_threads(1)
    from merge_lab.chat import load_task
    from merge_lab.evaluation import evaluate_tasks
    from merge_lab.systems import mask_merge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the error stream
    tests = {Path(task).name: load_task(task, "test")[: asked["test_rows"]] for task in asked["tasks"]}

    def losses(model) -> dict:
        return evaluate_tasks(model, AutoTokenizer.from_pretrained(asked["experts"][0]), tests, metrics=("loss",), progress=False).loss.to_dict()

    if asked["who"] == "scores":
        for path in asked["models"]:
            with torch.no_grad():
                print(json.dumps(losses(AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval())), file=out)
        return

    class Looks(transformers.TrainerCallback):
        began, stood, before = None, 0.0, 0.0  # before: time that a start in closed form took

        def solve(self, *args, **options):
            began = time.process_time()
            solve_start(*args, **options)
            self.before = time.process_time() - began

        def look(self, step: int, model):
            stopped = time.process_time()
            was_training = model.training
            model.eval()
            found = {"step": step, "seconds": stopped - self.began - self.stood + self.before}
            with torch.no_grad():
                if asked["who"].startswith("ours"):
                    found["losses"] = losses(model)
                else:
                    model.save_merged(f"{asked['store']}/{step}")
            model.train(was_training)
            print(json.dumps(found), file=out)
            self.stood += time.process_time() - stopped

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.began = time.process_time()
            self.look(0, model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in LOOKS or state.global_step == state.max_steps:
                self.look(state.global_step, model)

    data, looks = dict.fromkeys(asked["tasks"]), Looks()
    if (solve_start := getattr(mask_merge, "solve_start", None)) is not None:
        mask_merge.solve_start = looks.solve
    with tempfile.TemporaryDirectory() as place:
        config = mask_merge.MaskMergeConfig(
            model_paths=asked["experts"], dataset_configs=data, base_model=asked["base"], eval_samples=1, save_merged=False, report=False, output_dir=f"{place}/run", **asked["options"]
        )
        mask_merge.run(config, callbacks=(looks,), progress=False)


def told(who: str, code: Path, asked: dict, log: Path) -> list[dict]:
    "The looks of a contestant."
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as errors:
        command = [sys.executable, __file__, "--worker", json.dumps({**asked, "who": who})]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    found = []
    for line in process.stdout:
        found.append(json.loads(line))
        print(who, line.strip(), flush=True)
    if process.wait():
        raise SystemExit(f"{who} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return found


def worst(losses: dict, references: list[dict]) -> float:
    "Recovered share of the worse task; the n-th task's expert is the n-th."
    base, *experts = references
    return min((base[task] - losses[task]) / (base[task] - expert[task]) for task, expert in zip(base, experts))


def time_to(looks: list[dict], references: list[dict], share: float) -> float | None:  # processor seconds; None: never
    "When a share is reached, straight lines between looks."
    before = None
    for look in looks:
        here = worst(look["losses"], references), look["seconds"]
        if here[0] >= share:
            if before is None or here[0] == before[0]:
                return here[1]
            return before[1] + (share - before[0]) / (here[0] - before[0]) * (here[1] - before[1])
        before = here
    return None


def summary(written: dict) -> str:
    "A line for each contestant."
    references, ours = written["references"], written["contestants"]["ours"]
    goal = 0.95 * worst(ours[-1]["losses"], references)
    lines = [f"{'':28}{'ends with':>10}{'s to 0.95 of it':>17}{f's to {goal:.3f}':>14}"]
    for who, looks in written["contestants"].items():
        end = worst(looks[-1]["losses"], references)
        times = [time_to(looks, references, share) for share in (0.95 * end, goal)]
        lines.append(f"{who:28}{end:10.3f}" + "".join(f"{'never' if t is None else round(t):>{width}}" for t, width in zip(times, (17, 14))))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of merge-lab real")
    parser.add_argument("--tasks", nargs="+", default=["french", "docstrings"], help="tasks whose experts are merged (default: french docstrings)")
    parser.add_argument("--old", default="4cd01d5", help="commit of the older build (default: 4cd01d5)")
    parser.add_argument("--old_rates", nargs="+", type=float, default=[0.1], help="learning rates of the older build (default: 0.1)")
    parser.add_argument("--old_steps", type=int, default=60, help="its steps (default: 60)")
    parser.add_argument("--steps", type=int, help="our steps (default: mask merge's)")
    parser.add_argument("--solved", type=int, metavar="STEPS", help="also ours from a start in closed form, with so many steps behind it; what the start takes is counted")
    parser.add_argument("--test_rows", type=int, default=60, help="test rows of each task that are scored at each look (default: 60)")
    parser.add_argument("--output", default=str(HERE / "data/benchmarks/minutes.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    if not args.root:
        parser.error("--root: expected the folder of merge-lab real")
    root, output = Path(args.root).resolve(), Path(args.output)
    asked = {
        "base": str(root / "base"), "experts": [str(root / "experts" / task / "final_merged") for task in args.tasks],
        "tasks": [str(root / "tasks" / task) for task in args.tasks], "test_rows": args.test_rows,
    }  # fmt: skip
    about = {"pair": f"{root.name}: {' and '.join(args.tasks)}", "test_rows": args.test_rows, "steps": args.steps}
    written = json.loads(output.read_text()) if output.exists() else {"about": about, "contestants": {}}
    if written["about"] != about:
        parser.error(f"{output} holds what was measured of {written['about']}, and this is {about}. Name another --output.")
    for place in (*asked["experts"], *asked["tasks"], asked["base"], output.absolute().parent):
        if not Path(place).is_dir():
            parser.error(f"{place}: no such folder. `merge-lab real` makes base, experts and tasks.")
    written |= {"versions": {name: version(name) for name in ("torch", "transformers")}, "machine": platform.processor() or platform.machine()}
    wanted = {"ours": {} if args.steps is None else {"max_steps": args.steps}}
    if args.solved is not None:
        wanted[f"ours, least squares, {args.solved} steps"] = {"mask_init": {"strategy": "least_squares", "ridge": 0.01}, "max_steps": args.solved}
    wanted |= {f"{args.old}, rate {rate:g}, {args.old_steps} steps": {**OLD, "learning_rate": rate, "max_steps": args.old_steps} for rate in args.old_rates}
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        old.mkdir()
        archive = subprocess.run(["git", "archive", args.old], check=False, cwd=HERE, stdout=subprocess.PIPE)
        if archive.returncode:
            parser.error(f"--old {args.old}: git has no such commit here.")
        subprocess.run(["tar", "x", "-C", str(old)], input=archive.stdout, check=True)
        score = lambda models: told("scores", HERE, asked | {"models": models}, Path(folder) / "log")
        if "references" not in written:
            written["references"] = score([asked["base"], *asked["experts"]])
            output.write_text(json.dumps(written, indent=1) + "\n")
        for who, options in wanted.items():
            if who in written["contestants"]:
                continue
            store = Path(folder) / "merges"
            looks = told(who, HERE if who.startswith("ours") else old, asked | {"options": options, "store": str(store)}, Path(folder) / "log")
            if store.exists():
                for look, losses in zip(looks, score([str(store / str(look["step"])) for look in looks]), strict=True):
                    look["losses"] = losses
                shutil.rmtree(store)
            written["contestants"][who] = looks
            output.write_text(json.dumps(written, indent=1) + "\n")
    print(summary(written))


if __name__ == "__main__":
    main()
