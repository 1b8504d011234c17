"Learning from few rows, and from what the models say themselves."

import dataclasses
import os
import signal

import pytest
import torch
from small_runs import small
from transformers import TrainerCallback

from merge_lab.run_folder import RunInterrupted
from merge_lab.systems.mask_merge import run


class Interrupt(TrainerCallback):
    "Ctrl-C in a step."

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def same_after_interruption(folder, **options):
    "The history of a run, which one that is interrupted and resumed repeats to the number."
    options = dict(save_merged=False, eval_samples=0, held_out_rows=4, max_steps=4) | options
    whole = run(small(folder / "whole", **options), progress=False)
    config = small(folder / "cut", **options)
    with pytest.raises(RunInterrupted):
        run(config, callbacks=(Interrupt(2),), progress=False)
    again = run(dataclasses.replace(config, resume=True), progress=False)
    names = [name for name in whole.history if name not in ("tokens_per_second", "memory_bytes")]
    assert whole.history[names].equals(again.history[names])
    masks = whole.merger.mask_state(), again.merger.mask_state()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    return whole


@pytest.mark.parametrize("loss", ["hidden", "hidden_cosine"])
def test_hidden_states_are_learned_and_a_run_resumes(loss, tmp_path):
    found = same_after_interruption(tmp_path, loss_func_name=loss, hidden_layers=[0, 2], teacher_cache_gb=0.1)
    assert found.held_out["loss"] < found.held_out["start"]


def test_a_layer_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"hidden_layers=\[9\]: expected 0 to"):
        run(small(tmp_path, hidden_layers=[9]))
