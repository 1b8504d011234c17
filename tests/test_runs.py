"""The run browser on real runs of every system, and the run button."""

import functools
import importlib
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from merge_lab.checkpoints import load_tokenizer
from merge_lab.commands import COMMANDS, find_object, System, SYSTEMS
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import begin_run, bundled_path
from merge_lab.runs import BrowserView, compare_runs, read_alphas, Run, RunBrowser
from merge_lab.systems import dam, layer_merge, lora, lora_merge, mask_merge, quantize, router
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_tokenizer
from merge_lab.viz import layer_grid
from merge_lab.widgets import Bench, ConfigPanel, controls_of

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")

TASKS = ("rewrite", "summarize")
MODELS = ["models/rewrite", "models/summarize"]
BASE = "models/base"
DATA = [str(bundled_path(f"tasks/{task}")) for task in TASKS]
IDS = torch.tensor([[1, 5, 9, 12, 7]])


def run_mask_merge(folder: Path):
    options = dict(per_device_train_batch_size=4, save_steps=0, eval_samples=2)
    data = {path: 8 for path in DATA}
    config = mask_merge.demo_config(
        model_paths=MODELS, base_model="", dataset_configs=data, max_steps=2, device="cpu",
        report=False, save_merged=False, output_dir=str(folder), **options,
    )  # fmt: skip
    mask_merge.run(config)


def run_dam_merge(folder: Path):
    options = dict(base_model_id=BASE, model_ids=MODELS, dtype="float32", device="cpu")
    options |= dict(non_linearity="sigmoid", output_path=str(folder))
    dam.merge(dam.DAMConfig(**options))


def run_dam_train(folder: Path):
    data = str(folder.parent / "dam-data")
    dam.create_dataset_topk_logits(
        dam.DAMTopkConfig(
            model_ids=MODELS, base_model_name=BASE, dataset_names=DATA, example_count=4,
            compute_logits=False, device="cpu", hf_disk_dataset_dir=data,
        )
    )  # fmt: skip
    dam.train(
        dam.DAMTrainConfig(
            untrained_merged_model_name=str(folder.parent / "dam-merge"), max_steps=2,
            hf_disk_dataset_dir=data, per_device_train_batch_size=4, device="cpu",
            export=False, output_dir=str(folder), save_steps=0,
        )
    )  # fmt: skip


def run_lora(folder: Path, data: str = DATA[0]):
    lora.run(
        lora.LoRAPipelineConfig(
            base_model=BASE, datasets=[data], n_samples=8, max_steps=2, batch_size=4, r=2,
            logging_steps=1, gradient_accumulation_steps=1, merge=False, device="cpu",
            output_dir=str(folder),
        )
    )  # fmt: skip


def run_lora_merge(folder: Path):
    second = folder.parent / "lora-second"
    run_lora(second, DATA[1])
    lora_merge.run(
        lora_merge.LoRAMergeConfig(
            adapters=[str(folder.parent / "lora"), str(second)], datasets=DATA, n_samples=4,
            max_steps=2, per_device_train_batch_size=4, device="cpu", save_steps=0,
            merged=False, output_dir=str(folder),
        )
    )  # fmt: skip


def run_layer_merge(folder: Path):
    layer_merge.run(
        layer_merge.LayerMergeConfig(
            model_path=BASE, n_pairs=1, num_steps=2, num_samples=4, max_length=32,
            search_start=False, device="cpu", output_dir=str(folder),
        ),
        progress=False,
    )  # fmt: skip


def run_quantize(folder: Path):
    quantize.run_quantize(
        quantize.QuantizeConfig(
            model_path=BASE, seed_precision=3, parent_precision=4, dataset=["tasks"],
            seq_len=32, num_examples=2, dtype="float32", device="cpu", output_dir=str(folder),
        )
    )  # fmt: skip


def run_router(folder: Path):
    router.run(
        router.RouterConfig(
            static=False,
            model_path=str(folder.parent / "quantize"), dataset=["tasks"], seq_len=32,
            prefix_length=8, num_examples=8, num_validation=4, num_epochs=1, device="cpu",
            pretrain="none", save_dir=str(folder),
        )
    )  # fmt: skip


MAKERS = {
    "mask-merge": run_mask_merge,
    "dam-merge": run_dam_merge,
    "dam-train": run_dam_train,
    "lora": run_lora,
    "lora-merge": run_lora_merge,
    "layer-merge": run_layer_merge,
    "quantize": run_quantize,
    "router": run_router,
}
STEPS = dict.fromkeys(MAKERS, 2) | {"dam-merge": 0, "quantize": 0}
MASKED = ("mask-merge", "dam-merge", "dam-train", "lora-merge")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "A run of each system, on small models that read the bundled tasks."
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    tokenizer = load_tokenizer(bundled_path("models/base"))
    models = tiny_experts("llama", 3, vocab_size=len(tokenizer), num_hidden_layers=3)
    for model, path in zip(models, (BASE, *MODELS)):
        save_tiny(model, path, tokenizer)
    for kind, make in MAKERS.items():
        make(Path("runs") / kind)
    yield RunBrowser("runs")
    os.chdir(before)


