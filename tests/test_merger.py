"""Properties of the merger across architectures, modes, constraints and dtypes."""

import subprocess
import sys
from itertools import chain

import pytest
import torch
from torch.testing import assert_close

from merge_lab import masks
from merge_lab.components import load_model
from merge_lab.constraints import CONSTRAINTS
from merge_lab.masks import IMPLS, MODES
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model
from merge_lab.training import compiled_layers

ARCHITECTURES = {
    "llama": dict(architecture="llama", tie_word_embeddings=False),
    "llama-tied": dict(architecture="llama", tie_word_embeddings=True),
    "qwen2": dict(architecture="qwen2"),
    "gpt2": dict(architecture="gpt2"),
    "gemma2": dict(architecture="gemma2"),
}
IDS = torch.tensor([[1, 5, 9, 13, 7, 21], [1, 8, 3, 40, 2, 11]])


def merger_of(name, n=2, dtype=torch.float32, **options):
    return Merger(
        tiny_experts(n=n, dtype=dtype, **ARCHITECTURES[name]), MergerConfig(**options)
    )


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_hot_is_the_component(architecture, dtype):
    experts = tiny_experts(n=3, dtype=dtype, **ARCHITECTURES[architecture])
    wanted = [logits_of(expert) for expert in experts]
    merger = Merger(experts, MergerConfig())
    for i in range(3):
        merger.init_masks({"strategy": "odd_one_out", "selected_idx": i})
        assert torch.equal(logits_of(merger), wanted[i])
        with merger.as_component(i):
            assert torch.equal(logits_of(merger), wanted[i])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constrain_mode", CONSTRAINTS)
