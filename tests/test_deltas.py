"""What fine-tunes share stays as it is: coefficients of deltas, their learning rate, and the masks that are kept."""

import dataclasses
import logging

import pytest
import torch
from merge_lab.constraints import constrain
from merge_lab.held_out import Best, HeldOut
from merge_lab.loop_config import TrainConfig
from merge_lab.masks import blend
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.tinylm import tiny_experts, tiny_model
from merge_lab.training import delta_unit, held_out_facts, HistoryCallback, MergerTrainer, objective_of, training_arguments
from torch.testing import assert_close

MODES = ["scalar", "vector_input", "vector_output"]


def near_experts(scale, n=2, **config):
    "A base and experts that lie `scale` of its spread away from it."
    return tiny_model("llama", seed=0, **config), tiny_experts(
        "llama", n=n, scale=scale, **config
    )


def rows_of(n, length=10, vocab=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (n, length), generator=generator)
    return [{"input_ids": row, "source": i % 2} for i, row in enumerate(ids)]


def collate(rows):
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
    sources = torch.tensor([row["source"] for row in rows])
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, source=sources
    )


def trainer_of(merger, folder, held_out=True, rows=None, **options):
    options = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "save_steps": 0,
        "device": "cpu",
    } | options
    config = TrainConfig(**options)
    trainer = MergerTrainer(
        merger,
        training_arguments(config, folder),
        objective_of(config),
        held_out=HeldOut(rows_of(16, seed=1), collate) if held_out else None,
        train_dataset=rows or rows_of(64),
        data_collator=collate,
    )
    return trainer, HistoryCallback(folder / "history.jsonl").attach(trainer)


@pytest.mark.parametrize("with_base", [True, False])
def test_one_default_step_leaves_near_experts_what_they_were(tmp_path, with_base):
    "Deltas of a hundredth: the free form at its old rate multiplied the loss here."
    base, experts = near_experts(0.01)
    config = MergerConfig(base_model="base" if with_base else None)
    merger = Merger([*experts, base] if with_base else experts, config)
    held_out = HeldOut(rows_of(32, seed=1), collate)
    start = held_out(merger, Objective())["loss"]
    trainer, _ = trainer_of(merger, tmp_path, held_out=False, max_steps=1)
    trainer.train()
    assert held_out(merger, Objective())["loss"] <= 1.1 * start


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("anchor", [None, 2])
def test_any_step_of_the_masks_leaves_the_shared_part_alone(mode, anchor):
    "Whatever the masks do, weights that all components share come out as they are."
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    weights = [shared.clone() for _ in range(3)]
    weights[0][2:4] += 1
    shape = {"scalar": (), "vector_input": (6,), "vector_output": (8, 1)}[mode]
    masks = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    merged = blend(weights, constrain(masks, "delta", anchor=anchor))
    keep = torch.ones(8, dtype=torch.bool)
    keep[2:4] = False
    assert_close(merged[keep], shared[keep], rtol=0, atol=1e-12)


def test_with_a_base_the_coefficients_are_task_arithmetic():
    base, experts = near_experts(0.1)
    wanted = {
        name: tensor
        + sum(1.5 * (dict(e.named_parameters())[name] - tensor) for e in experts)
        for name, tensor in base.named_parameters()
    }
    wanted = {name: tensor.detach().clone() for name, tensor in wanted.items()}
    init = {"strategy": "uniform", "factors": [1.5, 1.5]}
    config = MergerConfig(base_model="base", mask_init=init)
    merged = Merger([*experts, base], config).merged_state_dict()
    for name, tensor in wanted.items():
        assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_base_is_held_as_a_component_but_is_none():
    base, experts = near_experts(0.1)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
    merger = Merger([*experts, base], MergerConfig(base_model="base"))
    assert merger.n_components == 2 == merger.alphas().component.nunique()
    with torch.no_grad(), merger.as_component(2):
        assert torch.equal(merger(input_ids=ids).logits, wanted)
    with pytest.raises(ValueError, match="component 3: expected 0 to 2"):
        merger.as_component(3)


