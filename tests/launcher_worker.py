"""Training as a notebook starts it: a function handed to accelerate's launchers. `python launcher_worker.py FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate import debug_launcher, notebook_launcher

from merge_lab.loop_config import TrainConfig
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_tokenizer
from merge_lab.training import MergerTrainer, training_arguments

torch.set_num_threads(1)


def train(folder: str, processes: int):
    "What a notebook's cell defines."
    rows = [
        dict(
            input_ids=torch.arange(3 + i, 15 + i),
            attention_mask=torch.ones(12, dtype=torch.long),
            labels=torch.arange(3 + i, 15 + i),
            source=torch.tensor(i % 2),
        )
        for i in range(8)
    ]
    options = TrainConfig(
        max_steps=2,
        per_device_train_batch_size=4 // processes,
        device="cpu",
        save_steps=0,
        max_grad_norm=0.0,
        optim="sgd",  # Adam divides by the size of a gradient, and where that is rounding, rounding decides
        learning_rate=1.0,
        warmup_steps=0,
    )
    paths = [f"{folder}/component-{i}" for i in range(2)]
    merger = Merger.from_config(MergerConfig(paths))
    arguments = training_arguments(options, f"{folder}/run-{processes}")
    trainer = MergerTrainer(merger, arguments, Objective(), train_dataset=rows)
    trainer.train()
    assert trainer.args.world_size == processes
    trainer.save_model(f"{folder}/masks-{processes}")


if __name__ == "__main__":
    folder = sys.argv[1]
    for i, model in enumerate(tiny_experts("llama", n=2)):
        save_tiny(model, Path(folder) / f"component-{i}", tiny_tokenizer())
    # without GPUs notebook_launcher starts one process, this one; its twin for CPUs starts several
    debug_launcher(train, (folder, 2), num_processes=2)
    notebook_launcher(train, (folder, 1), num_processes=1)
