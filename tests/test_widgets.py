"""Panels, sessions, explorer and run browser without a browser: plain state, and widgets that mirror it."""

import dataclasses
import gc
import importlib
import json
import math
import shlex
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

from merge_lab import panel as panel_module, session as session_module, training
from merge_lab.chat import load_task
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import parse, PreflightConfig
from merge_lab.commands import COMMANDS
from merge_lab.config import config_from_dict, narrow, option
from merge_lab.turns import TurnLock
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import begin_run, bundled_path, last_checkpoint, read_adjusted
from merge_lab.runs import BrowserView, CommandRun, CommandRunView, Run, RunBrowser
from merge_lab.systems.mask_merge import demo_config, make_trainer, MaskMergeConfig, prepare, recipe_of
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model, tiny_tokenizer
from merge_lab.widgets import (
    alpha_svg, answers_html, Bench, ConfigPanel, controls_of, Dials, ExplorerView, field_in, LatestWorker, memory_html, MergeExplorer,
    read_value, SessionView, show_value, TrainingSession,
)

DATA = [str(bundled_path(f"tasks/{task}")) for task in ("rewrite", "summarize")]
widgets = pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimate = "merge_lab.systems.mask_merge._estimate"
    monkeypatch.setattr(estimate, lambda *_: None)  # has its own tests
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_config(**options):
    defaults = dict(
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=0,
        output_dir="runs/a",
        overwrite=True,
        device="cpu",
        eval_samples=4,
        dataset_configs={path: 32 for path in DATA},
    )
    return demo_config(**{**defaults, **options})


def field_of(view, name):
    "The row of one option in a panel's view."
    for box in view.children[1].children[0].children:
        for row in box.children:
            if f"ml-field-{name}" in row._dom_classes:
                return row
    raise AssertionError(name)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.005)