def test_saved_masks_find_their_base(tmp_path):
    from merge_lab.tinylm import save_tiny

    base, experts = near_experts(0.1)
    for name, model in zip(("a", "b", "base"), (*experts, base)):
        save_tiny(model, tmp_path / name)
    paths = [str(tmp_path / name) for name in ("a", "b")]
    config = MergerConfig(paths, base_model=str(tmp_path / "base"), dtype="float32")
    merger = Merger.from_config(config)
    for _, leaf, key in merger.masked_parameters():
        leaf.set_alphas(key, [0.7, 0.6, -0.3])
    merger.save_pretrained(tmp_path / "masks")
    again = Merger.from_pretrained(tmp_path / "masks")
    assert again.names == ["a", "b"] and again.has_base
    for name, tensor in merger.merged_state_dict().items():
        assert torch.equal(tensor, again.merged_state_dict()[name])


def test_a_rate_that_is_far_too_large_ends_no_worse_than_it_began(tmp_path, caplog):
    base, experts = near_experts(0.1)
    merger = Merger([*experts, base], MergerConfig(base_model="base"))
    trainer, history = trainer_of(
        merger, tmp_path, learning_rate=50.0, warmup_steps=0, max_steps=16
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    best = trainer.keeper.best
    assert best.recoveries and "Back to the masks of step" in caplog.text
    held_out = HeldOut(rows_of(16, seed=1), collate)
    after = held_out(merger, Objective())["loss"]
    assert after == pytest.approx(best.loss, rel=1e-5) and after <= best.start
    found = held_out_facts(tmp_path)
    assert found["start"] == best.start and found["step"] == best.step
    assert history.frame().held_out_loss.notna().sum() == len(best.looks) - 1


def test_the_masks_that_are_kept_survive_a_resume(tmp_path):
    "Best masks, their loss and the halved rate are those of an uninterrupted run."

    def train(folder, **options):
        base, experts = near_experts(0.1)
        merger = Merger([*experts, base], MergerConfig(base_model="base"))
        return trainer_of(
            merger,
            tmp_path / folder,
            learning_rate=3.0,
            max_steps=12,
            save_steps=6,
            warmup_steps=0,
            **options,
        )[0]

    whole = train("whole")
    whole.train()
    assert whole.keeper.best.recoveries
    resumed = train("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.keeper.best.looks == whole.keeper.best.looks
    rates = [
        t.optimizer.param_groups[0]["initial_lr"]
        for t in (whole, resumed)
    ]
    assert rates[0] == rates[1] < 3.0
    for name, mask in whole.model.mask_state().items():
        assert torch.equal(mask, resumed.model.mask_state()[name])


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_the_unit_of_a_free_coefficient_is_the_size_of_the_deltas(scale):
    _, experts = near_experts(scale)
    merger = Merger(experts, MergerConfig(constrain_mode="identity"))
    size = sum(
        (a - b).square().sum().item() / 2
        for a, b in zip(*(e.parameters() for e in near_experts(scale)[1]))
    )
    whole = sum(
        p.square().sum().item() for e in near_experts(scale)[1] for p in e.parameters()
    )
    assert delta_unit(merger) == pytest.approx((size / whole) ** 0.5, rel=1e-3)


def test_a_bf16_blend_is_rounded_once():
    "Differences of a thousandth: the blend is that of fp32, rounded to bf16 at its end."
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(256, 256, generator=generator)
    weights = [
        (base + 1e-3 * torch.randn(256, 256, generator=generator)).bfloat16()
        for _ in range(2)
    ]
    weights.append(base.bfloat16())
    masks = torch.tensor([0.7, 0.6, 0.0])
    alphas = constrain(masks, "delta", anchor=2)
    exact = sum(a.double() * w.double() for a, w in zip(alphas, weights))
    merged = blend(weights, alphas)
    assert (merged == exact.bfloat16()).float().mean() > 0.99  # all but ties
    assert merged.dtype == torch.bfloat16


def test_a_loss_that_is_no_number_is_never_the_best():
    best = Best()
    best.note(0, {"loss": 1.0}, lambda: {"a": torch.zeros(1)})
    assert not best.note(1, {"loss": float("nan")}, dict)
    assert best.has_risen and best.step == 0


def test_the_old_default_stays_by_its_name(tmp_path):
    _, experts = near_experts(0.1)
    merger = Merger(experts, MergerConfig(constrain_mode="identity"))
    config = dataclasses.replace(TrainConfig(), learning_rate=2e-2)
    arguments = training_arguments(config, tmp_path)
    assert arguments.learning_rate == 2e-2 and not arguments.unit_rate
    assert merger.alphas()["mean"].eq(0.5).all()


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 3.0])
@pytest.mark.parametrize("with_base", [True, False])
def test_a_default_run_never_ends_above_its_start(tmp_path, scale, with_base):
    "From twins to deltas larger than the weights, with one learning rate."
    base, experts = near_experts(scale)
    config = MergerConfig(base_model="base" if with_base else None)
    merger = Merger([*experts, base] if with_base else experts, config)
    trainer, _ = trainer_of(merger, tmp_path, max_steps=24)
    assert trainer.args.learning_rate == 0.1
    trainer.train()
    best = trainer.keeper.best
    above = [look["loss"] > best.start for look in best.looks]
    assert best.recoveries == sum(above)  # each time it went back to its best masks
    held_out = HeldOut(rows_of(16, seed=1), collate)
    after = held_out(merger, Objective())["loss"]
    assert after == pytest.approx(best.loss, rel=1e-5, abs=1e-9) and after <= best.start


