"""What training gives back when it goes wrong, and what it says before it begins."""

import dataclasses
import logging
import os
import resource
import signal
import time

import pytest
import torch
from transformers import TrainerCallback

from merge_lab import memory, training
from merge_lab.cli import main
from merge_lab.config import config_to_yaml
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import bundled_path, RunInterrupted
from merge_lab.systems.mask_merge import make_trainer, prepare, run, train
from merge_lab.teacher_cache import TeacherCache
from merge_lab.tinylm import tiny_experts
from merge_lab.training import StopCallback

from small_runs import SignalAt, small


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
    assert "does not fit into 15.00 MiB with 5% kept free. With " in caplog.text
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
    monkeypatch.setattr(memory, "_ESTIMATES", {})  # of runs before
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


def masks_and_taught(config, **callbacks):
    "Masks after a run, and how many samples were read by a component in it."
    taught = []
    ready, merger = prepare(config), Merger.from_config(config)
    merger.packs = False  # which rows share a line changes rounding
    hidden = merger.hidden

    def watched(input_ids, *others):
        taught.append(len(input_ids) * (merger.state.component is not None))
        return hidden(input_ids, *others)

    merger.hidden = watched
    trainer, _, stopper = make_trainer(merger, ready, progress=False, **callbacks)
    try:
        train(trainer, stopper, ready)
    except RunInterrupted:
        pass
    return merger.mask_state(), sum(taught)


def test_teachers_read_each_sample_once(tmp_path):
    options = dict(
        max_steps=24, per_device_train_batch_size=8, save_merged=False, held_out_rows=0
    )
    once, few = masks_and_taught(small(tmp_path / "kept", **options))
    always, many = masks_and_taught(
        small(tmp_path / "ran", teacher_cache_gb=0, **options)
    )
    assert (few, many) == (97, 193)  # one asks how the head makes logits
    assert not list((tmp_path / "kept").rglob("*.cache"))
    some, between = masks_and_taught(
        small(tmp_path / "short", teacher_cache_gb=2e-4, **options)
    )
    assert 97 < between < 193  # room for some samples
    for name, mask in always.items():
        torch.testing.assert_close(once[name], mask, atol=1e-4, rtol=0)
        torch.testing.assert_close(some[name], mask, atol=1e-4, rtol=0)


def test_a_run_goes_on_from_the_very_teachers_that_it_began_with(tmp_path):
    "Bit for bit, although samples meet in other batches in the second pass."
    options = dict(
        max_steps=24, per_device_train_batch_size=8, save_merged=False, held_out_rows=0
    )
    whole, _ = masks_and_taught(small(tmp_path / "whole", **options))

    config = small(tmp_path / "cut", **options)
    masks_and_taught(config, callbacks=(SignalAt(13),))
    kept = tmp_path / "cut" / "run" / "teachers-0.cache"
    with open(kept, "ab") as file:
        file.write(b"half a record, as a kill leaves it")
    resumed, ran = masks_and_taught(dataclasses.replace(config, resume=True))
    assert ran == 1 and not kept.exists()  # all samples were seen before the interruption
    assert all(torch.equal(mask, resumed[name]) for name, mask in whole.items())


def test_a_full_disk_does_not_end_a_run(tmp_path, caplog):
    merger = Merger(tiny_experts("llama", n=2), MergerConfig())
    cache = TeacherCache(tmp_path / "teachers.cache", merger)
    for size in (4, 4000):  # below and above what a file would buffer
        cache.add(b"%016d" % size, torch.ones(size, 8))
    held = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.files[0].end + 100, held[1]))
    try:
        cache.add(b"b" * 16, torch.ones(40, 8))
        for size in (4, 4000):
            assert torch.equal(cache.get(b"%016d" % size), torch.ones(size, 8))
        cache.add(b"c" * 16, torch.ones(1, 1))
        cache.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, held)
    assert caplog.text.count("Teachers read all others in every pass") == 1
    again = TeacherCache(cache.path, merger)
    assert again.get(b"b" * 16) is None and len(again) == 2
    nowhere = tmp_path / "file"
    nowhere.touch()
    cache = TeacherCache(nowhere / "teachers.cache", merger)
    cache.add(b"a" * 16, torch.ones(4, 8))
    assert cache.get(b"a" * 16) is None


def test_two_that_write_one_file_do_not_mix_up_their_teachers(tmp_path):
    merger = Merger(tiny_experts("llama", n=2), MergerConfig())
    both = [TeacherCache(tmp_path / "teachers.cache", merger) for _ in range(2)]
    keys = [b"a" * 16, b"b" * 16]
    for cache in both:
        cache.get(keys[0])
    for cache, key, value in zip(both, keys, (1.0, 2.0)):
        cache.add(key, torch.full((4, 8), value))
    for cache in both:
        for key, value in zip(keys, (1.0, 2.0)):
            found = cache.get(key)
            assert found is None or torch.equal(found, torch.full((4, 8), value))


def test_processes_read_what_the_others_kept(tmp_path):
    merger = Merger(tiny_experts("llama", n=2), MergerConfig())
    paths = [tmp_path / f"teachers-{rank}.cache" for rank in range(2)]
    one, two = (
        TeacherCache(path, merger, others=[p for p in paths if p != path])
        for path in paths
    )
    assert two.get(b"a" * 16) is None
    one.add(b"a" * 16, torch.ones(4, 8))
    assert torch.equal(two.get(b"a" * 16), torch.ones(4, 8)) and len(two) == 0


def test_a_cache_does_not_outlive_its_run(tmp_path):
    options = dict(
        max_steps=24, per_device_train_batch_size=8, save_merged=False, held_out_rows=0
    )
    config = small(tmp_path, **options)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    masks_and_taught(config, callbacks=(Stop(),))
    kept = tmp_path / "run" / "teachers-0.cache"
    assert kept.exists()
    options = dict(resume=True, teacher_cache_gb=0, max_steps=4)
    masks_and_taught(dataclasses.replace(config, **options))
    assert not kept.exists()


def test_a_signal_that_comes_twice_at_once_is_one_request():
    "A parent that is killed may send its signal once for each of its threads; somebody who asks again later means it."
    callback = StopCallback()
    callback.on_train_begin(None, None, None)
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert callback.requested.is_set()
        callback._asked -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    finally:
        callback.close()