# --- panels ---------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["panel", "session", "explorer", "worker"])
def test_what_runs_without_a_browser_imports_no_pictures_and_no_widgets(module, forked):
    code = (
        "import sys\n"
        "heavy = {'matplotlib', 'ipywidgets', 'merge_lab.drawing'}\n"
        "assert not heavy & set(sys.modules)  # nor did what was imported beforehand\n"
        f"import merge_lab.{module}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_every_option_gets_a_control_that_holds_its_value():
    panel = ConfigPanel(small_config())
    view = panel.view()
    for name, control in controls_of(MaskMergeConfig).items():
        value = panel.values[name]
        assert read_value(control, show_value(control, value)) == value
        row = field_of(view, name)
        assert control.help and control.help in row.children[0].children[1].tooltip
    assert not panel.errors and panel.config == small_config()


def test_faces_describe_the_same_config():
    panel = ConfigPanel(small_config(mode="scalar", temperature=2.0))
    faces = panel.faces()
    read = config_from_dict(MaskMergeConfig, yaml.safe_load(faces["YAML"]))
    assert read == panel.config
    assert eval(faces["Python"], {"MaskMergeConfig": MaskMergeConfig}) == panel.config
    assert "--mode scalar --" in faces["Command line"]


def test_widget_and_state_follow_each_other():
    panel = ConfigPanel(small_config())
    view = panel.view()
    control = field_of(view, "mode").children[0].children[1]
    control.value = "scalar"
    assert panel.values["mode"] == "scalar" and "mode: scalar" in panel.faces()["YAML"]
    panel.set("mode", "vector_input")
    assert control.value == "vector_input"
    panel.set("mask_init", {"strategy": "odd_one_out", "selected_idx": 1})
    text = field_of(view, "mask_init").children[0].children[1].value
    assert "odd_one_out" in text


def test_a_sliders_own_rounding_changes_no_option():
    panel = ConfigPanel(small_config(temperature=0.3, max_length=2048))
    view = panel.view()
    rate = field_of(view, "temperature").children[0].children[1]
    rate.value = 0.316  # the nearest step, where a browser puts it
    field_of(view, "max_length").children[0].children[1].value = 1995.26
    assert panel.config.temperature == 0.3 and panel.config.max_length == 2048
    rate.value = 0.3 * 10**0.05  # one step on
    assert panel.config.temperature == 0.34
    rate.value = 0.123  # typed
    assert panel.config.temperature == 0.123
    panel.set("temperature", 0.7)  # is a step of the slider too, so the browser shows it
    steps = (math.log10(0.7) - rate.min) / rate.step
    assert rate.value == 0.7 and abs(steps - round(steps)) < 1e-6
    rate.value = 10**rate.min  # its end, which is a little below the lowest allowed
    assert not panel.errors


def test_a_choice_of_nothing_is_seen_as_chosen():
    panel = ConfigPanel(small_config())
    toggle = field_of(panel.view(), "gradient_checkpointing").children[0].children[1]
    assert panel.values["gradient_checkpointing"] is None and toggle.label == "auto"
    toggle.index = 2
    assert panel.values["gradient_checkpointing"] is False and toggle.label == "no"
    panel.set("gradient_checkpointing", None)
    assert toggle.label == "auto" and toggle.index == 0
    panel.set("gradient_checkpointing", True)
    toggle.index = 0
    assert panel.values["gradient_checkpointing"] is None and toggle.label == "auto"


def test_errors_stand_at_their_fields_and_go_when_mended():
    panel = ConfigPanel(small_config())
    view = panel.view()
    good = list(panel.values["model_paths"])
    paths = field_of(view, "model_paths")
    paths.children[0].children[1].value = "./nowhere\n" + good[1]
    steps = field_of(view, "max_steps")
    steps.children[0].children[1].value = "ten"
    assert "no such folder" in paths.children[1].value
    assert "whole number" in steps.children[1].value
    assert set(panel.errors) == {"model_paths", "max_steps"}
    with pytest.raises(ValueError, match="whole number"):
        panel.config  # noqa: B018
    paths.children[0].children[1].value = "\n".join(good)
    steps.children[0].children[1].value = "10"
    assert not panel.errors and panel.config.max_steps == 10
    assert paths.children[1].value and "ml-error" not in paths.children[1].value


def test_a_name_of_the_hub_is_not_looked_up_while_it_is_typed(monkeypatch, tmp_path):
    def look_up(*args, **kwargs):
        raise AssertionError("looked up")

    monkeypatch.setattr("huggingface_hub.snapshot_download", look_up)
    panel = ConfigPanel(small_config())
    paths = field_of(panel.view(), "model_paths")
    good = panel.values["model_paths"][1]
    for name in ("g", "gpt2", "some-lab/a", "some-lab/model-1.5"):
        paths.children[0].children[1].value = f"{name}\n{good}"
        assert not panel.errors
        assert f">? {name}: not checked" in paths.children[1].value
    panel.set("dataset_configs", {"some-lab/data": 8})
    note = field_of(panel.view(), "dataset_configs").children[1].value
    assert ">? some-lab/data: not checked" in note
    (tmp_path / "experts").mkdir()
    for wrong in ("experts/nobody", "./g", "../some/where", "some-lab/"):
        panel.set("model_paths", [wrong, good])
        assert f"{wrong}: no such folder" in panel.errors["model_paths"]
        assert "✗" in paths.children[1].value
    panel.set("dataset_configs", {"experts/rows": 8})
    assert "no such folder" in panel.errors["dataset_configs"]
    panel.set("dataset_configs", {"rows.jsonl": 8})
    assert "no such folder" in panel.errors["dataset_configs"]


def test_an_error_is_put_to_the_field_it_names():
    names = list(controls_of(MaskMergeConfig))
    assert field_in("learning_rate=2: expected", names) == "learning_rate"
    assert field_in("mask_init factors [1]: expected 2", names) == "mask_init"
    assert field_in("something else", names) is None
    panel = ConfigPanel(small_config())
    panel.set("fallback", 7)
    assert list(panel.errors) == ["fallback"]


def test_a_run_that_would_be_overwritten_is_said_at_the_folder(tmp_path):
    panel = ConfigPanel(small_config(overwrite=False))
    panel.set("resume", True)
    assert "no run that could be resumed" in panel.errors["output_dir"]
    panel.set("resume", False)
    assert not panel.errors and panel.notes["output_dir"] == "a new folder"
    begin_run(panel.config, "runs/a")
    panel.set("output_dir", "runs/a")
    assert "already holds a run" in panel.errors["output_dir"]
    for name, note in (("overwrite", "replaces"), ("resume", "goes on with")):
        panel.set(name, True)
        assert not panel.errors and note in panel.notes["output_dir"]
    (tmp_path / "runs/a/config.yaml").write_text("{}")
    panel.set("resume", False)
    assert "is not a run" in panel.errors["output_dir"]


def test_a_panel_comes_from_any_config():
    @dataclasses.dataclass
    class Other:
        "A config of no system."

        depth: int = option(3, "How deep", low=1, high=9, group="Shape")
        rate: float = option(0.1, "How fast", low=0.001, high=1, log=True)
        name: str | None = option(None, "What it is called")

    kinds = {name: control.kind for name, control in controls_of(Other).items()}
    assert kinds == {"depth": "slider", "rate": "log", "name": "text"}
    panel = ConfigPanel(Other)
    panel.set("name", "x y")
    assert panel.faces()["Command line"] == "other --name 'x y'"
    assert ConfigPanel(Other, command="train.py").command == "train.py"
    assert isinstance(panel.view(), widgets.VBox)


LABEL, TABS = 208, 590  # pixels for the name of an option, and for the tabs in a row


def width_of(text, size):
    "Pixels of a text in a font that no browser's default is wider than."
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans")
    return TextPath((0, 0), text, size, prop=font).get_extents().width


def test_names_of_options_and_tabs_fit_their_place(system):
    controls = system[1].controls.values()
    assert max(width_of(control.label, 13) for control in controls) < LABEL
    groups = dict.fromkeys(control.group for control in controls)
    assert sum(width_of(group, 12) + 19 for group in groups) < TABS
    assert len(controls) <= 16 or len(groups) > 2  # a long panel is parted


def test_the_note_of_data_says_what_is_trained_on_and_what_is_held_out():
    panel = ConfigPanel(small_config())
    assert panel.notes["dataset_configs"] == "; ".join(
        f"{task}: 32 rows to train on, 4 of test to score"
        for task in ("rewrite", "summarize")
    )
    panel.set("eval_samples", None)
    held = len(Path(DATA[0], "test.jsonl").read_text().splitlines())
    assert (
        f"rewrite: 32 rows to train on, {held} of test"
        in panel.notes["dataset_configs"]
    )
    panel.set("eval_split", "nothing")
    assert "nothing" in panel.errors["dataset_configs"]
    panel.set("eval_split", "validation")
    assert not panel.errors


@pytest.mark.parametrize("held", ["train.parquet", "train-00001-of-00002.jsonl.gz", "data/train.tsv", "training.ndjson", "test.csv", "train/data.arrow"])
def test_large_data_are_not_read_while_a_user_types(tmp_path, monkeypatch, held):
    "Whatever the reader calls a file of the splits that would be read."
    monkeypatch.setattr(panel_module, "load_task", lambda *_: pytest.fail("it was read"))
    file = tmp_path / "chats" / held
    file.parent.mkdir(parents=True)
    with open(file, "wb") as empty:
        empty.truncate(40 * 2**20)
    if held.endswith(".arrow"):
        (tmp_path / "chats" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert panel_module.data_note({str(file.parents[len(Path(held).parts) - 1]): None}, {"eval_split": "test"}) == "chats: 40 MiB"


@pytest.mark.parametrize("name", ["rows.tsv", "rows.ndjson", "chats/rows.jsonl.gz", "rows.csv.zst", "text.txt.gz", "weights.safetensors"])
def test_what_ends_like_a_file_is_no_name_on_the_hub(name):
    assert not panel_module.is_hub_name(name) and panel_module.is_hub_name(f"{name}-of-somebody")


CHANGES = {  # a value other than the default, by the kind of control
    "flag": lambda control, value: not value,
    "slider": lambda control, value: control.low,
    "log": lambda control, value: control.high,
    "toggle": lambda control, value: control.choices[-1],
    "dropdown": lambda control, value: control.choices[-1],
}
SUITABLE = {  # control by the type of the value
    bool: {"flag", "toggle"},
    int: {"slider", "log", "number"},
    float: {"slider", "log", "number"},
    str: {"toggle", "dropdown", "text"},
    list: {"lines"},
    dict: {"mapping"},
}


def test_a_slider_of_an_optional_number_has_a_box_for_none():
    panel = ConfigPanel(MaskMergeConfig)
    _, slider, auto = field_of(panel.view(), "learning_rate").children[0].children
    assert auto.value and slider.disabled and panel.values["learning_rate"] is None
    slider.value = 0.02  # what a browser does by itself to a slider that stands between two steps
    assert panel.values["learning_rate"] is None
    auto.value = False
    assert panel.values["learning_rate"] == 0.1 and not slider.disabled
    slider.value = 0.02
    assert panel.values["learning_rate"] == pytest.approx(0.02, rel=0.06)
    panel.set("learning_rate", None)
    assert auto.value and slider.disabled and not panel.errors
    panel.set("learning_rate", 0.3)
    assert not auto.value and slider.value == pytest.approx(0.3)


@pytest.fixture(params=sorted(COMMANDS))
def system(request):
    command = COMMANDS[request.param]
    module = importlib.import_module(f"merge_lab.{command.module}")
    return request.param, ConfigPanel(getattr(module, command.config))


def test_every_system_has_a_panel_with_suitable_controls(system):
    name, panel = system
    assert not panel.errors and panel.command == f"merge-lab {name}"
    view = panel.view()
    for name, control in panel.controls.items():
        value = panel.values[name]
        row = field_of(view, name)
        assert read_value(control, show_value(control, value)) == value
        assert control.help and control.help in row.children[0].children[1].tooltip
        if value is not None:
            assert control.kind in SUITABLE[type(value)], (name, value, control.kind)
        if (
            control.low is not None
            and control.high is not None
            and control.optional is False
        ):
            small = isinstance(value, float) or control.high - control.low <= 256
            assert control.kind in ("slider", "log") or not small


def test_faces_of_every_system_read_back_equal(system):
    name, panel = system
    options = [c.name for c in panel.controls.values() if c.kind in CHANGES]
    for option_name in options:  # each that can be changed alone
        control, before = panel.controls[option_name], panel.values[option_name]
        panel.set(option_name, CHANGES[control.kind](control, before))
        if panel.errors:
            panel.set(option_name, before)
    assert not panel.errors
    faces, config_class = panel.faces(), panel.config_class
    read = yaml.safe_load(faces["YAML"]) or {}
    assert config_from_dict(config_class, read) == panel.config
    assert eval(faces["Python"], {config_class.__name__: config_class}) == panel.config
    assert parse(name, shlex.split(faces["Command line"])[2:]) == panel.config


# --- the worker -----------------------------------------------------------------------


class Hand:
    "Positions of a dial at given times, and a clock that goes on only while somebody waits: the same on any machine."

    def __init__(self, worker: LatestWorker, pauses: list[float]):
        self.worker, self.now = worker, 0.0
        self.coming = [(sum(pauses[:position]), position) for position in range(len(pauses))]
        worker._turn, worker._thread = self, self  # the loop runs in the test's thread

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def notify_all(self):
        pass

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout: float):
        "Until something is moved, or the time is over."
        end = self.now + timeout
        if self.coming and self.coming[0][0] <= end:
            at, position = self.coming.pop(0)
            self.now = max(self.now, at)
            self.worker.submit(position)
        else:
            self.now = end

    def wait_for(self, holds, timeout: float) -> bool:
        end = self.now + timeout
        while not holds() and self.now < end:
            self.wait(end - self.now)
        return holds()

    def spend(self, seconds: float):
        "Time that the work takes, while the hand goes on."
        end = self.now + seconds
        while self.now < end:
            self.wait(end - self.now)


def drag(monkeypatch, pauses, cost=0.0, **times) -> list[tuple[float, int]]:
    "When what was worked on while positions came with these pauses, in seconds; the explorer's times."
    seen = []
    worker = LatestWorker(lambda value: (seen.append((hand.now, value)), hand.spend(cost)), **{"settle": 0.15, "longest": 0.7, "rest": 2.0, "idle": 10} | times)
    hand = Hand(worker, pauses)
    monkeypatch.setattr("merge_lab.worker.time", hand)
    worker._loop()
    assert not hand.coming and worker.error is None
    return seen


@pytest.mark.parametrize("pause, cost", [(0.0, 0.0), (0.05, 0.25), (0.2, 0.0), (0.5, 0.25)])
def test_forty_positions_make_at_most_fifteen_calls_and_end_on_the_last(monkeypatch, pause, cost):
    seen = [value for _, value in drag(monkeypatch, [pause] * 40, cost)]  # half a second is longer than a value must stand
    assert seen[-1] == 39 and len(seen) <= 15 and seen == sorted(seen)
    assert len(seen) >= 4 or pause < 0.2  # a slow hand sees something on the way


def test_an_uneven_drag_is_bounded_too(monkeypatch):
    seen = [value for _, value in drag(monkeypatch, [0.005 if i % 7 else 0.75 for i in range(40)])]
    assert seen[-1] == 39 and len(seen) <= 15


def test_single_moves_are_worked_on_at_once_and_a_rest_gives_new_budget(monkeypatch):
    seen = drag(monkeypatch, [2.25] * 5)  # longer than a drag's rest: each is meant
    assert [value for _, value in seen] == list(range(5))
    assert [when for when, _ in seen] == pytest.approx([0.15 + 2.25 * i for i in range(5)])
    assert drag(monkeypatch, [0.0], rest=5.0) == [(pytest.approx(0.15), 0)]


def test_positions_reach_a_worker_in_its_own_thread():
    "The same without the clock of the tests: the last one is worked on, whatever else is."
    seen = []
    worker = LatestWorker(seen.append, settle=0.01, longest=0.02, rest=0.1)
    for position in range(20):
        worker.submit(position)
    assert worker.wait(30) and seen[-1] == 19 and seen == sorted(set(seen))


def test_a_worker_survives_an_error():
    worker = LatestWorker(lambda value: 1 / value, settle=0)
    worker.submit(0)
    assert worker.wait(5) and isinstance(worker.error, ZeroDivisionError)
    worker.submit(1)
    assert worker.wait(5) and worker.error is None


# --- training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    "A merger of the small config, its tokenizer and its held-out rows: loaded once, left as they were found."
    config = small_config()
    tests = {Path(path).name: load_task(path, "test")[:4] for path in DATA}
    tokenizer = load_tokenizer(config.model_paths[0])
    return Merger.from_config(narrow(config, MergerConfig)), tokenizer, tests


def bench_of(panel, loaded):
    return Bench(panel, lambda config: loaded[0])


def session_of(panel, bench, **options):
    def make(callbacks):
        ready = prepare(panel.config)
        return make_trainer(bench.ready(), ready, callbacks, progress=False, given=bench.given)

    return TrainingSession(make, bench=bench, **options)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(mask, expected[name]) for name, mask in found.items()
    )


