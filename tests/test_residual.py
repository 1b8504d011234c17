"A trained correction beside the coefficients: nothing at first, exported as it is, resumed, and able to leave what the components span."

import dataclasses

import pytest
import torch
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.leaves import masked_class
from merge_lab.masks import IMPLS, MergeState, MODES
from merge_lab.memory import estimate_memory
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.mergekit_export import scalar_alphas
from merge_lab.run_folder import bundled_path
from merge_lab.systems.mask_merge import run
from merge_lab.tinylm import perturb, tiny_model
from small_runs import small, stopping_at
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def merger_of(kind="llama", rank=3, dtype=torch.float32, n=2, more=None, **options):
    models = [tiny_model(kind, num_hidden_layers=2, dtype=dtype, **(more or {})) for _ in range(n)]
    for seed, model in enumerate(models):
        perturb(model, 0.2, seed)
    return Merger(models, MergerConfig(residual_rank=rank, **options))


def moved(merger, by=1.0):
    "The merger after something was learned."
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in merger.trained().values():
            tensor.add_(by * torch.randn(tensor.shape, generator=draw, dtype=torch.float32).to(tensor.dtype))
    return merger


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("impl", ["fused", "accurate", "efficient"])
def test_it_begins_as_the_blend_and_ends_as_what_is_exported(kind, impl, tmp_path):
    plain, merger = merger_of(kind, 0, impl=impl), merger_of(kind, 3, impl=impl)
    assert torch.equal(logits(merger), logits(plain))
    assert all(torch.equal(a, b) for a, b in zip(merger.merged_state_dict().values(), plain.merged_state_dict().values()))
    learned = logits(moved(merger, 0.1))
    kept = merger.mask_state()
    assert len(kept) > len(plain.mask_state())
    merger.save_merged(tmp_path)
    assert_close(logits(load_model(tmp_path, dtype="float32")), learned, rtol=0, atol=1e-5 if kind == "gpt2" else 2e-6)
    merger.state.keep_merged = True
    assert_close(logits(merger), learned, rtol=0, atol=2e-6)
    merger.init_masks({"strategy": "uniform"})
    assert_close(logits(merger), logits(plain), rtol=0, atol=1e-6)
    merger.load_mask_state(kept)
    assert_close(logits(merger), learned, rtol=0, atol=2e-6)
    with merger.as_component(1), plain.as_component(1):
        assert torch.equal(logits(merger), logits(plain))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_tables_and_the_head_have_none(tie):
    merger = moved(merger_of(more=dict(tie_word_embeddings=tie)), 0.1)
    named = {name.removesuffix(".left") for name in merger.trained() if name.endswith(".left")}
    assert named and all("proj" in name for name in named)
    assert merger.n_coefficients == sum(tensor.numel() for tensor in merger.trained().values())
    assert ("lm_head.weight" in merger.merged_state_dict()) != tie


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("turned", [False, True])
def test_its_gradient_is_that_of_finite_differences(mode, impl, turned):
    draw = torch.Generator().manual_seed(0)
    parts = [(Conv1D(5, 4) if turned else torch.nn.Linear(4, 5)).double() for _ in range(2)]
    for part in parts:
        for parameter in part.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    leaf = masked_class(parts[0])(parts, MergeState(impl), mode, "delta")
    leaf.add_residual(2, draw)
    values = {name: torch.randn(p.shape, generator=draw, dtype=torch.float64).requires_grad_() for name, p in leaf.named_parameters() if p.requires_grad}
    leaf.double()
    x = torch.randn(3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    assert {"factors.left", "factors.right", "masks.weight"} <= set(values)
    assert torch.autograd.gradcheck(lambda x, *given: torch.func.functional_call(leaf, dict(zip(values, given)), (x,)), (x, *values.values()))


def test_it_leaves_what_the_components_span():
    "The teacher is no blend of the components: coefficients stop short of it, a correction goes on."
    gaps = {}
    for rank in (0, 4):
        merger, target = merger_of(rank=rank), tiny_model("llama", num_hidden_layers=2)
        perturb(target, 0.3, 7)
        optimizer = torch.optim.Adam(merger.trained().values(), 0.1)
        wanted = logits(target).log_softmax(-1)
        for _ in range(60):
            found = merger(input_ids=IDS).logits.log_softmax(-1)
            loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        gaps[rank] = loss.item()
    assert gaps[4] < 0.8 * gaps[0], gaps


def test_a_run_that_is_cut_goes_on_to_the_same_result(tmp_path, monkeypatch):
    from merge_lab import training

    options = dict(residual_rank=2, max_steps=4, save_steps=2, eval_samples=0, report=False)
    whole = run(small(tmp_path / "whole", **options), progress=False)
    config = small(tmp_path / "cut", **options)
    own = training.MergerTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.MergerTrainer, "training_step", stopping_at(3, own))
        run(config, progress=False)
    resumed = run(dataclasses.replace(config, resume=True), progress=False)
    wanted, found = whole.merger.mask_state(), resumed.merger.mask_state()
    assert any(name.endswith(".left") and tensor.any() for name, tensor in wanted.items())
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    again = Merger.from_pretrained(whole.folder / "masks")
    assert all(torch.equal(wanted[name], tensor) for name, tensor in again.mask_state().items())
    ids = load_tokenizer(bundled_path("models/rewrite"))("Some words.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(load_model(whole.folder / "merged", dtype="float32")(ids).logits, again.float()(input_ids=ids).logits, rtol=0, atol=0.1)


def test_it_is_counted_and_refused_where_it_cannot_be(tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    without, held = (estimate_memory(model.config, 2, 16, 1, "float32", residual_rank=rank).parts["masks"] for rank in (0, 8))
    assert held > without
    with pytest.raises(ValueError, match="train_mode='layerwise' with residual_rank=2"):
        small(tmp_path, residual_rank=2, train_mode="layerwise", dry_run=True) and run(small(tmp_path, residual_rank=2, train_mode="layerwise"), progress=False)
    with pytest.raises(ValueError, match="residual_rank=3: no linear module"):
        merger_of(target_kinds=["norm"])
    with pytest.raises(ValueError, match="correction beside its coefficients"):
        scalar_alphas(merger_of(mode="scalar"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_in_16_bits_what_is_asked_is_what_is_exported(kind, tmp_path):
    "A correction as thin products beside a rounded blend is another model than one that is rounded as a whole."
    merger = moved(merger_of(kind, 3, torch.bfloat16), 0.3)
    merger.save_merged(tmp_path)
    assert_close(logits(load_model(tmp_path, dtype="bfloat16")), logits(merger), rtol=0, atol=0.02)


def test_a_correction_is_the_same_from_weights_of_another_dtype():
    coarse, fine = moved(merger_of(dtype=torch.bfloat16), 0.3), merger_of()
    fine.load_mask_state(coarse.mask_state())
    for name, leaf in coarse.leaves().items():
        if (told := leaf.residual()) is not None:
            assert torch.equal(told.dense(), fine.leaves()[name].residual().dense())


def test_starting_anew_draws_the_same_factors():
    merger = merger_of()
    before = merger.mask_state()
    moved(merger).init_masks({"strategy": "uniform"})
    assert all(torch.equal(before[name], tensor) for name, tensor in merger.mask_state().items() if name.endswith((".left", ".right")))


def test_factors_as_large_as_their_weights_are_told(caplog):
    merger_of(rank=4)
    assert "residual_rank" not in caplog.text
    merger_of(rank=1000)
    assert "residual_rank=1000: of 14 of 14 weights" in caplog.text
