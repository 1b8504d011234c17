"""The main job end to end, as a person runs it: the command line, a kill, a resume, bad input, an installed wheel's data."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merge_lab.chat import load_task
from merge_lab.cli import help_of, main, parser_of
from merge_lab.commands import COMMANDS
from merge_lab.config import config_from_yaml, config_to_yaml
from merge_lab.evaluation import evaluate_tasks, UNIFORM
from merge_lab.run_folder import begin_run, bundled_path, read_history, RunInterrupted
from merge_lab.systems.mask_merge import demo_config, headline, LEARNED, MaskMergeConfig, run, show_result
from merge_lab.tinylm import save_tiny, tiny_model

import small_runs
from small_runs import SignalAt


def small(folder, **options):
    "The short run, with checkpoints and without the demo's base."
    return small_runs.small(folder, **dict(save_steps=2, base_model=None) | options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "The demo in batches of half the size, and three fifths of its steps."
    folder = tmp_path_factory.mktemp("demo")
    options = dict(eval_samples=40, per_device_train_batch_size=16, max_steps=60)
    return run(demo_config(output_dir=str(folder / "run"), **options), progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A short run; what goes on with it does so with a copy."
    config = small(tmp_path_factory.mktemp("finished"), max_steps=2)
    return config, run(config, progress=False)


def copy_of(config, tmp_path, **options):
    "The same run, in a folder of this test."
    folder = shutil.copytree(config.output_dir, tmp_path / "run")
    return dataclasses.replace(config, output_dir=str(folder), **options)


@pytest.fixture(scope="module")
def without_checkpoint(tmp_path_factory):
    "A short run of some parameters that leaves no checkpoint; nothing goes on with it."
    folder = tmp_path_factory.mktemp("without")
    options = dict(save_steps=0, save_merged=False, target_modules=["mlp"])
    config = small(folder, max_steps=2, **options)
    return config, run(config, progress=False)


def test_learned_masks_do_both_jobs(demo):
    table = demo.scores.set_index(["model", "task"]).exact_match
    for own, other in (("rewrite", "summarize"), ("summarize", "rewrite")):
        assert table[f"expert: {own}", own] >= 0.95
        assert table[f"expert: {own}", other] <= 0.2
        assert table[LEARNED, own] >= 0.95 * table[f"expert: {own}", own]
    assert table[UNIFORM].min() <= 0.3


def test_the_checkpoint_scores_as_the_merger_did(demo):
    merged = AutoModelForCausalLM.from_pretrained(
        demo.folder / "merged", dtype=torch.float32
    )
    tasks = {"rewrite": load_task(bundled_path("tasks/rewrite"), "test")[:40]}
    again = evaluate_tasks(merged, demo.tokenizer, tasks, progress=False)
    learned = demo.scores.set_index(["model", "task"]).loc[(LEARNED, "rewrite")]
    assert again.exact_match["rewrite"] == learned.exact_match
    assert again.loss["rewrite"] == pytest.approx(learned.loss, rel=1e-4)


def test_everything_is_written(demo):
    for name in (
        "config.yaml",
        "history.jsonl",
        "scores.csv",
        "held_out.json",
        "report.html",
        "masks/masks.safetensors",
    ):
        assert (demo.folder / name).stat().st_size > 0
    assert len(list((demo.folder / "plots").glob("*.png"))) == 7
    html = (demo.folder / "report.html").read_text(encoding="utf-8")
    assert (
        "data:image/png;base64," in html
        and "<script src" not in html
        and 'src="http' not in html
    )
    assert pd.read_csv(demo.folder / "scores.csv").model.nunique() == 5
    assert len(read_history(demo.folder / "history.jsonl")) == demo.history.step.max()


def test_interrupt_then_resume_equals_an_uninterrupted_run(tmp_path):
    "With decay, which pulls to the start of the first run after the resume as before it."
    options = dict(mask_decay=5.0, save_merged=False, eval_samples=0)
    whole = run(small(tmp_path / "whole", **options), progress=False)
    config = small(tmp_path / "cut", save_steps=0, **options)

    with pytest.raises(RunInterrupted, match="stopped after step 4 of 6.*--resume"):
        run(config, callbacks=(SignalAt(3),), progress=False)
    config.resume = True
    resumed = run(config, progress=False)
    for name, mask in whole.merger.mask_state().items():
        assert torch.equal(mask, resumed.merger.mask_state()[name]), name
    assert resumed.history.step.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_killed_process_goes_on_from_its_last_checkpoint(tmp_path, forked):
    config = small(tmp_path, max_steps=400, save_steps=2, save_merged=False, eval_samples=0)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("merge-lab")),
        "mask-merge",
        str(file),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    history = tmp_path / "run" / "history.jsonl"
    deadline = time.time() + 180
    while time.time() < deadline and not (
        history.exists() and history.read_text().count("\n") >= 5
    ):
        time.sleep(0.2)
    process.kill()
    process.wait()
    steps = read_history(history).step.max()
    assert steps >= 5
    assert main([*command[1:], "--resume", "--max_steps", str(steps + 4)]) == 0
    assert read_history(history).step.tolist() == list(range(1, steps + 5))


def bad(tmp_path, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        run(small(tmp_path, **options), progress=False)
    assert not (
        tmp_path / "run"
    ).exists()  # nothing was begun, so a corrected command can be given at once
    return str(caught.value)


def test_bad_input_is_refused_before_any_work(tmp_path):
    good = str(bundled_path("models/rewrite"))
    (tmp_path / "empty").mkdir()
    other = str(save_tiny(tiny_model("gpt2"), tmp_path / "gpt2"))
    wide = str(save_tiny(tiny_model("llama", hidden_size=64), tmp_path / "wide"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{oops\n'
    )
    silent = tmp_path / "silent.jsonl"
    silent.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
    )
    assert "nowhere" in bad(tmp_path, model_paths=[good, str(tmp_path / "nowhere")])
    assert "empty" in bad(tmp_path, model_paths=[good, str(tmp_path / "empty")])
    assert "gpt2" in bad(tmp_path, model_paths=[good, other])
    assert "hidden_size" in bad(tmp_path, model_paths=[good, wide])
    assert "broken.jsonl:2" in bad(
        tmp_path,
        dataset_configs={str(broken): None, str(bundled_path("tasks/rewrite")): 4},
    )
    assert "silent.jsonl:1" in bad(
        tmp_path,
        dataset_configs={str(silent): None, str(bundled_path("tasks/rewrite")): 4},
    )
    assert "vocab" in bad(
        tmp_path,
        model_paths=[
            good,
            str(save_tiny(tiny_model("llama", vocab_size=64), tmp_path / "words")),
        ],
    )
    cut = tmp_path / "cut"
    shutil.copytree(good, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in bad(tmp_path, model_paths=[good, str(cut)])
    for option, value in dict(
        loss_func_name="l1", mode="vector", constrain_mode="softmax", impl="fast"
    ).items():
        with pytest.raises(ValueError, match=f"{option}='{value}'"):
            small(tmp_path, **{option: value})
    with pytest.raises(ValueError, match="expected 2 numbers"):
        small(tmp_path, mask_init={"strategy": "uniform", "factors": [1, 2, 3]})


@pytest.mark.parametrize(
    "options",
    [
        dict(optim="adamx"),
        dict(target_modules=["no_such_module"]),
        dict(
            constrain_mode="01",
            mask_init={"strategy": "uniform", "factors": [1.5, 0.5]},
        ),
        dict(max_steps=0),
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_bad_option_does_not_clear_the_run_that_it_would_replace(options, tmp_path):
    folder = begin_run(small(tmp_path))
    (folder / "precious").write_text("masks")
    with pytest.raises(ValueError):
        run(small(tmp_path, overwrite=True, **options), progress=False)
    assert (folder / "precious").read_text() == "masks"


def test_a_row_too_long_for_the_model_is_found_before_a_run_is_cleared(tmp_path):
    folder = begin_run(small(tmp_path))
    (folder / "precious").write_text("masks")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b " * n},
            ]
        }
        for n in (1, 9000)
    ]
    data = tmp_path / "data"
    data.mkdir()
    for split, some in (("train", rows[:1]), ("test", rows[1:])):
        (data / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in some)
        )
    datasets = {str(bundled_path("tasks/rewrite")): 8, str(data): None}
    with pytest.raises(ValueError, match="max_position_embeddings"):
        run(small(tmp_path, dataset_configs=datasets, overwrite=True), progress=False)
    assert (folder / "precious").exists()


def test_data_in_the_folder_that_would_be_cleared_is_refused(tmp_path):
    folder = begin_run(small(tmp_path))
    data = shutil.copytree(bundled_path("tasks/summarize"), folder / "data")
    datasets = {str(bundled_path("tasks/rewrite")): 8, str(data): 8}
    with pytest.raises(ValueError, match="which holds"):
        run(small(tmp_path, dataset_configs=datasets, overwrite=True), progress=False)
    assert any(data.iterdir())
    (folder / "mine.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="which holds .*mine.jinja"):
        run(small(tmp_path, chat_template=str(folder / "mine.jinja"), overwrite=True), progress=False)
    assert (folder / "mine.jinja").exists()


def test_outputs_of_earlier_masks_are_not_shown_as_new(finished, tmp_path, capsys):
    config, result = finished
    show_result(result)
    assert "Of earlier masks" not in capsys.readouterr().out
    going_on = copy_of(config, tmp_path, max_steps=4, resume=True, save_merged=False)
    show_result(run(going_on, progress=False))
    written, older = capsys.readouterr().out.strip().splitlines()[-2:]
    assert "merged" not in written and older.startswith("Of earlier masks")
    assert older.endswith("merged")
    with pytest.raises(
        FileExistsError, match="already holds a run"
    ):  # no switch of one start is kept
        run(config_from_yaml(MaskMergeConfig, tmp_path / "run/config.yaml"))


def test_a_run_without_scores_is_whole(tmp_path, capsys):
    "It needs no test rows, and its report has no tables of scores."
    data = {}
    for task in ("rewrite", "summarize"):
        (tmp_path / task).mkdir()
        shutil.copy(bundled_path(f"tasks/{task}") / "train.jsonl", tmp_path / task)
        data[str(tmp_path / task)] = 48
    config = small(tmp_path, dataset_configs=data, max_steps=2, eval_samples=0, report=True)
    result = run(config, progress=False)
    assert result.scores is None and result.written == ("masks", "merged", "report.html")
    assert all((result.folder / name).exists() for name in result.written) and not (result.folder / "scores.csv").exists()
    html = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "One model for rewrite and summarize" in html and "No test rows were scored" in html and "exact match" not in html
    assert {file.stem for file in (result.folder / "plots").iterdir()} >= {"loss", "held_out", "alphas"}
    show_result(result)
    told = capsys.readouterr().out
    assert "No test rows were scored: eval_samples is 0" in told and "Written: " in told
    show_result(run(small(tmp_path, dataset_configs=data, eval_samples=0, overwrite=True, dry_run=True), progress=False))
    assert "scores on nothing" in capsys.readouterr().out


def test_resume_without_a_checkpoint_keeps_the_history(without_checkpoint):
    config, result = without_checkpoint
    with pytest.raises(FileNotFoundError, match="no checkpoint to go on from"):
        run(dataclasses.replace(config, max_steps=4, resume=True), progress=False)
    assert len(read_history(result.folder / "history.jsonl")) == 2


def test_the_average_is_named_by_what_it_averages(without_checkpoint):
    _, result = without_checkpoint
    name = "uniform average of what is masked"
    assert name in set(result.scores.model) and name in result.answers
    assert f"rewrite: exact match with the {name}" in headline(result)


def test_resume_refuses_other_options_and_nothing(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run that could be resumed"):
        run(small(tmp_path, resume=True), progress=False)
    config = copy_of(finished[0], tmp_path, resume=True, mode="scalar")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match="mode='scalar', but the run"):
        run(config, progress=False)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_the_run_seeds_random_masks(tmp_path):
    from merge_lab.merger import Merger

    def masks(seed):
        config = small(tmp_path, seed=seed, mask_init={"strategy": "random"})
        return torch.cat(
            [m.flatten() for m in Merger.from_config(config).mask_state().values()]
        )

    assert torch.equal(masks(0), masks(0)) and not torch.equal(masks(0), masks(1))


def test_values_of_the_wrong_type_are_named(tmp_path):
    assert small(tmp_path, learning_rate="1e-2").learning_rate == 0.01
    for option, value in dict(
        report="nein",
        max_steps="two",
        target_modules="norm",
        mode=None,
        constrain_mode=1,
    ).items():
        with pytest.raises(ValueError, match=f"^{option}="):
            small(tmp_path, **{option: value})


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "MiB are needed and 1000 B are free" in bad(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_kept(tmp_path, capsys):
    folder = begin_run(small(tmp_path))
    before = (folder / "config.yaml").read_text()
    file = tmp_path / "c.yaml"
    file.write_text(config_to_yaml(small(tmp_path)), encoding="utf-8")
    assert main(["mask-merge", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == before


def test_checkpoints_hold_masks_only(finished):
    result = finished[1]
    checkpoint = result.folder / "checkpoint-2"
    weights = sum(p.numel() for p in result.merger.parameters() if not p.requires_grad)
    masks = load_file(checkpoint / "masks.safetensors")
    assert sum(mask.numel() for mask in masks.values()) < 0.1 * weights
    assert not list(checkpoint.glob("model*.safetensors")) and not list(
        checkpoint.glob("*.bin")
    )


def test_help_and_unknown_commands(capsys):
    assert main([]) == 0 and "mask-merge" in capsys.readouterr().out
    assert main(["no-such-command"]) == 2
    assert main(["mask-merge", "--help"]) == 0 and "--constrain_mode" in capsys.readouterr().out


def test_help_is_written_down_as_the_configs_tell_it():
    "A stale options.json would describe options that are gone: `make export` writes it anew."
    for name, command in COMMANDS.items():
        assert help_of(name) == parser_of(name, command, command.find(command.config)).format_help(), name


def test_help_waits_for_no_library():
    code = (
        "import sys\nfrom merge_lab.cli import main\nassert main(['mask-merge', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'pydantic'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    config, first = finished
    masks = (first.folder / "masks" / "masks.safetensors").read_bytes()
    config = copy_of(config, tmp_path, resume=True, save_merged=False)
    again = run(config, progress=False)
    assert (again.folder / "masks" / "masks.safetensors").read_bytes() == masks
    assert again.history.step.tolist() == [1, 2]


def test_a_dry_run_finds_what_the_run_would_refuse(tmp_path):
    for options in (dict(optim="adamw_torhc"), dict(report_to="wandbb")):
        with pytest.raises(ValueError, match=next(iter(options))):
            run(small(tmp_path, dry_run=True, **options), progress=False)


def test_the_base_is_found_given_or_left_out(tmp_path):
    from merge_lab.systems.mask_merge import prepare

    base, paths = str(bundled_path("models/base")), []
    for task in ("rewrite", "summarize"):
        shutil.copytree(bundled_path(f"models/{task}"), tmp_path / task)
        card = f"---\nbase_model: {base}\n---\n"
        (tmp_path / task / "README.md").write_text(card)
        paths.append(str(tmp_path / task))

    def base_of(**options):
        config = prepare(small(tmp_path, **options)).config
        assert config.model_paths == paths
        return config.base_model

    assert base_of(model_paths=paths) == base  # the cards name it
    assert base_of(model_paths=paths, base_model="mean") == "mean"
    assert base_of(model_paths=[*paths, base], base_model=base) == base  # without data
    free = dict(model_paths=paths, constrain_mode="identity")
    assert base_of(**free) is None  # nothing is measured from it
    with pytest.raises(ValueError, match="Leave it out of model_paths"):
        base_of(model_paths=[base, *paths], base_model=base)
    with pytest.raises(ValueError, match="where base_model names it"):
        base_of(model_paths=[*paths, base], base_model="mean")


def test_a_run_tells_start_best_and_last(demo):
    from merge_lab.held_out import told_held_out

    looks = demo.held_out["looks"]
    assert demo.held_out["start"] == looks[0]["loss"] >= demo.held_out["loss"]
    told = told_held_out(demo.held_out, len(demo.history))
    for value in (looks[0]["loss"], demo.held_out["loss"], looks[-1]["loss"]):
        assert f"{value:.4g}" in told
    assert told in (demo.folder / "report.html").read_text(encoding="utf-8")
    numbers = headline(demo)
    worst = float(numbers["recovered share of the worst task with learned masks"])
    assert worst > 0.98 > float(numbers["with the uniform average"])