def pause_at(session, step):
    def listen(session):
        if session.state == "running" and session.step == step:
            session.pause()

    session.listeners.append(listen)
    return listen


def test_start_pause_adjust_save_resume_export(tmp_path):
    from transformers import AutoModelForCausalLM

    options = dict(max_steps=5, lr_scheduler_type="constant", learning_rate=0.03)
    options |= dict(constrain_mode="identity")
    panel = ConfigPanel(small_config(held_out_rows=0, **options))
    bench = Bench(panel)
    estimate = lambda trainer: 2**20 * trainer.args.max_steps
    session = session_of(panel, bench, estimate=estimate)
    view = SessionView(session)
    listener = pause_at(session, 2)
    session.start()
    with pytest.raises(RuntimeError, match="stop it"):
        session.start()
    until(lambda: session.state == "paused")
    session.listeners.remove(listener)
    masks = bench.merger.mask_state()
    time.sleep(0.3)
    assert session.step == 2 and len(session.frame) == 2
    assert all(
        (mask == masks[n]).all() for n, mask in bench.merger.mask_state().items()
    )

    view.painter.wait()
    assert "estimated" in view.memory.value and session.estimated == 5 * 2**20
    assert not view.buttons["resume"].disabled and view.buttons["pause"].disabled
    view.dials.rate.value = 0.001
    assert session.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    session.adjust(losses={"ce": 0.5}, penalties={"l2": 0.1})
    with pytest.raises(ValueError, match="every weight is 0"):
        session.adjust(losses={"ce": 0, "kl": 0})
    drawn = view.heatmap.value, view.alphas.value
    assert all(drawn)
    view.buttons["save"].click()
    until(lambda: session.saved)
    assert (tmp_path / "runs/a/checkpoint-2/trainer_state.json").exists()

    session.resume()
    assert session.join(120) == "finished" and session.step == 5
    assert view.painter.wait()
    assert view.heatmap.value != drawn[0] and view.alphas.value != drawn[1]
    frame = session.frame
    assert frame["learning_rate"].tolist() == pytest.approx([0.03] * 2 + [0.001] * 3)
    assert frame["l2"].notna().tolist() == [False] * 2 + [True] * 3
    folder = session.export()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        ours = bench.merger(input_ids=ids).logits
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5
        )
    merged = bench.merger.merged_state_dict()
    weights = loaded.state_dict()
    assert merged.keys() <= weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in merged.items())
    moved = (bench.merger.alphas()["mean"] - 0.5).abs().max()
    assert moved > 0.005  # what is exported is not where training began
    with pytest.raises(RuntimeError, match="pause it"):
        session.adjust(learning_rate=0.1)


