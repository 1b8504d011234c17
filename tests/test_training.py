"""What training gives back when it goes wrong, and what it says before it begins."""

import logging
import signal
import time

import pytest
import torch
from transformers import TrainerCallback

from merge_lab import memory, training
from merge_lab.cli import main
from merge_lab.core import bundled_path, config_to_yaml
from merge_lab.merger import Merger
from merge_lab.systems.mask_merge import demo_config, make_trainer, prepare, run


def small(tmp_path, **options):
    tasks = ("rewrite", "summarize")
    defaults = dict(
        dataset_configs={str(bundled_path(f"tasks/{task}")): 48 for task in tasks},
        max_steps=6,
        eval_samples=4,
        per_device_train_batch_size=4,
        report=False,
    )
    return demo_config(output_dir=str(tmp_path / "run"), **{**defaults, **options})


class Poison(TrainerCallback):
    "Makes one mask NaN before a step, and keeps the masks of the step before."

    def __init__(self, merger, step):
        self.merger, self.step, self.good = merger, step, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.good = self.merger.mask_state()
            leaf = self.merger.leaves()["model.layers.1.mlp.up_proj"]
            with torch.no_grad():
                leaf.masks["weight"][0, 0] = float("nan")


@pytest.mark.parametrize("with_history", [True, False])
def test_nan_keeps_the_masks_of_the_last_finite_loss(tmp_path, with_history):
    config = small(tmp_path, save_merged=False)
    ready, merger = prepare(config), Merger.from_config(config)
    trainer, history, _ = make_trainer(merger, ready, progress=False)
    if not with_history:
        trainer.remove_callback(history)
    seen = []

    class Remember(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(merger.mask_state())

    trainer.add_callback(Remember())
    trainer.add_callback(Poison(merger, 4))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        FloatingPointError, match="up_proj.*last finite loss are in .*last-good-masks"
    ):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before  # Ctrl-C works again
    for name, mask in merger.mask_state().items():
        assert torch.equal(mask, seen[3][name]), name  # the loss of step 4 was finite
        assert name not in seen[0] or not mask.isnan().any()
    assert (ready.folder / "last-good-masks" / "masks.safetensors").exists()


def test_a_run_that_will_not_fit_is_told_before_it_begins(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(memory, "free_memory", lambda device=None: 15 * 2**20)
    with caplog.at_level(logging.WARNING):
        ready = prepare(small(tmp_path, per_device_train_batch_size=256))
    assert "does not fit into 15.00 MiB. With " in caplog.text
    assert ready.recompute  # was left open, so it is chosen where memory is short
    chosen = small(
        tmp_path, per_device_train_batch_size=256, gradient_checkpointing=False
    )
    assert not prepare(chosen).recompute


def test_an_architecture_that_cannot_be_traced_is_merged_all_the_same(
    tmp_path, monkeypatch, caplog
):
    def fail(*args, **kwargs):
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(memory, "estimate_memory", fail)
    config = small(tmp_path, save_merged=False, max_steps=1)
    assert len(run(config, progress=False).history) == 1
    assert "could not be estimated: no fake kernel" in caplog.text


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(config_to_yaml(small(tmp_path)), encoding="utf-8")
    assert main(["mask-merge", str(file), "--dry_run"]) == 0
    assert "It fits into" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_memory_command_looks_at_every_path_and_says_when_it_does_not_fit(capsys):
    model = str(bundled_path("models/rewrite"))
    tight = ["--device", "cpu", "--seq_len", "256", "--budget_gib", "0.001"]
    assert main(["memory", model, model, *tight]) == 1
    assert "no option makes it fit" in capsys.readouterr().out
    assert main(["memory", model, "nowhere", "--device", "cpu"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_pause_is_not_counted_as_work(tmp_path):
    class Pause(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                time.sleep(1)

    config = small(tmp_path, save_merged=False, max_steps=4)
    rates = run(config, callbacks=(Pause(),), progress=False).history.tokens_per_second
    assert rates[2] > 0.3 * rates.median()


def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match="wandb is not installed"):
        prepare(small(tmp_path, report_to="wandb"))
