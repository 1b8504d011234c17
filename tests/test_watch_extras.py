"""Trackers and views that are extras: what is said without them, and that they work where they are installed."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.systems import layer_merge as lm, router
from merge_lab.systems.quantize import QuantizeConfig, run_quantize
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model, tiny_tokenizer
from merge_lab.training import check_report_to


@pytest.mark.parametrize("mode, account, says", [("online", False, "WANDB_MODE=offline"), ("online", True, None), ("offline", False, None)])
def test_a_tracker_without_an_account_is_refused_before_models_are_loaded(monkeypatch, mode, account, says):
    fake = SimpleNamespace(setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)), login=lambda prompt: account)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("merge_lab.training.get_available_reporting_integrations", lambda: ["wandb"])
    if says is None:
        return check_report_to("wandb")
    with pytest.raises(ValueError, match=says):
        check_report_to("wandb")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_missing_is_named_with_its_install_command(monkeypatch, name):
    monkeypatch.setattr("merge_lab.training.get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        check_report_to(name)


def test_treescope_shows_what_a_merge_is_made_of():
    treescope = pytest.importorskip("treescope")
    merger = Merger(tiny_experts("llama", n=2), MergerConfig(constrain_mode="sum1"))
    page = treescope.render_to_html(merger, compressed=False)
    for part in ("component 0", "sum1", "alphas of shape"):
        assert part in page


def short_pairs(folder, tracker):
    "Layers merged by pairs; returns how often it is told at least."
    lm.run(lm.LayerMergeConfig(**shortened(folder), merge_pairs=["1,2", "3,4"], num_steps=3, report_to=tracker, logging_steps=1), progress=False)
    return 3


def short_block(folder, tracker):
    "A learned block, healed: three stages in one process."
    lm.run(lm.LayerMergeConfig(
        **shortened(folder), n_pairs=2, strategy="block", hidden_steps=2, block_steps=2, block_rank=2, block_tries=1, heal_steps=2, report_to=tracker, logging_steps=1,
    ), progress=False)  # fmt: skip
    return 6


def shortened(folder) -> dict:
    save_tiny(tiny_model("llama", num_hidden_layers=6), folder / "model", tiny_tokenizer())
    (folder / "text.txt").write_text("\n\n".join(["The cat saw a small bird on the river road today ."] * 8))
    return dict(model_path=str(folder / "model"), output_dir=str(folder / "run"), data_dir=str(folder / "text.txt"), device="cpu")


def short_router(folder, tracker):
    "Routers of a quantised model."
    data = dict(dataset=["tasks"], seq_len=24, device="cpu")
    save_tiny(tiny_model("llama"), folder / "model", tiny_tokenizer())
    run_quantize(QuantizeConfig(str(folder / "model"), str(folder / "any"), num_examples=2, method="nearest", **data))
    router.run(router.RouterConfig(
        str(folder / "any"), save_dir=str(folder / "routers"), prefix_length=8, num_examples=8, num_validation=4, num_epochs=2, static=False, report_to=tracker, logging_steps=1, **data,
    ))  # fmt: skip
    return 2


RUNS = {"pairs": short_pairs, "block": short_block, "router": short_router}


@pytest.mark.parametrize("system", RUNS)
def test_trackio_is_told_of_every_step(tmp_path, system):
    "In a process of its own, for a tracker asks for its folder when it is imported."
    pytest.importorskip("trackio", reason="trackio is not installed")
    expected = told_apart(tmp_path, system, "trackio", TRACKIO_DIR=str(tmp_path / "told"))
    losses, names = [], set()
    for file in (tmp_path / "told").glob("*.db"):
        with sqlite3.connect(file) as held:
            for name, metrics in held.execute("select run_name, metrics from metrics"):
                names.add(name)
                losses += [value for key, value in json.loads(metrics).items() if key == "train/loss"]
    assert len(losses) >= expected and all(math.isfinite(loss) for loss in losses) and names


@pytest.mark.parametrize("system", RUNS)
def test_wandb_is_told_of_every_step_without_an_account(tmp_path, system):
    pytest.importorskip("wandb", reason="wandb is not installed")
    expected = told_apart(tmp_path, system, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path / "told"), WANDB_SILENT="true")
    files = list((tmp_path / "told").rglob("*.wandb"))
    assert files and sum(file.read_bytes().count(b"train/loss") for file in files) >= expected


def told_apart(folder, system: str, tracker: str, **environment) -> int:
    "Let a run tell a tracker, in a process of its own; how many losses there must be."
    (folder / "told").mkdir()
    code = f"import sys; from pathlib import Path; from test_watch_extras import RUNS; print(RUNS[{system!r}](Path(sys.argv[1]), {tracker!r}))"
    places = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=folder, check=False, env={**os.environ, "PYTHONPATH": places, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])