def test_a_refused_change_changes_nothing():
    session, objective = TrainingSession(make=None), SimpleNamespace(losses={"kl": 1.0}, penalties={})
    session.state, session.trainer = "paused", SimpleNamespace(objective=objective)
    with pytest.raises(ValueError, match="penalties='roughness'"):
        session.adjust(losses={"ce": 0.5}, penalties={"roughness": 1.0})
    assert objective.losses == {"kl": 1.0} and objective.penalties == {}


def test_stop_ends_early_and_a_second_start_begins_anew(loaded):
    panel = ConfigPanel(small_config(max_steps=50))
    session = session_of(panel, bench_of(panel, loaded))
    pause_at(session, 1)
    session.start()
    until(lambda: session.state == "paused")
    session.stop()
    assert session.join(60) == "stopped" and session.step == 1
    assert Path("runs/a/checkpoint-1/trainer_state.json").exists()
    session.listeners.clear()
    panel.set("max_steps", 1)
    session.start()
    assert session.join(60) == "finished" and session.step == 1


def test_a_stopped_run_is_resumed_where_it_was(loaded):
    options = dict(max_steps=4, lr_scheduler_type="constant")
    panel = ConfigPanel(small_config(**options))
    session = session_of(panel, bench_of(panel, loaded))
    listener = pause_at(session, 2)
    session.start()
    until(lambda: session.state == "paused")
    session.stop()
    session.join(60)
    session.listeners.remove(listener)
    panel.set("overwrite", False)
    panel.set("resume", True)
    panel.set("save_steps", 4)
    session.checkpoint = lambda trainer: last_checkpoint(Path("runs/a"))
    session.start()
    assert session.join(60) == "finished" and len(session.durations) == 2
    resumed, masks = session.frame["loss"].tolist(), session.masks
    session.start()  # of a run that is done: nothing is left to train
    assert session.join(60) == "finished" and session.durations == []
    assert (session.step, session.total) == (4, 4) and same(session.masks, masks)
    assert session.frame["loss"].tolist() == resumed
    panel = ConfigPanel(small_config(**options))
    whole = session_of(panel, bench_of(panel, loaded))
    whole.start()
    whole.join(60)
    assert resumed == whole.frame["loss"].tolist() and len(resumed) == 4


