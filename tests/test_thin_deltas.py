"""Merged LoRAs are held as a base plus thin factors; what is merged is the same to rounding."""

import dataclasses

import pytest
import torch

from merge_lab.thin_deltas import find_low_rank
from merge_lab.factors import FactoredWeights
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.thin_deltas import rounding_energy
from merge_lab.tinylm import perturb, save_tiny, tiny_model, tiny_tokenizer

SHAPE = dict(hidden_size=64, num_hidden_layers=2, vocab_size=len(tiny_tokenizer()))


@pytest.fixture(scope="module", params=[("llama", torch.bfloat16), ("gpt2", torch.float32), ("qwen2", torch.float16)], ids=lambda each: each[0])
def merged_loras(request, tmp_path_factory):
    "A base, two LoRAs that peft has merged into it, and a fine-tune of all weights."
    from peft import LoraConfig, get_peft_model

    folder, (architecture, dtype) = tmp_path_factory.mktemp("thin"), request.param
    save_tiny(tiny_model(architecture, **SHAPE).to(dtype), folder / "base")
    for i in range(2):
        torch.manual_seed(i)
        model = get_peft_model(tiny_model(architecture, **SHAPE).to(dtype), LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights=False))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.05)
        save_tiny(model.merge_and_unload(), folder / f"lora-{i}")
    whole = tiny_model(architecture, **SHAPE)
    perturb(whole, 0.05, 3)
    save_tiny(whole.to(dtype), folder / "whole")
    return folder


def factored(merger):
    "Parameters that are held as factors."
    return [(name, key) for name, leaf in merger.leaves().items() for key, held in leaf.weights.items() if isinstance(held, FactoredWeights)]


def pair(folder, names, base):
    "The merger as it comes, and with whole weights, both with the same masks off their start."
    config = MergerConfig([str(folder / name) for name in names], base_model=str(folder / base) if base != "mean" else base, thin_deltas=True)
    thin, whole = Merger.from_config(config), Merger.from_config(dataclasses.replace(config, thin_deltas=False))
    draw, masks = torch.Generator().manual_seed(0), whole.mask_state()
    masks = {name: mask + 0.2 * torch.randn(mask.shape, generator=draw) for name, mask in masks.items()}
    for merger in (thin, whole):
        merger.load_mask_state(masks)
    return thin, whole


@pytest.mark.parametrize("base", ["base", "mean"])
def test_a_merge_of_merged_loras_is_the_same_to_rounding_in_less_memory(merged_loras, base):
    thin, whole = pair(merged_loras, ["lora-0", "lora-1"], base)
    assert factored(thin) and not factored(whole)
    sizes = [sum(p.numel() for name, p in merger.named_parameters() if not p.requires_grad and "wte" not in name and "embed" not in name) for merger in (thin, whole)]
    assert sizes[0] < 0.75 * sizes[1]
    wanted, found = whole.merged_state_dict(), thin.merged_state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        lost = (tensor.double() - found[name].double()).square().sum().item()
        assert lost <= 12 * rounding_energy(tensor), name  # of each component, of the base, of the blend
    ids, logits = torch.arange(3, 15).unsqueeze(0), []
    for merger in (thin.float(), whole.float()):
        for i in (None, 0, 1):
            with torch.no_grad(), merger.as_component(i):
                logits.append(merger(input_ids=ids).logits)
    apart = (logits[4] - logits[5]).norm()  # of the two components
    for found, wanted in zip(logits[:3], logits[3:]):
        assert (found - wanted).norm() < (0.15 if tensor.dtype == torch.bfloat16 else 0.02) * apart


def test_gradients_agree(merged_loras):
    mergers = pair(merged_loras, ["lora-0", "lora-1"], "base")
    ids = torch.arange(3, 27).view(2, 12)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, source=torch.arange(2))
    gradients = []
    for merger in mergers:
        merger.float().train()
        merger(**batch, objective=Objective())["loss"].backward()
        gradients.append(torch.cat([leaf.masks[key].grad[:2].flatten() for name, leaf, key in merger.masked_parameters() if name in mergers[1].mask_state()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.995


def test_a_fine_tune_of_all_weights_beside_a_merged_lora_stays_whole(merged_loras):
    thin, whole = pair(merged_loras, ["lora-0", "whole"], "base")
    for name, key in factored(thin):
        assert list(thin.leaves()[name].weights[key].scales) == [0]
    with torch.no_grad(), thin.as_component(1), whole.as_component(1):
        ids = torch.arange(3, 15).unsqueeze(0)
        assert torch.equal(thin(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_masks_are_read_back(merged_loras, tmp_path):
    thin, _ = pair(merged_loras, ["lora-0", "lora-1"], "base")
    thin.save_pretrained(tmp_path)
    again = Merger.from_pretrained(tmp_path)
    assert factored(again) == factored(thin)
    wanted, found = thin.merged_state_dict(), again.merged_state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_an_adapter_beside_a_merged_lora_stays_what_it_is(tmp_path):
    "Its own factors are not replaced by those by which its base differs from another."
    from peft import LoraConfig, get_peft_model

    save_tiny(tiny_model("llama", **SHAPE), tmp_path / "base")
    for i in range(2):
        torch.manual_seed(i)
        model = get_peft_model(tiny_model("llama", **SHAPE), LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", base_model_name_or_path=str(tmp_path / "base")))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.05)
        model.save_pretrained(tmp_path / "adapter") if i else save_tiny(model.merge_and_unload(), tmp_path / "lora-0")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tmp_path / "base"}"'))
    thin, whole = pair(tmp_path, ["lora-0", "adapter"], "mean")
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad(), thin.as_component(1), whole.as_component(1):
        assert torch.allclose(thin(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-4)


def test_one_weight_that_was_changed_beside_a_merged_lora_is_not_taken_for_rounding():
    draw = torch.Generator().manual_seed(0)
    base = (0.1 * torch.randn(768, 512, generator=draw)).bfloat16()
    lora = 0.01 * torch.randn(768, 4, generator=draw) @ torch.randn(4, 512, generator=draw)
    weight = (base.float() + lora).bfloat16()
    assert len(find_low_rank(weight, base).down) == 4
    weight[5, 7] += 0.03  # a third of what weights are in the mean, sixty times its rounding
    found = find_low_rank(weight, base)
    assert found is None or abs((base.float() + found.dense().float() - weight.float())[5, 7]) < 0.01
