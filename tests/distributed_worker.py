"""What each process of tests/test_distributed.py does: `python distributed_worker.py FOLDER`, alone or under torchrun."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_group

from merge_lab.devices import full
from merge_lab.distributed import frozen_bytes, shard_merger, wrapper_of
from merge_lab.loop_config import TrainConfig
from merge_lab.memory import training_step
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_tokenizer
from merge_lab.training import MergerTrainer, training_arguments

torch.set_num_threads(1)
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
folder = Path(sys.argv[1])
paths = [folder / f"component-{i}" for i in range(2)]
config = MergerConfig([str(p) for p in paths], mode="vector_input")
facts = {"world": WORLD}


def rows(n=8, length=12):
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        ids = torch.randint(3, 64, (length,), generator=generator)
        labels = ids.clone()
        labels[: 2 + i % 3] = -100  # unequal numbers of scored tokens
        yield dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=labels,
            source=torch.tensor(i % 2),
        )


def gradients(merger):
    return {
        name: full(leaf.masks[key].grad)
        for name, leaf, key in merger.masked_parameters()
    }


def trainer_run():
    options = TrainConfig(
        max_steps=3,
        per_device_train_batch_size=4 // WORLD,
        device="cpu",
        save_steps=0,
        logging_steps=1000,
        optim="sgd",  # Adam divides a gradient by its own size, and where that is rounding, rounding decides
        learning_rate=3.0,
        warmup_steps=0,
    )
    arguments = training_arguments(
        options, folder / f"trainer-{WORLD}", ddp_backend="gloo" if WORLD > 1 else None
    )
    trainer = MergerTrainer(
        Merger.from_config(config), arguments, Objective(), train_dataset=list(rows())
    )
    seen = []
    whole = trainer.compute_loss
    trainer.compute_loss = lambda model, *a, **k: (
        seen.append(wrapper_of(model)),
        whole(model, *a, **k),
    )[1]
    trainer.train()
    facts["trainer_wrapper"] = seen[0]
    return trainer.accelerator.unwrap_model(trainer.model).mask_state()


def sharded_run():
    merger = Merger.from_config(config)
    facts["bytes_whole"] = frozen_bytes(merger)
    if WORLD > 1:
        shard_merger(merger, dist.init_device_mesh("cpu", (WORLD,)))
    facts["wrapper"], facts["bytes"] = wrapper_of(merger), frozen_bytes(merger)
    samples = list(rows())
    mine = samples[RANK::WORLD]
    batch = {name: torch.stack([row[name] for row in mine]) for name in mine[0]}
    scored = sum(int((row["labels"][1:] != -100).sum()) for row in samples)
    results = merger(
        **batch, objective=Objective(fused=True), num_items_in_batch=scored
    )
    (results["loss"] * WORLD).backward()  # gradients are averaged over the ranks
    found = gradients(merger)
    # not Adam: its first step divides a gradient by itself, rounding and all
    torch.optim.SGD([p for p in merger.parameters() if p.requires_grad], lr=0.1).step()
    merger.save_pretrained(folder / f"saved-{WORLD}", is_main_process=RANK == 0)
    merger.save_merged(folder / f"merged-{WORLD}", is_main_process=RANK == 0)
    if WORLD > 1:
        dist.barrier()
        again = shard_merger(
            Merger.from_config(config), dist.init_device_mesh("cpu", (WORLD,))
        )
        again.load_masks(folder / f"saved-{WORLD}")
        same = [
            torch.equal(a, b)
            for a, b in zip(merger.mask_state().values(), again.mask_state().values())
        ]
        facts["resumed"] = all(same)
    return found


def gathered_bytes(merger):
    "Bytes of parameters that are whole on this rank at this moment."
    states = [m._get_fsdp_state() for m in merger.modules() if isinstance(m, FSDPModule)]
    params = [p for state in states for p in state._fsdp_param_group.fsdp_params]
    return sum(t.untyped_storage().nbytes() for p in params for t in p.all_gather_outputs)


def largest_gathered(**shape):
    "Of a step: wherever what arrived in one piece is copied to its tensors."
    found, copy_out = [], fsdp_group.foreach_all_gather_copy_out
    merger = Merger(tiny_experts("llama", n=2, **shape), MergerConfig())
    shard_merger(merger, dist.init_device_mesh("cpu", (WORLD,)))

    def watched(result, *others):
        copy_out(result, *others)
        piece = result.all_gather_output.untyped_storage().nbytes()
        found.append(piece + gathered_bytes(merger))

    fsdp_group.foreach_all_gather_copy_out = watched
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in next(rows())}
    training_step(merger, batch, Objective(fused=True))
    fsdp_group.foreach_all_gather_copy_out = copy_out
    return max(found)


if WORLD == 1:
    for path, model in zip(paths, tiny_experts("llama", n=2)):
        save_tiny(model, path, tiny_tokenizer())
masks = trainer_run()
if WORLD > 1 and not dist.is_initialized():
    dist.init_process_group("gloo")
found = sharded_run()
if WORLD > 1:
    facts["gathered"] = {
        "deep": largest_gathered(num_hidden_layers=6),
        "wide": largest_gathered(num_hidden_layers=3, vocab_size=4096),
    }
if RANK == 0:
    torch.save({"masks": masks, "gradients": found}, folder / f"tensors-{WORLD}.pt")
    (folder / f"facts-{WORLD}.json").write_text(json.dumps(facts))
if WORLD > 1:
    dist.barrier()
    dist.destroy_process_group()