def test_what_was_adjusted_is_taken_over_by_a_resumed_run(loaded):
    changes = dict(learning_rate=0.001, losses={"ce": 0.5}, penalties={"l2": 0.1})
    options = dict(max_steps=3, lr_scheduler_type="constant")

    def adjusted(stop):
        panel = ConfigPanel(small_config(**options))
        session = session_of(panel, bench_of(panel, loaded))
        session.recipe_of = lambda: recipe_of(panel.config)
        listener = pause_at(session, 1)
        session.start()
        until(lambda: session.state == "paused")
        session.listeners.remove(listener)
        session.adjust(learning_rate=0.5)
        session.adjust(**changes)
        session.stop() if stop else session.resume()
        session.join(60)
        return panel, session

    whole = adjusted(stop=False)[1].frame[["step", "loss", "learning_rate"]]
    panel, session = adjusted(stop=True)
    begun = [{"step": 1, "learning_rate": 0.001, "losses": {"kl": 1.0, "ce": 0.5}, "penalties": {"l2": 0.1}}]  # fmt: skip
    assert read_adjusted("runs/a") == begun
    with Path("runs/a/adjusted.jsonl").open("a") as file:  # after the checkpoint
        file.write(json.dumps(begun[0] | {"step": 2, "losses": {"kl": 9.0}}) + "\n")
    panel.set("overwrite", False)
    panel.set("resume", True)
    session.checkpoint = lambda trainer: last_checkpoint(Path("runs/a"))
    session.start()
    assert session.join(60) == "finished"
    assert session.frame[["step", "loss", "learning_rate"]].equals(whole)
    assert read_adjusted("runs/a") == begun
    card = (session.export() / "README.md").read_text()
    assert "max_steps: 3" in card and "summarize: 32" in card and "ce: 0.5" in card
    assert Run("runs/a").recipe() == session._recipe()


def test_stop_while_preparing_trains_nothing(loaded):
    panel = ConfigPanel(small_config())
    session = session_of(panel, bench_of(panel, loaded))
    session.start()
    session.stop()
    assert session.join(60) == "stopped" and session.step == 0


def test_an_exception_is_kept_shown_and_raised():
    def make(callbacks):
        raise ValueError("model_paths: <nothing> there")

    session = TrainingSession(make)
    view = SessionView(session)
    session.start()
    with pytest.raises(ValueError, match="nothing"):
        session.join(10)
    view.draw()
    assert session.state == "failed" and "&lt;nothing&gt; there" in view.trouble.value
    assert not view.buttons["start"].disabled


def test_the_bench_loads_again_only_for_other_masks():
    loads = []
    panel = ConfigPanel(small_config())
    bench = Bench(panel, lambda config: loads.append(config) or SimpleNamespace(lock=TurnLock(), state=SimpleNamespace()))
    bench.merger, bench.merger  # noqa: B018
    panel.set("mask_init", {"strategy": "odd_one_out", "selected_idx": 0})
    panel.set("learning_rate", 0.5)
    bench.merger  # noqa: B018
    assert len(loads) == 1 and type(loads[0]) is MergerConfig
    panel.set("mode", "scalar")
    bench.merger  # noqa: B018
    assert len(loads) == 2


def test_random_masks_are_those_of_the_command(loaded):
    config = small_config(mask_init={"strategy": "random"}, seed=7)
    masks = bench_of(ConfigPanel(config), loaded).ready().mask_state()
    assert same(masks, Merger.from_config(config).mask_state())


# --- the explorer ---------------------------------------------------------------------


@pytest.fixture
def lab(loaded):
    merger, tokenizer, tests = loaded
    panel = ConfigPanel(small_config())
    merger.init_masks(panel.config.mask_init)
    bench = bench_of(panel, loaded)
    explorer = MergeExplorer(
        lambda: bench.merger, tokenizer, tests, 1, 4, bench.start_at
    )
    yield panel, bench, explorer
    assert explorer.worker.wait()  # the merger is the next test's too


def test_ends_of_the_share_are_the_components_and_masks_are_put_back(lab):
    _, bench, explorer = lab
    before = bench.merger.mask_state()
    for share, name in ((0.0, "rewrite"), (1.0, "summarize")):
        outcome = explorer.evaluate(Dials(share).mask_init())
        table = outcome.scores.pivot(index="model", columns="task", values="loss")
        assert table.loc["merged"].tolist() == pytest.approx(table.loc[name].tolist())
        assert outcome.answers["merged"].tolist() == outcome.answers[name].tolist()
    after = bench.merger.mask_state()
    assert all((after[name] == mask).all() for name, mask in before.items())