def test_identical_components_give_themselves_back(architecture, mode, constrain_mode):
    model = tiny_model(**ARCHITECTURES[architecture])
    wanted = logits_of(model)
    twins = [tiny_model(**ARCHITECTURES[architecture]) for _ in range(2)]
    merger = Merger(twins, MergerConfig(mode=mode, constrain_mode=constrain_mode))
    assert_close(logits_of(merger), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_impls_agree_in_value_and_gradient(architecture, mode):
    found = {}
    for impl in IMPLS:
        merger = merger_of(architecture, mode=mode, impl=impl, mask_init={"strategy": "random"})
        masks = [p for p in merger.parameters() if p.requires_grad]
        logits = merger(input_ids=IDS).logits
        found[impl] = [logits, *torch.autograd.grad(logits.log_softmax(-1)[..., 3].mean(), masks)]
    for impl in ("efficient", "fused"):
        for got, wanted in zip(found[impl], found["accurate"]):
            assert_close(got, wanted, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("untie", [False, True])
def test_exported_is_trained(architecture, mode, untie, tmp_path):
    paths = []
    for i, expert in enumerate(tiny_experts(n=2, **ARCHITECTURES[architecture])):
        paths.append(str(save_tiny(expert, tmp_path / f"expert{i}")))
    config = MergerConfig(paths, mode=mode, untie_embeddings=untie)
    merger = Merger.from_config(config)
    with torch.no_grad():
        for mask in merger.parameters():
            if mask.requires_grad:
                mask.add_(0.2 * torch.randn(mask.shape, generator=torch.manual_seed(3)))
    merger.save_merged(tmp_path / "merged", max_shard_size="20KB")
    merged = load_model(tmp_path / "merged")
    assert_close(logits_of(merged), logits_of(merger), atol=1e-5, rtol=1e-5)
    state = merged.state_dict()
    for name, tensor in merger.merged_state_dict().items():
        assert torch.equal(state[name], tensor), name
    merger.save_pretrained(tmp_path / "masks")
    again = Merger.from_pretrained(tmp_path / "masks")
    assert torch.equal(logits_of(again), logits_of(merger))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("constrain_mode", CONSTRAINTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_combination_trains_a_step_and_is_what_it_exports(
    architecture, mode, constrain_mode, dtype
):
    start = "spherical" if constrain_mode == "spherical" else "uniform"
    merger = merger_of(
        architecture,
        dtype=dtype,
        mode=mode,
        constrain_mode=constrain_mode,
        mask_init={"strategy": start},
    )
    masks = [p for p in merger.parameters() if p.requires_grad]
    merger(input_ids=IDS, labels=IDS).loss.backward()
    assert all(mask.grad.isfinite().all() for mask in masks)
    assert any(mask.grad.any() for mask in masks)
    torch.optim.SGD(masks, lr=0.1).step()
    plain = tiny_model(dtype=dtype, **ARCHITECTURES[architecture])
    plain.load_state_dict(merger.merged_state_dict(), strict=False)
    assert_close(logits_of(plain), logits_of(merger), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_offloaded_components_stay_and_weights_are_brought(
    architecture, impl, monkeypatch
):
    "The meta device stands for an accelerator: a weight that was not brought there would be refused."

    def bring(tensor, device):
        if tensor.is_meta and device is not None and device.type == "cpu":  # token ids
            return torch.zeros_like(tensor, device=device)
        return plain_bring(tensor, device)

    plain_bring = masks.bring
    monkeypatch.setattr(masks, "bring", bring)
    wanted = merger_of(architecture, impl=impl)
    merger = merger_of(architecture, impl=impl, offload=True)
    assert torch.equal(logits_of(merger), logits_of(wanted))  # at home it changes nothing
    merger.config.pad_token_id = None  # else GPT-2 reads the ids, to warn
    merger.to("meta")
    held = {p.requires_grad: p.device.type for p in merger.parameters()}
    assert held == {True: "meta", False: "cpu"} and merger.device.type == "meta"
    ids = IDS.to("meta")
    merger(input_ids=ids).logits.sum().backward()
    assert all(p.grad.is_meta for p in merger.parameters() if p.requires_grad)
    with merger.as_component(1):
        assert merger(input_ids=ids).logits.is_meta
    assert all(not p.is_meta for p in merger.parameters() if not p.requires_grad)


def test_masks_stay_fp32_over_bf16_weights_and_move():
    merger = merger_of("qwen2", dtype=torch.bfloat16)
    masks = [p for p in merger.parameters() if p.requires_grad]
    assert {mask.dtype for mask in masks} == {torch.float32}
    optimizer = torch.optim.SGD(masks, lr=1e-4)
    before = [mask.detach().clone() for mask in masks]
    merger(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, masks))


def test_biases_that_only_one_component_has():
    with_bias = tiny_model("llama", attention_bias=True, seed=0)
    without = tiny_model("llama", attention_bias=False, seed=1)
    bias = with_bias.model.layers[0].self_attn.q_proj.bias.detach().clone()
    merger = Merger([without, with_bias], MergerConfig())
    merged = merger.merged_state_dict()["model.layers.0.self_attn.q_proj.bias"]
    assert_close(merged, bias / 2)
    assert merger.config.attention_bias


def test_component_weights_are_shared_not_copied():
    experts = tiny_experts("qwen2", n=3)
    storages = {p.untyped_storage().data_ptr() for e in experts for p in e.parameters()}
    merger = Merger(experts, MergerConfig())
    frozen = [p for p in merger.parameters() if not p.requires_grad]
    assert {p.untyped_storage().data_ptr() for p in frozen} <= storages


@pytest.mark.parametrize("source_size", [1, 3])
def test_batch_size_does_not_scale_the_loss(architecture, source_size):
    merger = merger_of(architecture)
    labels = IDS.clone()
    labels[:, :2] = -100
    one = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels)
    one["source"] = torch.tensor([0, 1])
    many = {key: torch.cat([value] * source_size) for key, value in one.items()}
    objective = Objective(temperature=2.0)
    assert_close(merger(objective=objective, **many)["loss"], merger(objective=objective, **one)["loss"])


def test_future_tokens_do_not_matter_to_the_loss():
    "The loss at position t looks at labels[t + 1]: with only the last label scored, the last input is not read."
    merger = merger_of("llama")
    labels = torch.full_like(IDS, -100)
    labels[:, -1] = IDS[:, -1]
    batch = dict(attention_mask=torch.ones_like(IDS), labels=labels, source=torch.tensor([0, 1]))
    changed = IDS.clone()
    changed[:, -1] = 33
    losses = [merger(objective=Objective(), input_ids=ids, **batch)["loss"] for ids in (IDS, changed)]
    assert torch.equal(*losses)


def test_activation_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        merger = merger_of("llama")
        if checkpointing:
            merger.checkpoint_activations()
        merger.train()
        batch = dict(input_ids=IDS, labels=IDS, source=torch.tensor([0, 1]), attention_mask=torch.ones_like(IDS))
        loss = merger(objective=Objective(), **batch)["loss"]
        masks = [p for p in merger.parameters() if p.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, masks)])
    for one, other in zip(*results):
        assert_close(one, other)