@pytest.fixture(scope="module")
def table(browser):
    return browser.table()


@pytest.fixture(scope="module")
def saved(browser):
    "The mergers that runs left."

    @functools.cache
    def load(kind):
        run = browser.run(kind)
        return find_object(run.system.saved).from_pretrained(run.masks).eval()

    return load


def test_every_system_is_known_by_one_option():
    fields = {}
    for name, command in COMMANDS.items():
        module = importlib.import_module(f"merge_lab.{command.module}")
        fields[name] = set(controls_of(getattr(module, command.config)))
    for kind, system in SYSTEMS.items():
        assert [name for name in fields if system.mark in fields[name]] == [kind]
        assert not system.steps or system.steps[0] in fields[kind]
    assert set(SYSTEMS) == set(COMMANDS) - {"align", "memory", "preflight", "verify", "export", "push", "demo", "compare", "ablate", "eval", "real", "runs"}


def test_what_a_run_leaves_is_told_by_the_row_of_its_system(monkeypatch, tmp_path):
    class Adapter:
        def __init__(self, base, output_dir):
            self.base, self.folder = base, output_dir

        def save(self):
            (self.folder / "merged" / self.base).mkdir(parents=True)

    rows = {
        "shrink": System("shrink_by", pairs="pairs.csv"),
        "mix": System("mixed", components="mixed"),
        "tune": System("tuned", adapter="Adapter"),
    }
    monkeypatch.setattr("merge_lab.runs.SYSTEMS", rows)
    monkeypatch.setattr("merge_lab.commands.SYSTEMS", rows)  # where a run is told whose it is
    commands = {"tune": SimpleNamespace(find={"Adapter": Adapter}.get)}
    monkeypatch.setattr("merge_lab.runs.COMMANDS", commands)
    configs = {"shrink": "shrink_by: 1", "mix": "mixed: [a/b, c/d/adapter_checkpoint]", "tune": "tuned: 1\nbase_model: small"}
    for kind, config in configs.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.yaml").write_text(config)
    shrink, mix, tune = (Run(tmp_path / kind) for kind in configs)
    assert not shrink.has_alphas
    (shrink.folder / "pairs.csv").write_text("layer,into,after\nlayers.1.up_proj,1,0.25\n")
    (shrink.folder / "history.jsonl").write_text('{"step": 1, "loss": 2.0, "a": 0.5, "b": 1.0}\n')
    assert shrink.has_alphas and shrink.alphas()["mean"].tolist() == [0.25, 0.75]
    assert shrink.history()["alpha_mean_0"].tolist() == [0.75]
    assert len(shrink.names()) == 2 and mix.names() == ["b", "d"]
    assert tune.export() == tune.folder / "merged" and (tune.folder / "merged/small").is_dir()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_is_listed(browser, table, kind):
    row = table.loc[kind]
    assert row["system"] == kind and row["steps"] == STEPS[kind]
    assert (row["loss"] > 0) == (STEPS[kind] > 0)  # NaN where nothing was trained
    if SYSTEMS[kind].steps:
        assert row["wanted"] == 2
    assert row["alphas"] == (kind in (*MASKED, "layer-merge"))
    history = browser.run(kind).history()
    assert len(history) == STEPS[kind] and history["loss"].notna().all()


def test_a_dataset_of_teachers_is_listed_as_what_it_is(browser, table):
    row = table.loc["dam-data"]
    assert row["system"] == "dam-topk" and not row["alphas"] and not row["merged"]
    with pytest.raises(ValueError, match="a run of dam-topk leaves no plain checkpoint"):
        browser.run("dam-data").export()


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if STEPS[kind]])
def test_its_curves_are_drawn(browser, kind):
    axes = browser.compare(kind).axes
    lines = [line for line in axes[0].lines if len(line.get_xdata())]
    assert [len(line.get_xdata()) for line in lines] == [2]
    shown = [axis.get_ylabel().split()[0] for axis in axes if axis.get_visible()]
    second = {"lora": "tokens", "router": "average"}.get(kind, "mean")
    assert shown == ["loss,", second]


@pytest.mark.parametrize("kind", MASKED)
def test_its_alphas_are_those_of_its_merger(browser, saved, kind):
    one = ["module", "parameter", "component"]
    run, merger = browser.run(kind), saved(kind)
    found, held = (t.set_index(one)["mean"] for t in (run.alphas(), merger.alphas()))
    assert (found - held).abs().max() < 1e-6 and len(found) == len(held)
    assert run.names()[: merger.n_components] == list(merger.names)