def test_another_objective_is_judged_anew(tmp_path):
    "What is adjusted in a pause changes what a loss means: no false way back."
    from transformers import TrainerCallback

    base, experts = near_experts(0.1)
    merger = Merger([*experts, base], MergerConfig(base_model="base"))
    trainer, _ = trainer_of(merger, tmp_path, max_steps=12)

    class Adjust(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.objective.losses = {"kl": 50.0}

    trainer.add_callback(Adjust())
    trainer.train()
    best = trainer.keeper.best
    assert best.looks[0]["step"] > 4 and best.start > 0.1  # of fifty times the loss
    assert best.loss <= best.start and best.towards["losses"] == {"kl": 50.0}


def test_masks_measured_from_something_else_are_refused(tmp_path):
    base, experts = near_experts(0.1)
    with_base = Merger([*experts, base], MergerConfig(base_model="base"))
    with_base.save_pretrained(tmp_path / "with")
    three = Merger(tiny_experts("llama", n=3), MergerConfig())
    with pytest.raises(ValueError, match="measured from a base, and those of this"):
        three.load_masks(tmp_path / "with")
    three.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="measured from the components' mean"):
        with_base.load_masks(tmp_path / "without")
    assert with_base.n_coefficients * 3 == sum(m.numel() for m in with_base.mask_state().values()) * 2


def adapted(n=2):
    "A base and experts that differ from it in linear layers only, as models of adapters do."
    from merge_lab.evaluation import UNIFORM, uniform_name

    base, experts = near_experts(0.05, n)
    for expert in experts:
        for name, parameter in expert.named_parameters():
            if "proj" not in name:
                parameter.data.copy_(base.get_parameter(name))
    merger = Merger([*experts, base], MergerConfig(["a", "b"], base_model="base"))
    assert uniform_name(merger) == UNIFORM  # what is equal everywhere is its own average
    return merger


def test_what_is_equal_everywhere_gets_no_mask():
    merger = adapted()
    names = [name for name, _, _ in merger.masked_parameters()]
    assert names and all("proj" in name for name in names)
    assert "model.embed_tokens.weight" in merger.idle and "model.norm.weight" in merger.idle
    twins = [tiny_model("llama", seed=0) for _ in range(2)]
    assert list(Merger(twins, MergerConfig(["a", "b"])).masked_parameters())  # all equal: it stays trainable


def test_masks_that_were_saved_when_equal_parameters_had_some_still_load():
    merger = adapted()
    masks = merger.mask_state()
    old = masks | {"model.norm.weight": torch.full((3, 32), 0.5)}
    merger.init_masks({"strategy": "odd_one_out", "selected_idx": 0})
    merger.load_mask_state(old)
    assert_close(merger.mask_state(), masks)
    with pytest.raises(ValueError, match="1 names differ"):
        merger.load_mask_state(masks | {"model.layers.9.mlp.up_proj.weight": torch.zeros(3, 32)})
