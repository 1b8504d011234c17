"Masks that are trained one decoder layer after another."

import dataclasses
import itertools
import random
import signal

import pytest
import torch
from small_runs import small, stopping_at
from test_architectures import BATCH, LEFT_OUT, family
from torch.testing import assert_close
from transformers import TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from merge_lab import layerwise
from merge_lab.checkpoints import component_bytes
from merge_lab.layerwise import LAYERS, SingleLayers, check_single_layers
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import RunInterrupted, read_rows
from merge_lab.systems.mask_merge import prepare, run

NOT_BY_LAYER = {"gemma3n_text", "xlnet"}  # states that pass beside the layers; two streams
BY_DEFAULT = {"llama", "gpt2", "gemma2", "gemma3_text", "mixtral", "phi", "gpt_neox", "qwen3", "gpt_oss", "mamba2", "falcon", "bloom", "opt", "t5gemma", *NOT_BY_LAYER}
MASK = torch.ones_like(BATCH["input_ids"])


def kinds():
    names = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(LEFT_OUT))
    return [pytest.param(kind, marks=[] if kind in BY_DEFAULT else pytest.mark.slow) for kind in names]


@pytest.mark.parametrize("kind", kinds())
def test_layers_one_after_the_other_are_the_model_or_it_is_refused(kind):
    merger = Merger(family(kind), MergerConfig())
    try:
        layers = SingleLayers(merger.model)
        check_single_layers(layers, BATCH["input_ids"], MASK)
    except ValueError as error:
        assert ("Train end to end" in str(error) or "one nn.ModuleList" in str(error)) and kind not in BY_DEFAULT - NOT_BY_LAYER
        return
    assert kind not in NOT_BY_LAYER
    with torch.no_grad():
        states, rest = layers.given(BATCH["input_ids"], MASK)
        for number in range(len(layers.layers)):
            states = layers.run(number, states, rest)
        finished = layers.finish(states, BATCH["input_ids"], MASK)
        assert_close(finished, layers.decoder(input_ids=BATCH["input_ids"], attention_mask=MASK, use_cache=False).last_hidden_state, rtol=1e-5, atol=1e-5)


def by_layer(folder, **options):
    return small(folder, **dict(train_mode="layerwise", layer_steps=8, per_device_train_batch_size=16, learning_rate=0.1, save_merged=False, eval_samples=0) | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing disturbed, and its folder."
    folder = tmp_path_factory.mktemp("whole")
    return run(by_layer(folder), progress=False), folder / "run"


def test_a_run_gets_nearer_to_both_and_leaves_nothing_but_its_result(whole):
    result, folder = whole
    assert result.held_out["loss"] < 0.95 * result.held_out["start"]
    rows = read_rows(folder / "history.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 33)) and [row["layer"] for row in rows] == sorted(8 * list(range(4)))
    assert sorted(path.name for path in (folder / LAYERS).iterdir()) == ["best.json", "best_masks.safetensors", "done.json", "masks-4.safetensors"]


def test_a_step_in_parts_is_no_larger_step(tmp_path):
    "The gap that a step tells is the mean of its forward passes, not their sum."
    parts = [dict(per_device_train_batch_size=16), dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)]
    gaps = [run(by_layer(tmp_path / str(n), layer_steps=1, held_out_rows=0, **options), progress=False).history.loss for n, options in enumerate(parts)]
    assert ((gaps[1] / gaps[0] - 1).abs() < 0.3).all(), gaps


@pytest.mark.parametrize("call", random.Random(0).sample(range(1, 40), 4))
def test_a_run_that_broke_off_goes_on_to_the_same_masks(call, whole, tmp_path, monkeypatch):
    calls, own = [], layerwise.go_on

    def breaks_off(*args):
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("planted")
        own(*args)

    monkeypatch.setattr(layerwise, "go_on", breaks_off)
    config = by_layer(tmp_path)
    try:
        run(config, progress=False)
    except RuntimeError as error:
        assert str(error) == "planted"
        monkeypatch.setattr(layerwise, "go_on", own)
        run(dataclasses.replace(config, resume=True), progress=False)
    masks, wanted = (Merger.from_pretrained(folder / "masks").mask_state() for folder in (tmp_path / "run", whole[1]))
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted)
    columns = ("step", "layer", "loss")
    assert [[row[c] for c in columns] for row in read_rows(tmp_path / "run" / "history.jsonl")] == [[row[c] for c in columns] for row in read_rows(whole[1] / "history.jsonl")]