def test_reload_in_a_fresh_process(tmp_path, forked):
    paths = [str(save_tiny(e, tmp_path / f"e{i}")) for i, e in enumerate(tiny_experts("llama", n=2))]
    merger = Merger.from_config(MergerConfig(paths))
    merger.save_merged(tmp_path / "merged")
    torch.save(logits_of(merger), tmp_path / "logits.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder, wanted = sys.argv[1], torch.load(sys.argv[2], weights_only=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)\n"
        f"logits = model(input_ids=torch.tensor({IDS.tolist()})).logits\n"
        "torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "merged"), str(tmp_path / "logits.pt")], check=True)


def test_compiled_layers_give_the_same():
    merger = merger_of("llama")
    masks = [p for p in merger.parameters() if p.requires_grad]

    def results(length):
        inputs = dict(input_ids=IDS[:, :length], use_cache=False)
        logits = merger(**inputs).logits
        teacher = merger.component_forward(1, **inputs).logits
        return logits, teacher, *torch.autograd.grad(logits[..., 3].sum(), masks)

    lengths = IDS.shape[1], IDS.shape[1] - 1
    plain = [results(length) for length in lengths]
    torch._dynamo.utils.counters.clear()
    with compiled_layers(merger, backend="aot_eager"):
        compiled = [results(length) for length in lengths]
    for got, want in zip(chain(*compiled), chain(*plain)):
        assert_close(got, want, atol=1e-4, rtol=1e-3)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 4
    assert_close(results(lengths[0]), plain[0])  # and outside nothing is compiled
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)], ids=str)
def test_components_stored_in_several_dtypes_train_and_export_in_one(dtypes, tmp_path):
    paths = [str(save_tiny(expert.to(dtype), tmp_path / str(dtype))) for expert, dtype in zip(tiny_experts(n=2), dtypes)]
    merger = Merger.from_config(MergerConfig(paths))
    assert {p.dtype for p in merger.model.parameters()} == {torch.float32}
    merger(input_ids=IDS, labels=IDS).loss.backward()
    merger.save_merged(tmp_path / "merged")
    assert load_model(tmp_path / "merged", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("kind", ["opt", "biogpt", "bart"])
def test_tables_of_positions_that_take_more_than_ids_are_blended(kind):
    "Their rows are worked out from a mask or an offset, so nothing can be looked up in their place."
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=16, d_model=16, word_embed_proj_dim=16, ffn_dim=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2, encoder_layers=1, max_position_embeddings=32, vocab_size=64)
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{name: size for name, size in sizes.items() if name in known.to_dict()}, pad_token_id=0)
    experts = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    wanted = [logits_of(expert) for expert in experts]
    merger = Merger(experts, MergerConfig()).eval()
    for i in range(2):
        with merger.as_component(i):
            assert torch.equal(logits_of(merger), wanted[i])
    merger(input_ids=IDS, labels=IDS).loss.backward()
    moved = [name for name, _, key in merger.masked_parameters() if "position" in name]
    assert moved and all(leaf.masks[key].grad is not None for name, leaf, key in merger.masked_parameters() if "position" in name and "encoder" not in name)