def test_pairs_of_layers_are_a_map_too(browser):
    run = browser.run("layer-merge")
    alphas, history = run.alphas(), run.history()
    means = alphas.groupby("component")["mean"].mean()
    assert means.sum() == pytest.approx(1) and alphas["layer"].nunique() == 1
    assert history["alpha_mean_0"].iloc[-1] == pytest.approx(means[0], abs=1e-6)


def test_all_systems_stand_side_by_side(browser):
    maps = [a for a in browser.compare_alphas(*MAKERS).axes if a.get_title()]
    titles = [axis.get_title() for axis in maps if axis.get_visible()]
    assert "mask-merge: rewrite" in titles and "lora-merge: lora-second" in titles
    assert "layer-merge: layer that stays" in titles and len(titles) == 10
    assert sum(a.get_visible() for a in browser.compare(*MAKERS).axes) == 4
    assert browser.compare_alphas("lora", "router") is None
    with pytest.raises(ValueError, match="no run with a history"):
        browser.compare("quantize")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", MASKED)
def test_an_exported_run_is_its_merger(browser, saved, kind):
    folder = browser.export(kind)
    assert browser.table().loc[kind, "merged"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = saved(kind)
    torch.testing.assert_close(logits(loaded), logits(own), atol=1e-4, rtol=1e-4)


def test_an_exported_adapter_is_the_base_with_it(browser):
    folder = browser.export("lora")
    assert browser.table().loc["lora", "merged"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    before = logits(base)
    adapted = lora.load_adapter(base, browser.run("lora").folder / "adapter_checkpoint")
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-4, rtol=1e-4)
    assert not torch.equal(logits(loaded), before)


def test_what_cannot_be_exported_says_why(browser):
    layers = json.loads((browser.export("layer-merge") / "config.json").read_text())
    assert layers["num_hidden_layers"] == 2
    for kind in ("router", "quantize"):
        with pytest.raises(ValueError, match="no plain checkpoint"):
            browser.export(kind)


def test_masks_are_loaded_where_they_mean_the_same(browser, saved):
    config = MergerConfig(MODELS, "vector_output", dtype="float32")
    bench = Bench(ConfigPanel(config))
    loader, merger = RunBrowser(browser.folder, bench), bench.merger
    loader.load("mask-merge")
    own = saved("mask-merge").mask_state()
    assert all(
        torch.equal(own[name], mask) for name, mask in merger.mask_state().items()
    )
    for kind, says in {
        "dam-train": "constrain_mode",
        "lora-merge": "the merger has rewrite, summarize",
        "layer-merge": "no masks",
        "router": "no masks",
        "lora": "no masks",
    }.items():
        with pytest.raises(ValueError, match=says):
            loader.load(kind)


def test_buttons_work_for_every_system(browser):
    view = BrowserView(browser)
    assert all(f"<td>{kind}</td>" in view.table.value for kind in MAKERS)
    view.choice.value = ("mask-merge", "lora", "router")
    view.buttons["Compare"].click()
    assert view.worker.wait() and "without alphas: lora, router" in view.status.value
    assert view.picture.value[:4] == view.maps.value[:4] == b"\x89PNG"
    assert "<th>steps asked for</th>" in view.table.value
    for button in ("Load masks", "Export"):
        view.buttons[button].click()
        assert view.worker.wait() and "choose one run" in view.status.value
    view.choice.value = ("router",)
    view.buttons["Export"].click()
    assert view.worker.wait() and "no plain checkpoint" in view.status.value


def test_no_click_is_lost_while_a_button_works(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("n_pairs: 1\n")
    browser, go, done = RunBrowser(tmp_path), threading.Event(), []

    def slow(name):
        assert go.wait(20)
        done.append(name)
        return name

    browser.export = browser.load = slow
    view = BrowserView(browser)
    for name in ("Export", "Load masks", "Export"):
        view.buttons[name].click()  # as if all were on their way at once
    assert all(button.disabled for button in view.buttons.values())
    assert "working" in view.status.value and not done
    go.set()
    assert view.worker.wait() and done == ["a"] * 3
    assert not any(button.disabled for button in view.buttons.values())
    assert "exported to a" in view.status.value


def test_the_legend_names_components_that_runs_share():
    history = pd.DataFrame(
        {"step": [1], "loss": [1.0], "alpha_mean_0": [0.5], "alpha_mean_1": [0.5]}
    )
    names = {"first": ["base", "poet"], "second": ["base", "lawyer"]}
    axis = compare_runs(dict.fromkeys(names, history), names).axes[1]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["first", "second", "base", "component 1"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_saved_alphas_stand_in_the_models_order(architecture, tmp_path):
    paths = [str(tmp_path / name) for name in "ab"]
    for model, path in zip(tiny_experts(architecture, 2), paths):
        save_tiny(model, path, tiny_tokenizer())
    merger = Merger.from_config(MergerConfig(paths, dtype="float32"))
    merger.save_pretrained(tmp_path / "masks")
    tables = (read_alphas(tmp_path / "masks"), merger.alphas())
    found, held = (layer_grid(table[table["component"] == 0]) for table in tables)
    assert list(found.index) == list(held.index)
    assert list(found.columns) == list(held.columns)


def test_a_run_that_has_just_begun_is_listed(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.yaml").write_text("dataset_configs: {}\nmax_steps: -1\n")
    (tmp_path / "new/history.jsonl").write_text("")
    row = RunBrowser(tmp_path).table().loc["new"]
    assert row["steps"] == 0 and row["loss"] != row["loss"] and row["wanted"] is None
    with pytest.raises(ValueError, match="no run with a history"):
        compare_runs({"new": Run(tmp_path / "new").history()})


@pytest.mark.parametrize("home", [Path("."), Path("home")])
def test_runs_of_a_router_are_listed_where_they_are_by_default(tmp_path, monkeypatch, home):
    "Beside runs/, whether that is there or not."
    from merge_lab.systems.router import RouterConfig

    monkeypatch.chdir(tmp_path)
    config = RouterConfig(model_path="quantized")
    begin_run(config, home / config.output_dir)
    begin_run(config, home / config.output_dir / "second")
    for there in (False, True):
        browser = RunBrowser(home / "runs")
        assert set(browser.table().index) - {"mine"} == {"../router_checkpoints", "../router_checkpoints/second"}
        assert (browser.table()["system"] == "router").all()
        assert browser.run("../router_checkpoints").config["model_path"] == "quantized"
        begin_run(config, home / "runs/mine") if not there else None
    assert set(RunBrowser(home).table().index) == {"router_checkpoints", "router_checkpoints/second", "runs/mine"}


def test_a_damaged_run_does_not_hide_the_others(tmp_path):
    for name, text in (("torn", "a: [1,"), ("list", "- 1"), ("good", "n_pairs: 1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/training_history.json").write_text('{"steps": []}')
    table = RunBrowser(tmp_path).table()
    assert set(table.index) == {"torn", "list", "good", "bare"}
    assert table["system"].to_dict() == {
        "torn": "",
        "list": "",
        "bare": "",
        "good": "layer-merge",
    }


def test_a_router_is_followed_step_by_step(tmp_path):
    "Its other file is written once an epoch. Runs of older versions have only that."
    for name, lines in (("new", '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'), ("old", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("router_hidden: 8\n")
        (tmp_path / name / "training_history.json").write_text('{"steps": [{"step": 0, "loss": 3.0}]}')
        if lines:
            (tmp_path / name / "history.jsonl").write_text(lines)
    assert Run(tmp_path / "new").history()["loss"].tolist() == [3.0, 2.5] and Run(tmp_path / "old").history()["loss"].tolist() == [3.0]
    table = RunBrowser(tmp_path).table()
    assert table["steps"].to_dict() == {"new": 2, "old": 1} and set(table["system"]) == {"router"}


DAMAGED = {  # name -> option that says its system, file of its history, and what is in it
    "cut": ("router_hidden: 8", "training_history.json", '{"steps": [{"step": 0, "lo'),
    "list": ("router_hidden: 8", "training_history.json", "[1, 2]"),
    "empty": ("router_hidden: 8", "training_history.json", '{"steps": [{}]}'),
    "numbers": ("dataset_configs: {}", "history.jsonl", "1\n2\n"),
    "words": ("dataset_configs: {}", "history.jsonl", '{"step": "a", "loss": "b"}\n'),
    "bytes": ("dataset_configs: {}", "history.jsonl", "\udcff"),
}
WANTED = {"1e3": 1000, "'20'": 20, "many": None, "[1]": None, ".inf": None, "-1": None}


def test_a_damaged_history_or_number_of_steps_does_not_hide_the_others(tmp_path):
    for name, (mark, file, text) in DAMAGED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(mark)
        (tmp_path / name / file).write_text(text, errors="surrogateescape")
    for i, steps in enumerate(WANTED):
        (tmp_path / f"run-{i}").mkdir()
        text = f"dataset_configs: {{}}\nmax_steps: {steps}\n"
        (tmp_path / f"run-{i}/config.yaml").write_text(text)
    table = RunBrowser(tmp_path).table()
    assert (table.loc[list(DAMAGED), "steps"] == 0).all()
    found = [Run(tmp_path / f"run-{i}").wanted for i in range(len(WANTED))]
    assert found == list(WANTED.values()) and len(table) == len(DAMAGED) + len(WANTED)
