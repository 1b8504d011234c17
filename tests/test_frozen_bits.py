"""Components in 8 or 4 bits: training sees nearly the same, and what is exported is exact."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from merge_lab.frozen_bits import CodedTensor, CodedWeights
from merge_lab.memory import estimate_memory, fit_report, track_memory, training_step
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.systems.mask_merge import MaskMergeConfig
from merge_lab.tinylm import perturb, save_tiny, tiny_config, tiny_experts, tiny_tokenizer

SHAPE = dict(hidden_size=64, num_hidden_layers=2, vocab_size=len(tiny_tokenizer()))


def mixtures(n):
    "Mixtures of experts, whose weights are three-dimensional."
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    first = MixtralForCausalLM(
        MixtralConfig(**SHAPE, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    )
    models = [copy.deepcopy(first) for _ in range(n)]
    for i, model in enumerate(models):
        perturb(model, 0.05, 1 + i)
    return models


def write(folder, architecture, dtype=torch.bfloat16, **shape):
    "Two fine-tunes and a base of one architecture."
    models = mixtures(3) if architecture == "mixtral" else tiny_experts(architecture, n=3, scale=0.05, **{**SHAPE, **shape})
    for name, model in zip(("one", "two", "base"), models):
        save_tiny(model.to(dtype), folder / name)
    return dict(model_paths=[str(folder / "one"), str(folder / "two")], base_model=str(folder / "base"))


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def stored(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


def moved(config):
    "A merger of the config whose masks are not where they started."
    merger, draw = Merger.from_config(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, leaf, key in merger.masked_parameters():
            leaf.masks[key] += 0.2 * torch.randn(leaf.masks[key].shape, generator=draw)
    return merger


def batch(vocab_size, n=2):
    ids = torch.randint(3, vocab_size, (n, 12), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, source=torch.arange(n) % 2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("base", ["mean", None])
def test_the_export_is_that_of_the_stored_weights(stored, bits, base, tmp_path):
    config = MergerConfig(**{**stored, **({"base_model": base} if base else {})})
    plain, coded = moved(config), moved(dataclasses.replace(config, frozen_bits=bits))
    assert any(isinstance(held, CodedWeights) for leaf in coded.leaves().values() for held in leaf.weights.values())
    wanted, found = plain.merged_state_dict(), coded.merged_state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    coded.save_merged(tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(wanted[name], tensor) for name, tensor in written.items() if name in wanted)
    coded.save_pretrained(tmp_path / "masks")
    again = Merger.from_pretrained(tmp_path / "masks")
    assert again.merger_config.frozen_bits == bits and again.merged_state_dict().keys() == wanted.keys()


@pytest.mark.parametrize("bits, near", [(8, 0.02), (4, 0.1)])
def test_blend_teachers_and_gradients_are_near_those_of_the_stored_weights(stored, bits, near):
    "Measured against how far the components are from the base; embedding, tied head, experts of a mixture and Conv1D included."
    config = MergerConfig(**stored, dtype="float32")
    plain, coded = moved(config), moved(dataclasses.replace(config, frozen_bits=bits))
    inputs = batch(plain.config.get_text_config().vocab_size)
    for i in (None, 0, 1):
        with torch.no_grad(), plain.as_component(i), coded.as_component(i):
            wanted, found = (merger(input_ids=inputs["input_ids"]).logits for merger in (plain, coded))
        with torch.no_grad(), plain.as_component(2), coded.as_component(2):
            base, coded_base = (merger(input_ids=inputs["input_ids"]).logits for merger in (plain, coded))
        apart = (wanted - base).norm()
        assert ((found - coded_base) - (wanted - base)).norm() < {8: 0.05, 4: 0.3}[bits] * apart
    gradients = []
    for merger in (plain, coded):
        merger.train()
        merger(**inputs, objective=Objective())["loss"].backward()
        gradients.append(torch.cat([mask.grad.flatten() for mask in merger.parameters() if mask.requires_grad]))
    assert torch.cosine_similarity(*gradients, dim=0) > 1 - near


@pytest.mark.parametrize("impl", ["fused", "accurate", "efficient"])
def test_every_impl_reads_codes(tmp_path, impl):
    config = MergerConfig(**write(tmp_path, "llama", torch.float32), impl=impl, frozen_bits=8)
    merger = moved(config)
    inputs = batch(merger.config.vocab_size)
    with torch.no_grad():
        one = merger(input_ids=inputs["input_ids"]).logits
        merger.state.keep_merged = True
        assert torch.allclose(one, merger(input_ids=inputs["input_ids"]).logits, atol=1e-4)
    merger.state.keep_merged = False
    merger.train()
    merger(**inputs, objective=Objective())["loss"].backward()
    assert all(mask.grad is not None for mask in merger.parameters() if mask.requires_grad)


def test_coded_components_take_what_the_estimate_says(tmp_path):
    "Two components without a base in 8 bits: about one bf16 model; with a base and 4 bits as well."
    paths = write(tmp_path, "llama", hidden_size=256, num_hidden_layers=4)
    for bits, base, most in ((8, "mean", 1.1), (4, paths["base_model"], 1.15)):
        config = MergerConfig(paths["model_paths"], base_model=base, frozen_bits=bits)
        merger = Merger.from_config(config)
        held = sum(p.numel() * p.element_size() for p in merger.parameters() if not p.requires_grad)
        model = sum(tensor.numel() * 2 for tensor in merger.merged_shapes().values())
        assert held < most * model
        merger.train()
        with track_memory(merger) as use:
            training_step(merger, batch(merger.config.vocab_size), Objective())
        n = 2 + (base != "mean")
        asked = dict(n_components=n, seq_len=12, batch_size=2, dtype="bfloat16", gradient_checkpointing=False, device="cpu")
        told = estimate_memory(paths["model_paths"][0], frozen_bits=bits, **asked)
        assert told.parts["components"] == pytest.approx(held, rel=0.02) and use.parts["components"] == pytest.approx(held, rel=0.02)


def test_what_does_not_fit_is_told_to_fit_in_8_bits():
    config = tiny_config("llama", hidden_size=256, num_hidden_layers=4)
    asked = dict(n_components=3, seq_len=16, device="cpu", frozen_bits=None)
    whole, coded = (estimate_memory(config, **{**asked, "frozen_bits": bits}).peak_bytes for bits in (None, 8))
    report = fit_report(config, int((whole + coded) / 2 / 0.95), **asked)
    assert not report.fits and report.remedy == {"frozen_bits": 8} and "frozen_bits=8" in str(report)


def test_codes_go_where_the_module_goes_and_stay_frozen(tmp_path):
    merger = Merger.from_config(MergerConfig(**write(tmp_path, "llama"), frozen_bits=8)).to("meta")
    assert {p.device.type for p in merger.parameters()} == {"meta"}
    held = merger.leaves()["model.layers.0.mlp.up_proj"].weights["weight"]
    assert isinstance(held[1], CodedTensor) and held[1].device.type == "meta" and not any(p.requires_grad for p in held.parameters())


def test_adapters_keep_their_factors(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    paths = write(tmp_path, "llama")
    for i in range(2):
        model = AutoModelForCausalLM.from_pretrained(paths["base_model"], dtype=torch.bfloat16)
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).save_pretrained(tmp_path / f"adapter-{i}")
    config = MergerConfig([str(tmp_path / f"adapter-{i}") for i in range(2)], base_model=paths["base_model"])
    plain, coded = moved(config), moved(dataclasses.replace(config, frozen_bits=8))
    wanted, found = plain.merged_state_dict(), coded.merged_state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_thin_deltas_and_frozen_bits_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="frozen_bits with thin_deltas"):
        Merger.from_config(MergerConfig(**write(tmp_path, "llama"), thin_deltas=True, frozen_bits=8))


def test_models_in_memory_cannot_be_exported_from_codes():
    merger = Merger(tiny_experts("llama", n=2), MergerConfig(frozen_bits=8, constrain_mode="identity"))
    with pytest.raises(ValueError, match="Give model_paths"):
        merger.merged_state_dict()


@pytest.mark.parametrize("option, value", [("shard", True), ("torch_compile", True)])
def test_what_does_not_go_together_is_refused(option, value):
    with pytest.raises(ValueError, match=f"frozen_bits.*{option}|{option}.*frozen_bits"):
        MaskMergeConfig(frozen_bits=8, **{option: value})


def test_two_models_of_8_billion_weights_fit_24_gib_at_8192_tokens():
    "By estimate: shapes of Llama-3.1-8B."
    from transformers import LlamaConfig

    shape = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=131072, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    assert estimate_memory(shape, n_components=2, seq_len=8192, frozen_bits=8).peak_bytes < 22 * 2**30


def test_a_teachers_head_is_decoded_once_for_all_chunks_of_tokens(monkeypatch):
    decoded, whole = [], CodedTensor.whole
    monkeypatch.setattr(CodedTensor, "whole", lambda tensor: (decoded.append(tensor.shape), whole(tensor))[1])
    merger = Merger(tiny_experts("llama", n=2), MergerConfig(frozen_bits=8))
    ids = torch.arange(36).view(4, 9)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, source=torch.arange(4) % 2)
    counts = []
    for size in (None, 4):
        decoded.clear()
        with torch.no_grad():
            Objective(fused=True, chunk_size=size)(merger, **batch)
        counts.append(len(decoded))
    assert counts[0] == counts[1]