def test_a_signal_stops_it_and_says_how_to_go_on(whole, tmp_path, monkeypatch):
    own = layerwise.train_from

    def asked_to_stop(trainer, checkpoint):
        if trainer.model.number == 2 and checkpoint is None:
            class Asks(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step == 2:
                        signal.raise_signal(signal.SIGTERM)

            trainer.callback_handler.callbacks.insert(0, Asks())
        own(trainer, checkpoint)

    monkeypatch.setattr(layerwise, "train_from", asked_to_stop)
    with pytest.raises(RunInterrupted, match="^stopped in layer 3 of 4; 2 of 4 layers are done.*--resume"):
        run(by_layer(tmp_path), progress=False)
    run(by_layer(tmp_path, resume=True), progress=False)
    masks, wanted = (Merger.from_pretrained(folder / "masks").mask_state() for folder in (tmp_path / "run", whole[1]))
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted)


def test_steps_through_the_whole_model_may_follow(whole, tmp_path):
    result = run(by_layer(tmp_path, finish_steps=6), progress=False)
    assert len(result.history) == 6 and len(read_rows(tmp_path / "run" / LAYERS / "history.jsonl")) == 32
    assert result.held_out["start"] == pytest.approx(whole[0].held_out["loss"]) and result.held_out["loss"] < result.held_out["start"]


def test_a_run_that_is_cut_between_its_two_parts_sees_the_same_rows(tmp_path, monkeypatch):
    options = dict(finish_steps=3, layer_steps=2, per_device_train_batch_size=1)
    wanted = run(by_layer(tmp_path / "whole", **options), progress=False).merger.mask_state()
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "_told_best", stopping_at(1, layerwise._told_best))
        with pytest.raises(KeyboardInterrupt):
            run(by_layer(tmp_path, **options), progress=False)
    masks = run(by_layer(tmp_path, resume=True, **options), progress=False).merger.mask_state()
    assert all(torch.equal(masks[name], mask) for name, mask in wanted.items())


def test_steps_that_are_too_large_are_taken_back_and_halved(tmp_path):
    result = run(by_layer(tmp_path, learning_rate=1.0), progress=False)
    rows = read_rows(tmp_path / "run" / "history.jsonl")
    tops = {layer: max(row["learning_rate"] for row in rows if row["layer"] == layer) for layer in range(4)}
    assert len(rows) == 32 and min(tops.values()) <= 0.5 and result.held_out["loss"] <= result.held_out["start"]


def test_a_layer_that_no_try_helps_is_told(tmp_path, caplog, monkeypatch):
    gaps = itertools.count()
    monkeypatch.setattr(layerwise, "gap_of", lambda one, streams: float(next(gaps)))  # each is worse than the one before
    result = run(by_layer(tmp_path, learning_rate=1.0, layer_steps=1), progress=False)
    told = [record.getMessage() for record in caplog.records if "no try out of 4" in record.getMessage()]
    assert len(told) == 4 and "layer 3" in told[3]
    start = Merger.from_config(result.merger.merger_config).mask_state()
    assert all(torch.equal(mask, result.merger.mask_state()[name]) for name, mask in start.items())


def test_masks_that_got_worse_are_not_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(layerwise, "gap_of", lambda one, streams: 0.0)  # nothing is taken back within a layer
    result = run(by_layer(tmp_path, learning_rate=1.0), progress=False)
    start = Merger.from_config(result.merger.merger_config).mask_state()
    assert "The start is kept" in caplog.text and result.held_out["step"] == 0
    assert all(torch.equal(mask, result.merger.mask_state()[name]) for name, mask in start.items())


def test_what_means_nothing_is_refused_and_the_estimate_is_of_one_layer(tmp_path):
    for name, value in dict(shard=True, torch_compile=True, mask_decay=0.1).items():
        with pytest.raises(ValueError, match="train_mode='layerwise'"):
            by_layer(tmp_path, **{name: value})
    peaks = [prepare(by_layer(tmp_path, train_mode=mode)).memory.tried[0][1].peak_bytes for mode in ("layerwise", "end_to_end")]
    assert peaks[0] < 0.75 * peaks[1]


def test_on_a_gpu_all_layers_are_counted_unless_they_are_offloaded(tmp_path):
    config = by_layer(tmp_path)
    held, away = (layerwise.fit_layers(dataclasses.replace(config, offload=offload), 64, "cuda", 2**40).tried[0][1].parts["components"] for offload in (False, True))
    models = [*config.model_paths, *([config.base_model] if config.base_model else [])]
    assert away == 0 and held == pytest.approx(sum(component_bytes(path, config.dtype) for path in models), rel=0.02)