def test_dials_shift_parts_and_training_starts_from_them(lab):
    panel, bench, explorer = lab
    explorer.move(share=0.25, last_layers=0.5, attention=0.125)
    assert explorer.worker.wait() and explorer.error is None
    explorer.use()
    session = session_of(panel, bench)
    starts = []

    def make(callbacks, make=session.make):
        result = make(callbacks)
        starts.append(bench.merger.alphas())
        return result

    session.make = make
    panel.set("max_steps", 1)
    session.start()
    session.join(60)
    alphas = starts[0].query("component == 1").set_index("module")["mean"]
    found = {name.removeprefix("model."): value for name, value in alphas.items()}
    assert found["layers.0.mlp.up_proj"] == pytest.approx(0.25, abs=1e-3)
    assert found["layers.0.self_attn.q_proj"] == pytest.approx(0.375, abs=1e-3)
    assert found["layers.3.mlp.up_proj"] == pytest.approx(0.75, abs=1e-3)


def test_exploring_in_a_pause_leaves_training_as_it_was(lab):
    panel, bench, explorer = lab
    panel.set("max_steps", 3)

    def losses(explore):
        session = session_of(panel, bench)
        listener = pause_at(session, 1)
        session.start()
        until(lambda: session.state == "paused")
        session.listeners.remove(listener)
        if explore:
            explorer.move(share=0.9)
            assert explorer.worker.wait()
        session.resume()
        session.join(60)
        return session.frame["loss"].tolist()

    assert losses(True) == losses(False)


def test_the_sliders_follow_a_move_in_python(lab):
    panel, _, explorer = lab
    view = ExplorerView(explorer)
    explorer.move(share=0.25, attention=0.1)
    assert view.share.value == 0.25 and view.shifts["attention"].value == 0.1
    view.share.value = 0.75
    assert explorer.dials.share == 0.75 and explorer.dials.kinds["attention"] == 0.1
    assert explorer.worker.wait() and explorer.visits[-1]["share"] == 0.75
    before = view.answers.value
    view.use.click()
    assert panel.config.mask_init == explorer.dials.mask_init()
    assert panel.config.mask_init["parameters"]["attn"] == 0.85
    assert "start from these alphas" in view.status.value
    view.reset.click()
    assert all(dial.value == 0 for dial in view.shifts.values())
    assert explorer.dials.kinds["attention"] == 0
    view.share.value = 0.0
    assert explorer.worker.wait() and view.answers.value != before
    right = explorer.outcome.answers["merged"] == explorer.outcome.answers["rewrite"]
    assert right.all()


def test_the_dropdown_follows_a_move_in_python_and_the_other_way_round(lab):
    _, _, explorer = lab
    explorer.move(component=0)  # before there is a view, and before names are known
    view = ExplorerView(explorer)
    assert view.component.value == 0
    assert explorer.worker.wait() and view.component.label == "rewrite"
    explorer.move(component=1)
    assert view.component.label == "summarize"
    assert explorer.worker.wait() and view.component.value == 1
    view.component.value = 0
    assert explorer.dials.component == 0
    assert explorer.worker.wait() and explorer.outcome.mask_init["selected_idx"] == 0


def after(explorer, view, **move):
    "What the status says after a move."
    explorer.move(**move)
    assert explorer.worker.wait()
    return view.status.value


def test_an_error_of_a_merge_is_shown_until_the_next(lab, monkeypatch):
    panel, bench, explorer = lab
    view = ExplorerView(explorer)
    assert "merge " in after(explorer, view)

    def refuse(config):
        raise OSError("no room for <it>")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "load", refuse)
        panel.set("mode", "scalar")
        assert "✗ OSError: no room for &lt;it&gt;" in after(explorer, view)
    panel.set("mode", "vector_output")  # the first merger again, which is loaded anew
    assert "merge " in after(explorer, view) and explorer.error is None
    assert "✗ ValueError: mask_init" in after(explorer, view, component=5)


def test_what_cannot_be_drawn_is_said_and_the_next_merge_is_drawn(lab, monkeypatch):
    _, _, explorer = lab
    view = ExplorerView(explorer)
    assert "merge " in after(explorer, view)

    def fail(*arguments):
        raise KeyError("loss")

    with monkeypatch.context() as patch:
        patch.setattr("merge_lab.explorer_view.scores_html", fail)
        assert "✗ KeyError" in after(explorer, view, share=0.2)
        assert isinstance(explorer.error, KeyError)
    assert "merge " in after(explorer, view, share=0.3) and explorer.error is None


def test_components_may_be_called_as_rows_and_columns_are(loaded, monkeypatch):
    from merge_lab.checkpoints import component_names
    from merge_lab.evaluation import confusion

    merger, tokenizer, tests = loaded
    names = component_names(["runs/demo/merged", "someone/other"])
    monkeypatch.setattr(merger, "names", names)
    explorer = MergeExplorer(lambda: merger, tokenizer, tests, 1, 1)
    view = ExplorerView(explorer)
    assert "merge " in after(explorer, view), view.status.value
    assert set(explorer.outcome.scores["model"]) == {*names, "merged"}
    assert {"prompt", "expected", *names, "merged"} == set(explorer.outcome.answers)
    said = {own: ["a", "b"] for own in names}
    rows = {task: given[:1] for task, given in tests.items()}
    confusion(merger, tokenizer, rows, said, progress=False, max_new_tokens=2)


# --- pictures and runs ----------------------------------------------------------------


def test_heatmap_tells_layer_module_component_and_value(lab):
    _, bench, _ = lab
    bench.merger.init_masks({"strategy": "uniform", "factors": [0.25, 0.75]})
    picture = alpha_svg(bench.merger.alphas(), bench.merger.names)
    assert "<title>layer 2, q_proj, summarize: alpha 0.750</title>" in picture
    assert picture.count("<title>") == 2 * (4 * 9 + 3)
    from xml.etree import ElementTree

    ElementTree.fromstring(picture)


def test_text_of_models_cannot_break_the_page():
    answers = pd.DataFrame(
        {"prompt": ["<b>"], "expected": ["x"], "merged": ["<script>alert(1)</script>"]}
    )
    assert "<script>" not in answers_html(answers)
    shown = memory_html(12 * 2**20, 30 * 2**20, 90 * 2**20)
    assert all(f"{size} MiB" in shown for size in (12, 30, 90))


def test_runs_are_listed_compared_loaded_and_exported(lab):
    panel, bench, _ = lab
    panel.set("max_steps", 1)
    session = session_of(panel, bench)
    session.start()
    session.join(60)
    masks = bench.merger.mask_state()
    browser = RunBrowser("runs", bench)
    table = browser.table()
    assert list(table.index) == ["a"] and table.loc["a", "steps"] == 1
    bench.merger.init_masks({"strategy": "random"})
    browser.load("a")
    assert all(
        (mask == masks[n]).all() for n, mask in bench.merger.mask_state().items()
    )
    folder = browser.export("a")
    assert (folder / "model.safetensors").exists()
    assert "summarize: 32" in (folder / "README.md").read_text()
    assert len(browser.compare("a").axes) == 2
    titles = [axis.get_title() for axis in browser.compare_alphas("a").axes]
    assert titles[:2] == ["a: rewrite", "a: summarize"]
    with pytest.raises(ValueError, match="'a'"):
        browser.compare("b")


@pytest.fixture
def other(lab):
    "A run of the past with masks of its own, and the browser that lists it."
    _, bench, explorer = lab
    bench.merger.init_masks({"strategy": "uniform", "factors": [0.2, 0.8]})
    bench.merger.save_pretrained("runs/other/masks")
    Path("runs/other/config.yaml").write_text("dataset_configs: {}\n")
    masks = bench.merger.mask_state()
    bench.merger.init_masks({"strategy": "uniform"})
    return masks, RunBrowser("runs", bench, explorer.show)


def test_no_masks_are_loaded_under_a_running_session(lab, other):
    panel, bench, _ = lab
    session, browser = session_of(panel, bench), other[1]
    pause_at(session, 1)
    session.start()
    until(lambda: session.state == "paused")
    before = bench.merger.mask_state()
    view = BrowserView(browser)
    view.choice.value = ("other",)
    view.buttons["Load masks"].click()
    assert view.worker.wait() and "is paused: stop it" in view.status.value
    with pytest.raises(RuntimeError, match="is paused"):
        session_of(panel, bench).start()
    panel.set("mode", "scalar")
    with pytest.raises(RuntimeError, match="is paused"):
        bench.merger  # noqa: B018
    panel.set("mode", "vector_output")
    assert same(bench.merger.mask_state(), before)
    session.stop()
    assert session.join(60) == "stopped"
    view.buttons["Load masks"].click()
    assert view.worker.wait() and "until mask_init is changed" in view.status.value
    assert same(bench.merger.mask_state(), other[0])


def test_an_export_has_the_sessions_own_masks_whatever_was_loaded(lab, other):
    from safetensors.torch import load_file

    panel, bench, _ = lab
    panel.set("max_steps", 1)
    session = session_of(panel, bench)
    session.start()
    assert session.join(60) == "finished"
    own, alphas = bench.merger.merged_state_dict(), session.alphas()
    other[1].load("other")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(bench.merger.merged_state_dict()[name], own[name])
    written = load_file(session.export() / "model.safetensors")
    assert torch.equal(written[name], own[name])
    assert session.alphas().equals(alphas)
    assert same(bench.merger.mask_state(), other[0])  # what was loaded is loaded still


def test_a_run_starts_from_loaded_masks_until_mask_init_is_changed(lab, other):
    panel, bench, explorer = lab
    panel.set("max_steps", 1)
    view = ExplorerView(explorer)
    assert explorer.worker.wait()
    other[1].load("other")
    assert explorer.worker.wait() and "masks of other" in view.status.value
    shown = explorer.outcome.alphas.query("component == 1")["mean"]
    assert shown.tolist() == pytest.approx([0.8] * len(shown), abs=1e-3)
    with pytest.raises(RuntimeError, match="Move a dial"):
        explorer.use()
    starts, session = [], session_of(panel, bench)

    def make(callbacks, make=session.make):
        result = make(callbacks)
        starts.append(bench.merger.mask_state())
        return result

    session.make = make
    session.start()
    assert session.join(60) == "finished" and same(starts[0], other[0])
    panel.set("mask_init", {"strategy": "uniform", "factors": [0.4, 0.6]})
    means = bench.ready().alphas().groupby("component")["mean"].mean()
    assert means.tolist() == pytest.approx([0.4, 0.6], abs=1e-3)
    other[1].load("other")
    bench.start_at(dict(panel.values["mask_init"]))  # the same alphas, but a hand's
    means = bench.ready().alphas().groupby("component")["mean"].mean()
    assert means.tolist() == pytest.approx([0.4, 0.6], abs=1e-3)


def test_loaded_masks_are_not_solved_for(lab, other):
    panel, bench, _ = lab
    panel.set("mask_init", {"strategy": "least_squares", "rows": 2})
    other[1].load("other")
    assert bench.given
    make_trainer(bench.ready(), prepare(panel.config), progress=False, given=bench.given)
    assert same(bench.merger.mask_state(), other[0])
    panel.set("mask_init", {"strategy": "least_squares", "rows": 3})
    assert not bench.given


def test_another_merger_takes_the_place_of_the_first(lab):
    panel, _, explorer = lab
    panel.set("max_steps", 1)
    bench, first = Bench(panel), None
    explorer.merger = lambda: bench.merger
    session = session_of(panel, bench)
    view = SessionView(session)
    session.start()
    assert session.join(60) == "finished"
    explorer.move(share=0.5)
    assert explorer.worker.wait() and explorer.error is None
    assert view.painter.wait()
    first, alphas = weakref.ref(bench.merger), session.alphas()
    freed = []
    load = bench.load
    bench.load = lambda config: (freed.append(first() is None), load(config))[1]
    panel.set("mode", "scalar")
    second = session_of(panel, bench)
    second.start()
    assert second.join(60) == "finished"
    assert freed == [True]  # before the second was loaded
    assert session.alphas().equals(alphas) and len(session.frame) == 1
    with pytest.raises(RuntimeError, match="another merger has been loaded"):
        session.export()
    view.draw()
    assert "<svg" in view.heatmap.value


def test_a_worker_without_work_ends_its_thread_and_begins_another():
    seen = []
    worker = LatestWorker(seen.append, settle=0, idle=0.05)
    worker.submit(1)
    thread = worker._thread
    thread.join(5)
    assert not thread.is_alive() and worker._thread is None and seen == [1]
    worker.submit(2)
    assert worker.wait(5) and seen == [1, 2]


def tensor_bytes() -> int:
    "Bytes of all tensors that are alive, each storage once: unlike resident memory it forgets what ran before."
    gc.collect()
    alive = [each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


def test_memory_used_has_the_components_in_it_at_every_start(tmp_path, monkeypatch):
    for module in (session_module, training):
        monkeypatch.setattr(module, "memory_in_use", tensor_bytes)
    tokenizer = load_tokenizer(small_config().model_paths[0])
    size = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=3)
    models = tiny_experts("llama", 2, vocab_size=len(tokenizer), **size)
    paths = [str(tmp_path / f"expert-{i}") for i in range(2)]
    held = 0
    for model, path in zip(models, paths):
        held += sum(tensor.nbytes for tensor in model.parameters())
        save_tiny(model, path, tokenizer)
    assert held > 20 * 2**20
    options = dict(max_steps=1, model_paths=paths, base_model="", dtype="float32", per_device_train_batch_size=1)
    panel = ConfigPanel(small_config(**options))
    session, used = session_of(panel, Bench(panel)), []
    for _ in range(2):
        session.start()
        assert session.join(400) == "finished"
        used.append(session.memory_used)
    assert held < min(used) and max(used) < 2.5 * held
    assert used[1] == pytest.approx(used[0], rel=0.25)
    view = SessionView(session)
    assert f"{used[1] / 2**20:,.0f} MiB" in view.memory.value


def test_an_export_that_fails_is_shown_until_the_next_start(loaded):
    panel, wait = ConfigPanel(small_config(max_steps=1)), threading.Event()

    def export(merger):
        assert wait.wait(20)
        raise OSError("<no> room on the disk")

    session = session_of(panel, bench_of(panel, loaded), export=export)
    view = SessionView(session)
    session.start()
    assert session.join(60) == "finished" and view.painter.wait()
    button = view.buttons["export"]
    assert not button.disabled
    button.click()
    until(lambda: button.disabled and "exporting" in view.line.value)
    wait.set()
    assert view.exporter.wait() and view.painter.wait()
    assert "&lt;no&gt; room" in view.trouble.value and not button.disabled
    view.buttons["start"].click()
    assert session.join(60) == "finished" and view.painter.wait()
    assert view.trouble.value == ""


# --- runs of commands -----------------------------------------------------------------


def test_a_command_that_fails_says_so_in_its_own_words(tmp_path, forked):
    other = save_tiny(tiny_model("llama"), tmp_path / "other", tiny_tokenizer())
    paths = [small_config().model_paths[0], str(other)]
    view = CommandRunView(CommandRun(ConfigPanel(PreflightConfig(paths), checks={})))
    view.start.click()
    assert view.run.join(120) == "failed", view.run.output
    view.painter.wait()
    assert "cannot be merged" in view.log.value and ">failed<" in view.state.value
    assert not view.start.disabled and view.stop.disabled


def test_a_command_shows_its_progress_and_leaves_a_checkpoint_when_stopped(forked):
    panel = ConfigPanel(small_config(report=False, save_merged=False, max_steps=5000))
    run = CommandRun(panel)
    view = CommandRunView(run)
    view.start.click()
    assert run.state == "running"
    until(lambda: not view.stop.disabled)
    with pytest.raises(RuntimeError, match="stop it"):
        run.start()
    until(lambda: view.bar.max == 5000 and view.bar.value > 1)
    assert "loss" in view.log.value
    view.stop.click()
    assert run.join(60) == "stopped"
    steps = len(pd.read_json(run.folder / "history.jsonl", lines=True))
    assert (
        steps < 5000
        and (run.folder / f"checkpoint-{steps}/trainer_state.json").exists()
    )


IGNORING = "import signal, time; signal.signal(2, lambda *_: done.append(1)); done = []; print('up')"
ENDINGS = {  # what the process does after it was told to stop, and what has become of it
    "finished": f"{IGNORING}\nwhile not done: time.sleep(0.01)",
    "stopped": f"{IGNORING}\nwhile not done: time.sleep(0.01)\nraise SystemExit(130)",
}


@pytest.mark.parametrize("state", ENDINGS)
def test_a_stopped_command_says_how_it_ended(monkeypatch, state):
    monkeypatch.setattr("merge_lab.runs.RUN_COMMAND", ENDINGS[state])
    run = CommandRun(ConfigPanel(small_config()))
    run.start()
    until(lambda: run.lines)
    run.stop()
    assert run.join(20) == state


def test_a_command_does_not_outlive_its_kernel(monkeypatch):
    ends = []
    monkeypatch.setattr("atexit.register", ends.append)
    monkeypatch.setattr("merge_lab.runs.RUN_COMMAND", "import time; time.sleep(600)")
    run = CommandRun(ConfigPanel(small_config()))
    run.start()
    assert run.process.poll() is None and len(ends) == 1
    ends[0]()  # as at the end of the interpreter
    assert run.join(20) == "failed" and run.process.poll() is not None


def test_a_wrong_config_starts_no_command():
    panel = ConfigPanel(small_config())
    panel.set("model_paths", "./nowhere")
    view = CommandRunView(CommandRun(panel))
    view.start.click()
    assert view.run.process is None and "no such folder" in view.trouble.value
