"Quantised folders, routed forward passes, and runs that are cut off."

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainerCallback

from merge_lab import nested_model, precision_costs, static_mix, text_windows as windows_module
from merge_lab.architecture import decoder_layers
from merge_lab.chat import assistant_spans
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import main
from merge_lab.components import load_model
from merge_lab.nested_model import layer_linears, linear_bytes, memory_table
from merge_lab.precision_costs import explained, fit_costs, fit_price, greedy_assignments, measure_costs, set_static
from merge_lab.routed_model import LayerwiseQuantizeForCausalLM, Routers
from merge_lab.run_folder import bundled_path, read_history, RunInterrupted, save_tensors
from merge_lab.systems import router
from merge_lab.systems.quantize import QuantizeConfig, run_quantize
from merge_lab.systems.router import RouterConfig, RouterTrainer, run
from merge_lab.text_windows import counted_ids, collate, exact_logits, score_windows, text_rows, text_windows, window_losses, windows_at_once
from merge_lab.tinylm import save_tiny, tiny_config, tiny_model, tiny_tokenizer

CASES = [("llama", torch.float32), ("qwen2", torch.float32), ("qwen2", torch.bfloat16)]
SMALL = dict(dataset=["tasks"], seq_len=24, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def conversations_are_rendered_once():
    "Most runs here read the bundled conversations, and their template takes longer than their training."
    real, known = windows_module.counted_ids, {}

    def counted_ids(tokenizer, row, answers=True):
        key = repr(row), tokenizer.chat_template, tokenizer.name_or_path, len(tokenizer), answers
        if key not in known:
            known[key] = real(tokenizer, row, answers)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "counted_ids", counted_ids)
        yield


def test_layers_are_found_by_one_rule_and_what_cannot_be_quantised_is_refused_first(tmp_path):
    assert nested_model.decoder_layers is decoder_layers
    model = tiny_model("gpt2")
    assert len(decoder_layers(model)) == model.config.n_layer
    save_tiny(model, tmp_path / "model", tiny_tokenizer())
    with pytest.raises(ValueError, match="GPT2LMHeadModel: its decoder keeps no list 'layers'"):
        run_quantize(QuantizeConfig(str(tmp_path / "model"), str(tmp_path / "run"), **SMALL))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="keeps no list"):
        nested_model.write_quantized(model, tiny_tokenizer(), tmp_path)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def quantized(request, tmp_path_factory):
    "A quantised tiny model: its folder and the folder of the original."
    architecture, dtype = request.param
    folder = tmp_path_factory.mktemp(architecture)
    save_tiny(tiny_model(architecture, dtype=dtype), folder / "model")
    config = QuantizeConfig(
        str(folder / "model"), str(folder / "any"), num_examples=2, **SMALL
    )
    return run_quantize(config), folder / "model"


@pytest.fixture
def routed(quantized):
    "A model with random routers, its folder, and a batch whose first tokens are prompt."
    torch.manual_seed(0)
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized[0])
    for layer in model.routers.layers:
        torch.nn.init.normal_(layer[-1].weight)
    ids = torch.randint(7, 60, (4, 20))
    labels = ids.clone()
    labels[:, :8] = -100
    return model, quantized[0], ids, labels


def with_weights_of(model, original, bits):
    "The plain transformers model with the dequantised weights of one precision, or of one per layer."
    plain = load_model(original, dtype="auto")
    layers = list(zip(decoder_layers(plain), decoder_layers(model.model)))
    each = bits if isinstance(bits, list) else [bits] * len(layers)
    for (layer, nested), b in zip(layers, each):
        for name, linear in layer_linears(layer).items():
            weight = nested.get_submodule(name).nested(b).dequantize(b)
            linear.weight.data.copy_(weight)
    return plain


@pytest.mark.parametrize("gate", ["softmax", "sparsemax"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_saturated_router_has_the_plain_models_loss(quantized, side, gate):
    "One-hot probabilities from the routers themselves: padding and the prefix are not scored, targets are shifted."
    folder, original = quantized
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder).train()
    model.gate["gate"], chosen = gate, [3, 5]
    for layer, bits in zip(model.routers.layers, chosen):
        layer[-1].bias.data.fill_(20.0)  # e^20 times dearer than
        layer[-1].bias.data[bits - 3] = -20.0
    torch.manual_seed(1)
    ids, mask = torch.randint(7, 60, (3, 14)), torch.ones(3, 14, dtype=torch.long)
    mask[1, slice(0, 4) if side == "left" else slice(10, 14)] = 0
    labels = ids.clone()  # with its padding: that is taken out by the mask
    labels[:, :7] = -100
    output = model.train_forward(ids, mask, labels)
    onehot = [[float(b == bits) for b in model.precisions] for bits in chosen]
    assert output.probabilities.tolist() == [onehot] * 3
    assert output.bits.tolist() == [chosen] * 3
    plain = with_weights_of(model, original, chosen)
    with torch.no_grad():
        logits = plain(input_ids=ids, attention_mask=mask).logits.double()
    told = [
        -logits[row, place - 1].log_softmax(-1)[ids[row, place]]
        for row in range(3)
        for place in range(7, 14)
        if mask[row, place]
    ]
    assert len(told) == (21 if side == "left" else 17)
    wanted = torch.stack(told).mean().item()
    exact = plain.dtype == torch.float32
    assert output.loss.item() == pytest.approx(wanted, abs=1e-5 if exact else 0.02)


@pytest.mark.parametrize("cached", [True, False])
def test_generation_is_the_plain_models(quantized, cached):
    folder, original = quantized
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder)
    if model.config.dtype != torch.float32:
        pytest.skip("bf16: two tokens may round to one logit")
    torch.manual_seed(2)
    ids, mask = torch.randint(7, 60, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, :4] = 0
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    options |= dict(pad_token_id=0, use_cache=cached)
    for bits in (3, [8, 4]):
        plain = with_weights_of(model, original, bits)
        wanted = plain.generate(input_ids=ids, attention_mask=mask, **options)
        with model.set_precision(bits):
            assert torch.equal(model.generate(ids, mask, **options), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_fixed_precision_is_the_plain_model(quantized, bits, side):
    folder, original = quantized
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder)
    plain = with_weights_of(model, original, bits)
    torch.manual_seed(bits)
    ids, mask = torch.randint(7, 60, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=mask, labels=labels)
    exact = plain.dtype == torch.float32
    tolerance = dict(atol=1e-5 if exact else 0.1, rtol=0)
    with model.set_precision(bits):
        hard = model.infer_forward(ids, mask, ids)  # padding is not scored
        soft = model.train_forward(ids, mask, ids)
    for output in (hard, soft):
        seen = mask.bool()
        torch.testing.assert_close(output.logits[seen], wanted.logits[seen], **tolerance)
        torch.testing.assert_close(output.loss, wanted.loss, **tolerance)
    assert model.assignment is None


def test_straight_through_training_computes_what_inference_computes(routed):
    model, _, ids, labels = routed
    model.gate = dict(gate="softmax", temperature=1.0, straight_through=True)
    soft, hard = model.train_forward(ids, labels=labels), model.infer_forward(ids, labels=labels)
    assert torch.equal(soft.bits.long(), hard.bits)
    assert len(hard.bits.unique()) > 1
    torch.testing.assert_close(soft.loss, hard.loss, atol=1e-5 if soft.loss.dtype == torch.float32 else 0.05, rtol=0)


def test_gradients_reach_the_routers_only(routed):
    model, _, ids, labels = routed
    model.train()
    model.train_forward(ids, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.model.parameters())
    for layer in model.routers.layers:
        assert layer[0].weight.dtype == torch.float32 and layer[0].weight.grad.abs().sum() > 0


def test_scored_tokens_have_no_say_in_the_choice(routed):
    model, _, ids, labels = routed
    changed = ids.clone()
    changed[:, 8:] = torch.randint(7, 60, (4, 12))
    for forward in (model.infer_forward, model.train_forward):
        first, other = forward(ids, labels=labels), forward(changed, labels=labels)
        torch.testing.assert_close(first.bits, other.bits)
        if model.config.dtype == torch.float32:
            torch.testing.assert_close(first.logits[:, :8], other.logits[:, :8])
    moved = ids.clone()
    moved[:, :8] = torch.randint(7, 60, (4, 8))
    assert not torch.equal(model.infer_forward(ids, labels=labels).bits, model.infer_forward(moved, labels=labels).bits)


def test_a_label_on_the_first_token_leaves_no_prompt(routed):
    model, _, ids, _ = routed
    with pytest.raises(ValueError, match="no token stands before"):
        model.infer_forward(ids, labels=ids)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_keeps_its_choice_with_and_without_cache(routed, options):
    model, _, ids, _ = routed
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = options | dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached = model.generate(ids, mask, **options)
    if model.config.dtype == torch.float32:  # bf16 rounds differently for other shapes
        assert torch.equal(cached, model.generate(ids, mask, use_cache=False, **options))
    bits = model.hard_bits(len(cached) if "num_beams" not in options else len(model.plan.decided[0]))
    alone = model.infer_forward(ids, mask).bits
    assert torch.equal(bits[:: len(bits) // 4], alone)


def test_a_cache_keeps_the_choice(routed):
    model, _, ids, _ = routed
    if model.config.dtype != torch.float32:
        pytest.skip("compares to rounding")
    start = model.infer_forward(ids[:, :8], use_cache=True)
    rest = model.infer_forward(ids[:, 8:], past_key_values=start.past_key_values, use_cache=True)
    assert torch.equal(rest.bits, start.bits)
    with model.set_precision(start.bits):
        whole = model.infer_forward(ids)
    torch.testing.assert_close(rest.logits, whole.logits[:, 8:], atol=1e-5, rtol=0)


def test_nan_names_the_layer(routed):
    model, _, ids, labels = routed
    with model.set_precision(3):
        model.infer_forward(ids)
    decoder_layers(model.model)[1].mlp.up_proj.row_scale[0] = float("nan")
    model.slot.clear()
    for forward in (model.infer_forward, model.train_forward):
        with model.set_precision([3, 4]), pytest.raises(ValueError, match="decoder layer 1 gave NaN"):
            forward(ids, labels=labels)


def test_a_subset_of_precisions_is_all_that_is_loaded(quantized):
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized[0], precisions=[5, 3])
    linear = decoder_layers(model.model)[0].self_attn.q_proj
    assert model.precisions == [3, 5] and linear.planes.shape[0] == 5
    assert [name for name, _ in linear.named_buffers()] == ["row_scale", "block_scale", "planes", "table_3", "table_5"]
    whole = LayerwiseQuantizeForCausalLM.from_quantized(quantized[0])
    ids = torch.randint(7, 60, (2, 9))
    with model.set_precision(5), whole.set_precision(5):
        assert torch.equal(model.infer_forward(ids).logits, whole.infer_forward(ids).logits)


def test_one_layer_is_dequantised_at_a_time(routed):
    model, _, ids, labels = routed
    model.train_forward(ids, labels=labels).loss.backward()
    assert len(model.slot.held) == 1


def test_a_quantisation_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    save_tiny(tiny_model("llama"), tmp_path / "model")
    options = dict(num_examples=2, **SMALL)
    whole = run_quantize(QuantizeConfig(str(tmp_path / "model"), str(tmp_path / "whole"), **options))
    real = nested_model.quantize_layer

    def fail_at_layer_1(layer, prefix, *rest):
        if prefix.endswith(".1"):
            raise KeyboardInterrupt
        return real(layer, prefix, *rest)

    monkeypatch.setattr(nested_model, "quantize_layer", fail_at_layer_1)
    cut = QuantizeConfig(str(tmp_path / "model"), str(tmp_path / "cut"), **options)
    with pytest.raises(KeyboardInterrupt):
        run_quantize(cut)
    with pytest.raises(ValueError, match="--resume"):
        LayerwiseQuantizeForCausalLM.from_quantized(tmp_path / "cut")
    done = []
    monkeypatch.setattr(nested_model, "quantize_layer", lambda *a: done.append(a[1]) or real(*a))
    run_quantize(dataclasses.replace(cut, resume=True))
    assert [name[-2:] for name in done] == [".1"]
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in files:
        if name.endswith(".safetensors"):
            assert (whole / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_the_splits_of_every_kind_of_text_are_apart_and_complete(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Number {i % 20}?"},
                {"role": "assistant", "content": f"It is {i % 20}."},
            ]
        }
        for i in range(40)  # each conversation twice
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paragraphs = [f"Paragraph {i % 20}." for i in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    tokenizer = tiny_tokenizer()
    (tmp_path / "uneven.txt").write_text("\n\n".join(["long " * 1000, *paragraphs[:9]]))
    for name, count in (
        (tmp_path / "chat.jsonl", [16, 2, 2]),
        (tmp_path / "text.txt", [16, 2, 2]),
        (tmp_path / "uneven.txt", [8, 1, 1]),
        ("prose", None),
        ("code", None),
    ):
        sides = [
            set(windows_module.read_documents(str(name), split, tokenizer))
            for split in ("train", "validation", "test")
        ]
        train, validation, test = sides
        assert not (train & validation or train & test or validation & test)
        if count:
            assert [len(side) for side in sides] == count


def test_windows_begin_and_end_where_text_does_and_answers_count(tmp_path):
    tokenizer = tiny_tokenizer()
    row = {"messages": [{"role": "user", "content": "the old cat sleeps in the garden"}, {"role": "assistant", "content": "the cat sleeps"}]}
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for _ in range(40)))
    ids, said = assistant_spans(tokenizer, row)
    length = 2 * len(ids)
    window = text_windows(tokenizer, [str(tmp_path / "chat.jsonl")], length, 1)[0]
    assert window.input_ids.tolist() == ids * 2 and window.scored.tolist() == [bool(own) for own in said] * 2
    assert text_windows(tokenizer, [str(tmp_path / "chat.jsonl")], length, 1, answers=False)[0].scored is None
    with pytest.raises(ValueError, match="or no answers in them"):
        text_windows(tokenizer, [str(tmp_path / "chat.jsonl")], length, 1, prefix_length=length - 1)
    bare = tiny_tokenizer()
    bare.chat_template = None
    window = text_windows(bare, [str(tmp_path / "chat.jsonl")], length, 1)[0]
    assert bare.eos_token_id in window.input_ids and window.scored is None
    (tmp_path / "long.txt").write_text("\n\n".join(f"the dog {'runs ' * 60}{i}" for i in range(20)))
    starts = {tuple(counted_ids(tokenizer, row)[0][:12]) for row in text_rows(str(tmp_path / "long.txt"), "train")}
    assert all(tuple(text_windows(tokenizer, [str(tmp_path / "long.txt")], 12, 1, seed=seed)[0].input_ids.tolist()) in starts for seed in range(5))


def router_config(folder, save_dir, **options):
    defaults = dict(prefix_length=8, num_examples=8, num_validation=4, num_epochs=3, learning_rate=1e-2, static=False)
    return RouterConfig(str(folder), save_dir=str(save_dir), **(SMALL | defaults | options))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(tiny_model("llama"), folder / "model")
    return run_quantize(QuantizeConfig(str(folder / "model"), str(folder / "any"), num_examples=2, **SMALL))


def with_tensors(**changes):
    "Damage to the file of layer 1: other tensors under some names, made of what is there; None: none."

    def damage(folder):
        file = folder / "layer-00001.safetensors"
        tensors = load_file(file)
        for name, change in changes.items():
            key = f"model.layers.1.{name.replace('__', '.')}"
            tensors[key] = change(tensors.get(key))
        save_tensors(file, {key: tensor for key, tensor in tensors.items() if tensor is not None})

    return damage


UP = "mlp__up_proj__"
DAMAGED = {  # what happened to a layer's file -> how, what is told
    "cut off": (lambda folder: os.truncate(folder / "layer-00001.safetensors", 5000), "it cannot be read"),
    "of another layer": (lambda folder: shutil.copy(folder / "layer-00000.safetensors", folder / "layer-00001.safetensors"), "model.layers.1.*is missing"),
    "too few planes": (with_tensors(**{f"{UP}planes": lambda planes: planes[:5]}), "up_proj.planes is U8 of shape .5, 64, 4"),
    "too few rows": (with_tensors(**{f"{UP}planes": lambda planes: planes[:, :-1]}), "shape .8, 63, 4"),
    "a table too few": (with_tensors(**{f"{UP}table_8": lambda _: None}), "table_8 is missing"),
    "a table that is too short": (with_tensors(**{f"{UP}table_4": lambda table: table[:, :8]}), "shape .1, 8"),
    "a table in another dtype": (with_tensors(**{f"{UP}table_4": lambda table: table.float()}), "table_4 is F32"),
    "one scale for all rows": (with_tensors(**{f"{UP}row_scale": lambda scale: scale[:1]}), "row_scale"),
    "too many blocks": (with_tensors(**{f"{UP}block_scale": lambda scale: scale.repeat(1, 2)}), "block_scale"),
    "no scales": (with_tensors(**{f"{UP}block_scale": lambda _: None, f"{UP}row_scale": lambda _: None}), "ask for floating point of shape"),
    "kept weights without their places": (with_tensors(**{f"{UP}kept": lambda _: torch.zeros(64, 1)}), "kept"),
    "a bias that the model does not have": (with_tensors(**{f"{UP}bias": lambda _: torch.zeros(64)}), "bias is not of this layer"),
    "a norm of another width": (with_tensors(input_layernorm__weight=lambda weight: weight[:-1]), "input_layernorm"),
}  # fmt: skip


def copy_of(folder, place):
    "A quantised folder elsewhere, and the options that go on with it."
    shutil.copytree(folder, place)
    return place, QuantizeConfig(**(yaml.safe_load((folder / "config.yaml").read_text()) | dict(output_dir=str(place), resume=True)))


@pytest.mark.parametrize(("damage", "told"), DAMAGED.values(), ids=DAMAGED)
def test_a_layer_that_does_not_fit_is_made_again(tiny, tmp_path, caplog, damage, told):
    folder, config = copy_of(tiny, tmp_path / "any")
    (folder / "SHA256SUMS").unlink()  # of a run that was cut off
    damage(folder)
    run_quantize(config)
    assert re.search(f"layer-00001.safetensors: .*{told}.*; the layer is quantised again", caplog.text)
    for name in ("layer-00000.safetensors", "layer-00001.safetensors", "SHA256SUMS"):
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize(("damage", "told"), DAMAGED.values(), ids=DAMAGED)
def test_a_layer_that_does_not_fit_is_named(tiny, tmp_path, damage, told):
    folder, _ = copy_of(tiny, tmp_path / "any")
    damage(folder)
    with pytest.raises(ValueError, match=rf"layer-00001.safetensors: .*{told}.*Copy the file again, or .*any/config.yaml --resume$"):
        LayerwiseQuantizeForCausalLM.from_quantized(folder, precisions=[4, 8])


def with_config(**changes):
    "Other values in config.json; of the precisions under their own names."

    def damage(folder):
        values = json.loads((folder / "config.json").read_text())
        own = {name: changes[name] for name in changes if name.endswith("_precision")}
        values |= {name: value for name, value in changes.items() if name not in own}
        if own:
            values["quantization_config"] |= own
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def without_norm(folder):
    save_tensors(folder / "others.safetensors", {name: tensor for name, tensor in load_file(folder / "others.safetensors").items() if name != "model.norm.weight"})


KEPT = {f"{UP}kept": lambda _: torch.zeros(64, 1), f"{UP}kept_columns": lambda _: torch.tensor([32], dtype=torch.int32)}
MISMATCHED = {  # what happened to a quantised folder -> how, what is told
    "kept columns that are none": (with_tensors(**KEPT), "layer-00001.safetensors: .*kept_columns names columns beyond the 32"),
    "fewer layers": (with_config(num_hidden_layers=1), "layer-00001.safetensors: the model has 1 layers by config.json"),
    "another width": (with_config(intermediate_size=48), "layer-00000.safetensors: .*mlp.gate_proj.planes is U8"),
    "another vocabulary": (with_config(vocab_size=50), "others.safetensors: model.embed_tokens.weight is F32"),
    "a missing norm": (without_norm, "others.safetensors: model.norm.weight is missing"),
    "a layer among the others": (lambda folder: shutil.copy(folder / "layer-00000.safetensors", folder / "others.safetensors"), "others.safetensors: model.layers.0"),
    "fewer bits": (with_config(parent_precision=5), r"layer-00000.safetensors: .*planes is U8 of shape .8, 32, 4., .* .5, 32, 4"),
    "more bits": (with_config(seed_precision=2), "layer-00000.safetensors: .*table_2 is missing"),
    "no precision": (with_config(parent_precision=None), "config.json: parent_precision=None"),
    "too many bits": (with_config(parent_precision=9), "config.json: .*parent_precision=9: expected"),
    "a width that is none": (with_config(hidden_size="wide"), "config.json: transformers .*cannot use it .*hidden_size"),
    "a dtype that is none": (with_config(dtype="float99"), "config.json: transformers .*cannot use it .*float99"),
    "damaged options of generation": (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json: transformers .*cannot use it"),
    "no section": (with_config(quantization_config="int8"), "not a folder that `merge-lab quantize` has finished"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "told"), MISMATCHED.values(), ids=MISMATCHED)
def test_files_of_a_folder_that_contradict_each_other_are_named(tiny, tmp_path, damage, told):
    folder, _ = copy_of(tiny, tmp_path / "any")
    damage(folder)
    with pytest.raises(ValueError, match=told):
        LayerwiseQuantizeForCausalLM.from_quantized(folder)


def test_kept_columns_are_known_by_their_shapes(tmp_path):
    "A weight that is wide enough has some."
    save_tiny(tiny_model("llama", hidden_size=384, num_hidden_layers=2), tmp_path / "model")
    folder = run_quantize(QuantizeConfig(str(tmp_path / "model"), str(tmp_path / "any"), num_examples=2, **SMALL))
    assert LayerwiseQuantizeForCausalLM.from_quantized(folder) and load_file(folder / "layer-00001.safetensors")["model.layers.1.mlp.up_proj.kept"].shape[1]
    with_tensors(**{f"{UP}kept": lambda kept: kept[:5]})(folder)
    with pytest.raises(ValueError, match="up_proj.kept is F32 of shape .5, 1"):
        LayerwiseQuantizeForCausalLM.from_quantized(folder)


def test_no_checksum_is_written_for_a_layer_that_changed_since(tiny, tmp_path, caplog):
    folder, config = copy_of(tiny, tmp_path / "any")
    file = folder / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    run_quantize(config)
    assert "layer-00001.safetensors is not what was written (SHA256SUMS)" in caplog.text
    assert all((folder / name).read_bytes() == (tiny / name).read_bytes() for name in (file.name, "SHA256SUMS"))


def results_of(folder):
    "What a run is worth: routers, history of the training, what was measured. Not how long a step took."
    names = ("*router_checkpoint*", "training_history.json", "measured/*")
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def run_in(process_of, config):
    "Begin a run in a process of its own."
    process = process_of.Process(target=run, args=(config,))
    process.start()
    return process


def lines_of(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch, kills):
    "kill -9 while costs are measured and at random steps, with dropout, a curriculum and a budget."
    chance, forks = random.Random(4), multiprocessing.get_context("forkserver")  # imports once; no thread of this process is copied
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forks.set_forkserver_preload(["merge_lab.systems.router"])
    words = [f"word{chance.randrange(40)}" for _ in range(3000)]
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(words[i : i + 30]) for i in range(0, 3000, 30)))
    options = dict(dropout=0.2, curriculum=True, target_bits=5.0, num_examples=24, num_epochs=6, batch_size=2, eval_batch_size=2, save_steps=3, patience=0)
    config = router_config(tiny, tmp_path / "cut", dataset=[str(tmp_path / "text.txt")], **options)
    whole = run_in(forks, dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    whole.join(240)
    assert whole.exitcode == 0
    steps = lines_of(tmp_path / "whole/history.jsonl")
    history, costs = tmp_path / "cut/history.jsonl", tmp_path / "cut/measured/costs.safetensors"
    ends = sorted(chance.sample(range(4, steps - 4), kills))
    for kill, end in enumerate([0, *ends]):
        process, deadline = run_in(forks, dataclasses.replace(config, resume=kill > 0)), time.monotonic() + 120
        while time.monotonic() < deadline and not (lines_of(history) >= end if end else costs.exists()):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert lines_of(history) < steps
    last = run_in(forks, dataclasses.replace(config, resume=True))
    last.join(240)
    assert last.exitcode == 0 and lines_of(history) == steps
    found, wanted = results_of(tmp_path / "cut"), results_of(tmp_path / "whole")
    assert found.keys() == wanted.keys() and len(found) == 2 * (1 + 6) + 1 + 2
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize("damaged", [False, True])
def test_what_was_measured_is_not_measured_again(tiny, tmp_path, monkeypatch, caplog, damaged):
    "Stopped in the third batch of costs, a run goes on with the third; with the first if what was written cannot be read."
    real, measured = precision_costs.batch_costs, []

    def stop_at_the_third(model, ids, *rest):
        if len(measured) == 2 and not stopped:
            raise KeyboardInterrupt
        measured.append(len(ids))
        return real(model, ids, *rest)

    stopped = []
    monkeypatch.setattr(precision_costs, "batch_costs", stop_at_the_third)
    config = router_config(tiny, tmp_path / "run", num_epochs=1, eval_batch_size=2)
    with pytest.raises(RunInterrupted, match="merge-lab router .*config.yaml --resume"):
        run(config)
    stopped.append(True)
    if damaged:
        os.truncate(tmp_path / "run/measured/costs.safetensors", 40)
    for _ in range(2):
        run(dataclasses.replace(config, resume=True))
        assert measured == [2] * (6 if damaged else 4)
    assert ("costs.safetensors cannot be read" in caplog.text) == damaged


def test_what_another_run_measured_is_not_taken_over(tiny, tmp_path):
    "A trainer of one's own in a folder that was used before measures its own windows."
    tokenizer, found = load_tokenizer(tiny), []
    for seed in (0, 1):
        windows = text_windows(tokenizer, ["tasks"], 24, 8, seed=seed)
        trainer = RouterTrainer(LayerwiseQuantizeForCausalLM.from_quantized(tiny), router_config(tiny, tmp_path / "run", num_epochs=0), windows, windows)
        trainer.fit()
        found.append((tmp_path / "run/measured/costs.safetensors").read_bytes())
    assert found[0] != found[1]


def test_a_signal_stops_after_the_step_and_nothing_is_lost(tiny, tmp_path, monkeypatch):
    run(router_config(tiny, tmp_path / "whole", dropout=0.1))
    real = RouterTrainer.compute_loss

    def signal_in_step_3(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "compute_loss", signal_in_step_3)
    config = router_config(tiny, tmp_path / "cut", dropout=0.1, save_steps=0)
    with pytest.raises(RunInterrupted, match="stopped after step 3 of 6"):
        run(config)
    assert (tmp_path / "cut/best_router_checkpoint.pt").exists()
    monkeypatch.setattr(RouterTrainer, "compute_loss", real)
    run(dataclasses.replace(config, resume=True, save_steps=20))
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")


def test_the_history_has_every_step_and_what_validation_said(tiny, tmp_path):
    _, epochs = run(router_config(tiny, tmp_path / "run", patience=0))
    history = read_history(tmp_path / "run/history.jsonl")
    assert history.step.tolist() == [1, 2, 3, 4, 5, 6] and history.epoch.tolist() == [1, 1, 2, 2, 3, 3]
    assert history.dropna(subset="held_out_loss").held_out_loss.tolist() == epochs.loss.tolist()[1:]
    published = json.loads((tmp_path / "run/training_history.json").read_text())
    assert [row["loss"] for row in published["steps"]] == history.loss.tolist()
    assert published["steps"][0]["temperature"] == 1.0
    assert list(published["steps"][0]) == ["step", "epoch", "loss", "ce", "precision", "average_bits", "temperature", "learning_rate"]
    assert set(published["epochs"][0]) == {"loss", "ce", "precision", "average_bits", "read_bytes", "real_bits", "epoch"}


def test_tensorboard_gets_the_loss(tiny, tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    run(router_config(tiny, tmp_path / "run", patience=0, report_to="tensorboard", logging_steps=1))
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    told = [scalar.value for scalar in event_accumulator.EventAccumulator(str(events)).Reload().Scalars("train/loss")]
    assert told == pytest.approx(read_history(tmp_path / "run/history.jsonl").loss.tolist(), abs=1e-3)


def test_the_best_routers_are_kept_in_both_files(tiny, tmp_path, monkeypatch):
    "Validation says which epoch that is: here the second of four."
    said = iter([3.0, 2.0, 1.0, 2.0, 3.0])
    real = RouterTrainer.validate
    monkeypatch.setattr(RouterTrainer, "validate", lambda self: real(self) | dict(loss=next(said)))
    model, epochs = run(router_config(tiny, tmp_path / "run", num_epochs=4))
    assert epochs.loss.tolist() == [3.0, 2.0, 1.0, 2.0, 3.0]
    best = torch.load(tmp_path / "run/best_router_checkpoint.pt", weights_only=True)
    second = torch.load(tmp_path / "run/router_checkpoint_epoch_2.pt", weights_only=True)
    third = load_file(tmp_path / "run/router_checkpoint_epoch_3.safetensors")
    same = load_file(tmp_path / "run/best_router_checkpoint.safetensors")
    assert best["epoch"] == 2 and best["validation"]["loss"] == 1.0
    for name, tensor in model.router_state().items():
        assert torch.equal(tensor, best["model_state_dict"][name]) and torch.equal(tensor, same[name])
        assert torch.equal(tensor, second["model_state_dict"][name])
    assert any(not torch.equal(tensor, third[name]) for name, tensor in same.items())


def test_a_run_that_gets_no_better_ends_and_stays_ended(tiny, tmp_path, monkeypatch):
    "Two epochs without a better one; resumed it makes no step, unless more patience is asked for."
    losses = {0: 2.0, 1: 1.0, 2: 1.5, 3: 1.0, 4: 0.5, 5: 0.6}
    real = RouterTrainer.validate

    def said(self):
        return real(self) | dict(loss=losses[self.epoch_ends.index(self.state.global_step)])

    monkeypatch.setattr(RouterTrainer, "validate", said)
    config = router_config(tiny, tmp_path / "run", num_epochs=5)
    _, epochs = run(config)
    assert epochs.loss.tolist() == [2.0, 1.0, 1.5, 1.0]  # as good as the best is not better
    before = results_of(tmp_path / "run")
    _, again = run(dataclasses.replace(config, resume=True))
    assert again.equals(epochs) and results_of(tmp_path / "run") == before
    _, more = run(dataclasses.replace(config, resume=True, patience=3))
    assert more.loss.tolist() == [2.0, 1.0, 1.5, 1.0, 0.5, 0.6]
    run(dataclasses.replace(config, output_dir=str(tmp_path / "patient"), patience=0))
    assert results_of(tmp_path / "patient") == results_of(tmp_path / "run")


def test_it_says_how_long_it_takes_before_it_begins(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(RouterTrainer, "measure_time", lambda self: (4.0, 21.6))
    caplog.set_level(logging.INFO)
    begun = []
    monkeypatch.setattr(router, "fit_costs", lambda *a: begun.append(caplog.text) or 0.0)
    run(router_config(tiny, tmp_path / "run", eval_batch_size=2))
    assert "about 3 min to measure costs (44 passes), then at most 3 min for 6 steps, which end after 2 epochs" in begun[0]


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_of_a_blend_are_those_of_finite_differences(tiny, layer):
    torch.manual_seed(0)
    model = LayerwiseQuantizeForCausalLM.from_quantized(tiny)
    model.gate = dict(gate="softmax", temperature=1.0, straight_through=False)
    for own in model.routers.layers:
        torch.nn.init.normal_(own[-1].weight, std=0.3, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    labels, bias = ids.masked_fill(torch.arange(16) < 6, -100), model.routers.layers[layer][-1].bias
    model.train_forward(ids, labels=labels).loss.backward()

    def loss(k, step):
        with torch.no_grad():
            bias[k] += step
            found = model.train_forward(ids, labels=labels).loss.double().item()
            bias[k] -= step
        return found

    told = torch.tensor([(loss(k, 0.1) - loss(k, -0.1)) / 0.2 for k in range(len(bias))])
    assert bias.grad.abs().max() > 1e-5
    torch.testing.assert_close(bias.grad.float(), told.float(), rtol=0.05, atol=5e-6)


@pytest.mark.parametrize("options", [
    dict(target_bits=5.0), dict(target_bits=6.0, precisions=[4, 5, 6], router_hidden=16), dict(target_bits=5.0, least_headroom=1.0),
    dict(target_bits=5.0, granularity="token", token_steps=0),
], ids=["prompt", "other routers", "the static mix is kept", "token"])  # fmt: skip
def test_the_end_says_how_to_load_what_is_kept(tiny, tmp_path, capsys, options):
    options = {"num_train_epochs": 1} | options if options.get("granularity") != "token" else options
    words = {name: value for name, value in dataclasses.asdict(router_config(tiny, tmp_path / "run")).items() if name in ("dataset", "max_length", "prefix_length", "num_samples", "num_validation", "device")}
    result = run(RouterConfig(str(tiny), output_dir=str(tmp_path / "run"), **words | options))
    router.show_result(result)
    told, names = capsys.readouterr().out, {}
    exec(told[told.index("from merge_lab") :], names)  # noqa: S102
    ids = torch.randint(7, 60, (8, 12))
    loaded, own = names["model"].infer_forward(ids), result[0].infer_forward(ids)
    assert torch.equal(loaded.logits, own.logits) and f"within the budget: {json.loads((tmp_path / 'run/static.json').read_text())['kept']}" in told


def test_the_commands_end_with_the_next_step(tmp_path, capsys):
    save_tiny(tiny_model("llama"), tmp_path / "model")
    text = ["--dataset", "tasks", "--seq_len", "24", "--device", "cpu"]
    assert main(["quantize", str(tmp_path / "model"), "--output_dir", str(tmp_path / "any"), "--num_examples", "2", *text]) == 0
    assert f"merge-lab router {tmp_path / 'any'}" in capsys.readouterr().out
    sizes = ["--prefix_length", "8", "--num_examples", "4", "--num_validation", "2", "--num_epochs", "1"]
    assert main(["router", str(tmp_path / "any"), "--save_dir", str(tmp_path / "run"), *sizes, *text]) == 0
    assert "best_router_checkpoint.safetensors" in capsys.readouterr().out


def test_routers_that_are_no_numbers_end_the_run_and_the_best_stay(tiny, tmp_path):
    config = router_config(tiny, tmp_path / "run", num_costs=4)
    model = LayerwiseQuantizeForCausalLM.from_quantized(tiny)
    windows = text_windows(load_tokenizer(tiny), ["tasks"], 24, 8)
    trainer = RouterTrainer(model, config, windows, windows)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model.routers.layers[1][0].weight.data[0, 0] = float("nan")

    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match="router of layer 1 gave NaN or infinity. Lower learning_rate"):
        trainer.fit()
    kept = load_file(tmp_path / "run/best_router_checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_what_cannot_run_leaves_no_folder(tiny, tmp_path, monkeypatch):
    "A wrong name is corrected and run again: nothing may lie in the way."
    monkeypatch.setattr("merge_lab.text_windows.HUB_TEXT", {"c4": dict(path=str(tmp_path / "no-hub"))})
    for wrong, message in (
        (dict(dataset=["poems"]), "dataset='poems'"),
        (dict(dataset=["c4"]), "Check the network"),
        (dict(precisions=[2, 4]), "precisions=2"),
        (dict(precisions=[4]), "a router needs at least two precisions"),
        (dict(target_bits=2), "target_bits=2: the model reads 4.208 to 12.22 bits a weight"),
        (dict(target_bits=4.0), "target_bits=4: the model reads"),  # four nominal bits read more
        (dict(model_path=tmp_path / "none"), "no such folder"),
        (dict(report_to="nowhere"), "report_to='nowhere'"),
        (dict(model_path=bundled_path("models/base")), "Quantise the model first"),
    ):
        options = dict(model_path=tiny) | wrong
        with pytest.raises(ValueError, match=message):
            run(router_config(options.pop("model_path"), tmp_path / "run", **options))
    for wrong, message in ((dict(dataset=["poems"]), "dataset='poems'"), (dict(dataset=["c4"]), "Check the network")):
        with pytest.raises(ValueError, match=message):
            run_quantize(QuantizeConfig(str(bundled_path("models/base")), str(tmp_path / "run"), **(SMALL | wrong)))
    assert not (tmp_path / "run").exists()


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_the_input_is_not_cleared(tiny, tmp_path):
    "Neither the folder of the model nor one above it, nor one with the text that is to be read."
    run_dir = tmp_path / "run"
    shutil.copytree(tiny, run_dir / "any")
    (run_dir / "config.yaml").write_bytes((tiny / "config.yaml").read_bytes())
    save_tiny(tiny_model("llama"), run_dir / "plain")
    (run_dir / "text.txt").write_text("A text.")
    before = files_of(run_dir)
    text = dict(dataset=[str(run_dir / "text.txt")])
    for config in (
        router_config(run_dir / "any", run_dir, overwrite=True),
        router_config(run_dir / "any", run_dir / "any", overwrite=True),
        router_config(tiny, run_dir, overwrite=True, **text),
    ):
        with pytest.raises(ValueError, match="overwrite would clear"):
            run(config)
    options = dict(overwrite=True, num_examples=2) | SMALL
    for model, other in ((run_dir / "plain", {}), (tmp_path / "none", text)):
        with pytest.raises(ValueError, match="overwrite would clear"):
            run_quantize(QuantizeConfig(str(model), str(run_dir), **options | other))
    assert files_of(run_dir) == before


def test_a_run_goes_on_with_the_options_it_was_begun_with(tiny, tmp_path):
    "Where it runs and how much it keeps in memory may differ; what is learned may not."
    config = router_config(tiny, tmp_path / "run", num_epochs=0, num_costs=4)
    run(config)
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(ValueError, match="learning_rate=0.1, but the run in"):
        run(dataclasses.replace(again, learning_rate=0.1))
    run(dataclasses.replace(again, keep_weights=True))
    begun = QuantizeConfig(**yaml.safe_load((tiny / "config.yaml").read_text()))
    with pytest.raises(ValueError, match="max_length=48, but the run in"):
        run_quantize(dataclasses.replace(begun, resume=True, max_length=48))


@pytest.mark.parametrize(
    "options",
    [
        dict(gate="sparsemax", curriculum=True, precisions=[3, 8]),
        dict(straight_through=True, schedule="linear", weight_ce=0.0, weight_precision=1.0),
        dict(target_bits=5.0, pretrain="none", keep_weights=True),
    ],
    ids=["sparsemax", "straight-through", "target"],
)
def test_options(tiny, tmp_path, options):
    _, epochs = run(router_config(tiny, tmp_path / "run", **options))
    saved = torch.load(tmp_path / "run" / "best_router_checkpoint.pt", weights_only=True)
    assert all(name.startswith("routers.") for name in saved["model_state_dict"])
    assert saved["validation"]["loss"] == min(epochs.loss) and math.isfinite(min(epochs.loss))
    if options.get("weight_ce") == 0:  # bits are all that costs
        assert epochs.average_bits.iloc[-1] == 3


def test_what_is_trained_is_what_is_chosen(tiny, tmp_path):
    "By default the bits that the last step trained at are those that hard choices spend."
    model, _ = run(router_config(tiny, tmp_path / "run", target_bits=5.0, num_costs=4, num_epochs=1))
    ids, labels = collate(text_windows(load_tokenizer(tiny), ["tasks"], 24, 40), 8)
    trained = model.train().train_forward(ids, labels=labels).bits.mean()
    assert abs(trained - model.eval().infer_forward(ids, labels=labels).bits.float().mean()) < 0.1


@pytest.mark.parametrize("weights, budget, bits", [((0.7, 0.3), False, 3), ((1.0, 0.0), False, 8), ((0.7, 0.3), True, 3)])
def test_an_objective_that_leaves_nothing_to_choose_says_so(tiny, tmp_path, caplog, weights, budget, bits):
    least = memory_table(LayerwiseQuantizeForCausalLM.from_quantized(tiny)).real_bits["3 bits"]
    options = dict(zip(("weight_ce", "weight_precision"), weights)) | dict(num_epochs=0, num_costs=4, target_bits=least if budget else None)
    _, epochs = run(router_config(tiny, tmp_path / "run", **options))
    assert epochs.average_bits.iloc[0] == bits
    assert ("all layers are read at" in caplog.text) == (not budget)
    assert budget or f"at {bits} bits for every window" in caplog.text


def test_a_budget_counts_what_is_read(tiny, tmp_path):
    "Tables and scales of a small model are a third of what it reads: five bits are not five codes."
    _, epochs = run(router_config(tiny, tmp_path / "run", target_bits=6.0, num_costs=4, num_epochs=1, static=False))
    assert (epochs.real_bits - 6).abs().max() < 0.5
    assert epochs.average_bits.max() < 5.2
    assert epochs.precision.max() < 0.25  # the objective's term is of the same bits


def company(tiny, n=6):
    "A model, a mix of its fewest and most bits, windows, and exact predictions."
    model = LayerwiseQuantizeForCausalLM.from_quantized(tiny)
    windows = text_windows(load_tokenizer(tiny), ["tasks"], 24, n)
    mix = {name: model.precisions[-1 if k % 3 == 0 else 0] for k, name in enumerate(linear_bytes(model))}
    return model, mix, windows, exact_logits(model, windows)


def test_slopes_in_company_are_those_of_finite_differences(tiny):
    "The divergence of a mix as a linear's weight goes a little way towards another precision."
    model, mix, windows, exact = company(tiny)
    ids, labels = collate(windows, 8)
    slopes, curvatures = static_mix.batch_moves(model, ids, labels, exact, mix, [torch.Generator().manual_seed(0)]) / len(windows)
    linears = dict(zip(mix, (linear for own in model._linears for linear in own)))

    def divergence(name, bits, share):
        linear = linears[name]
        move = share * (linear.nested(bits).dequantize(bits) - linear.nested(mix[name]).dequantize(mix[name]))
        handle = linear.register_forward_hook(lambda module, args, output: output + args[0] @ move.T)
        found = static_mix.least_divergent(model, [mix], windows, 8, exact)[1].kl.mean()
        handle.remove()
        return found

    for k, bits in enumerate(model.precisions):
        for position, name in enumerate(mix):
            if bits == mix[name]:
                assert slopes[position, k] == curvatures[position, k] == 0
            elif position % 4 == 1:
                expected = (divergence(name, bits, 0.05) - divergence(name, bits, -0.05)) / 0.1
                assert slopes[position, k].item() == pytest.approx(expected, rel=0.05, abs=2e-5), (name, bits)


def test_curvatures_of_the_most_bits_are_the_costs_of_each_linear_alone(tiny):
    "And a mix may name its linears in any order."
    model, mix, windows, exact = company(tiny)
    ids, labels = collate(windows, 8)
    draws = lambda: [torch.Generator().manual_seed(draw) for draw in range(3)]
    top = dict.fromkeys(mix, model.precisions[-1])
    slopes, curvatures = static_mix.batch_moves(model, ids, labels, exact, top, draws())
    costs = static_mix.batch_token_costs(model, ids, labels, draws())
    torch.testing.assert_close(curvatures, costs.mean(0).sum((0, 1)))
    assert curvatures[:, 0].min() > 0 and slopes.abs().max() < 1e-4 * curvatures.max() + 1e-6
    turned = dict(reversed(mix.items()))
    assert torch.equal(*(static_mix.batch_moves(model, ids, labels, exact, each, draws()) for each in (mix, turned)))


def test_a_mix_that_is_moved_keeps_to_its_bytes_and_is_never_worse(tiny):
    "On the windows that choose; where nothing is better the mix stays."
    model, mix, windows, exact = company(tiny, 12)
    sizes = {name: dict(own) for name, own in linear_bytes(model).items()}
    budget = sum(sizes[name][bits] for name, bits in mix.items())
    mixes = static_mix.moved_mixes(model, mix, budget, windows[:6], 8)
    assert mixes[0] == mix and len(mixes) > 1
    assert all(sum(sizes[name][bits] for name, bits in moved.items()) <= budget for moved in mixes)
    chosen, found = static_mix.least_divergent(model, mixes, windows[6:], 8, exact[6:])
    kl, scores = found.kl.mean(), [static_mix.least_divergent(model, [each], windows[6:], 8, exact[6:])[1].kl.mean() for each in mixes]
    assert kl == min(scores) < scores[0] and mixes[scores.index(kl)] == chosen
    assert static_mix.least_divergent(model, [mix, mix | {}], windows, 8, exact)[0] is mix


def test_a_mix_without_room_is_not_measured_for_moves(tiny, monkeypatch):
    "Of the fewest bits, whose bytes are all that there are to spend, and of the most."
    model, mix, windows, _ = company(tiny)
    monkeypatch.setattr(static_mix, "batch_moves", lambda *_: pytest.fail("measured"))
    for bits, more in ((model.precisions[0], 1.0), (model.precisions[-1], 2.0)):
        alike = dict.fromkeys(mix, bits)
        budget = more * sum(own[bits] for own in linear_bytes(model).values())
        assert static_mix.moved_mixes(model, alike, budget, windows, 8) == [alike]


@pytest.mark.parametrize("target", [6.0, 7.0])  # routers that were not fitted read 5.3 or 6.5, and 6.5 or 7.9
def test_where_no_router_is_trained_the_static_mix_spends_the_budget(tiny, tmp_path, target):
    "A mix of as few bytes as unfitted routers read would waste what was asked for, one of more would exceed it."
    model, epochs = run(router_config(tiny, tmp_path / "run", target_bits=target, least_headroom=1.0, static=True))
    facts = epochs.attrs["static"]
    assert target - 0.5 < facts["static"]["real_bits"] <= target + 1e-6
    assert facts["kept"] == "static" or (facts["routed"]["real_bits"] <= target + 0.05 and facts["routed"]["kl"] < facts["static"]["kl"])
    assert (model.assignment is not None) == (facts["kept"] == "static")


def test_a_curriculum_begins_with_the_easy_third_and_ends_cold(tiny, tmp_path):
    options = dict(curriculum=True, num_epochs=4, batch_size=1, pretrain="none")
    model = LayerwiseQuantizeForCausalLM.from_quantized(tiny)
    windows = text_windows(load_tokenizer(tiny), ["tasks"], 24, 9)
    trainer = RouterTrainer(model, router_config(tiny, tmp_path / "run", **options), windows, windows)
    with model.set_precision(8):
        easy = score_windows(model, windows, 8).ce.argsort()
    epochs = [{id(window) for window in trainer.epoch_order(epoch)} for epoch in range(4)]
    assert epochs == [{id(windows[i]) for i in easy[:n]} for n in (3, 6, 9, 9)]
    trainer.fit()
    steps = trainer.history["steps"]
    assert len(steps) == trainer.total == 27
    assert steps[0]["temperature"] == 1 and steps[-1]["temperature"] < 1.15 * 0.05
    assert steps[-1]["learning_rate"] < 0.01 * max(row["learning_rate"] for row in steps)


def test_no_pass_is_larger_than_was_asked_for(tiny, tmp_path, monkeypatch):
    "Steps have batch_size windows, all other passes eval_batch_size; choosing alone computes no logits."
    seen, heads = set(), []
    loaded = LayerwiseQuantizeForCausalLM.from_quantized

    def watched(*args, **kwargs):
        model = loaded(*args, **kwargs)
        model.model.get_input_embeddings().register_forward_hook(lambda m, a, y: seen.add(tuple(y.shape[:2])))
        model.model.get_output_embeddings().register_forward_hook(lambda m, a, y: heads.append(tuple(y.shape[:2])))
        return model

    monkeypatch.setattr(LayerwiseQuantizeForCausalLM, "from_quantized", watched)
    options = dict(num_epochs=1, target_bits=5.0, curriculum=True, num_validation=7, num_costs=4)
    run(router_config(tiny, tmp_path / "run", batch_size=1, eval_batch_size=3, **options))
    assert max(windows for windows, _ in seen) == 3
    assert min(tokens for _, tokens in seen) < max(tokens for _, tokens in seen) == 24 and {tokens for _, tokens in heads} == {24}
    large = SimpleNamespace(config=tiny_config("llama", vocab_size=128_000))
    assert windows_at_once(large, 512) == 4


def test_the_bar_shows_loss_and_average_bits(tiny, tmp_path, monkeypatch):
    shown = []

    class Bar(tqdm):
        def set_postfix(self, values, **kwargs):
            shown.append(values)

    monkeypatch.setattr("merge_lab.training.tqdm", Bar)
    run(router_config(tiny, tmp_path / "run", num_epochs=1))
    steps = json.loads((tmp_path / "run" / "training_history.json").read_text())["steps"]
    assert len(shown) == len(steps) > 0
    for values, row in zip(shown, steps):
        assert values == dict(
            Loss=f"{row['loss']:.4f}",
            CE=f"{row['ce']:.4f}",
            Prec=f"{row['precision']:.4f}",
            AvgPrec=f"{row['average_bits']:.2f}",
        )


def test_few_windows_leave_the_static_assignment(tiny, tmp_path):
    "Costs of four windows: none can be held back, so nothing is learned from the prompts."
    config = router_config(tiny, tmp_path / "run", num_costs=4, num_epochs=0)
    model, _ = run(config)
    assert all((layer[-1].weight == 0).all() for layer in model.routers.layers)
    assert (model.routers.costs[:, 0] > 0).all()


def test_a_price_alone_is_learned(tiny, tmp_path):
    "From many bits downwards: with no weight on the cross-entropy the routers go to the fewest bits."
    options = dict(weight_ce=0.0, weight_precision=1.0, num_epochs=10, learning_rate=0.05, pretrain="none")
    config = router_config(tiny, tmp_path / "run", **options)
    model = LayerwiseQuantizeForCausalLM.from_quantized(tiny)
    for layer in model.routers.layers:
        layer[-1].bias.data[-1] = -1.0  # the most bits seem to cost least
    windows = text_windows(load_tokenizer(tiny), ["tasks"], 24, 8)
    assert score_windows(model, windows, 8).bits.mean() == 8
    epochs = RouterTrainer(model, config, windows, windows).fit()
    assert epochs.average_bits.iloc[-1] == 3


def test_what_is_trained_with_dropout_chooses_without(tiny, tmp_path):
    model, _ = run(router_config(tiny, tmp_path / "run", dropout=0.5, num_epochs=0, num_costs=4))
    assert not model.training and not model.routers.training
    model.routers.layers[0][-1].weight.data.normal_(std=3.0)  # so that dropout would show
    ids = torch.stack([window.input_ids for window in text_windows(load_tokenizer(tiny), ["tasks"], 24, 60)])
    assert torch.equal(model.infer_forward(ids).bits, model.infer_forward(ids).bits)


@pytest.fixture(scope="module")
def measured(tiny):
    "A model, windows, and the costs of every layer and precision."
    model = LayerwiseQuantizeForCausalLM.from_quantized(tiny)
    windows = text_windows(load_tokenizer(tiny), ["tasks"], 24, 20)
    return model, windows, *measure_costs(model, windows, 8, batch_size=7)


def test_a_cost_is_the_divergence_that_one_layer_makes(measured):
    model, windows, costs, pooled = measured
    ids, labels = collate(windows, 8)
    scored = labels[:, 8:] != -100
    assert not scored.all() and scored.any(1).all()  # questions do not count
    for layer, bits in ((0, 3), (1, 5)):
        assignment = [8, 8]
        assignment[layer] = bits
        with model.set_precision(8):
            exact = model.infer_forward(ids).logits[:, 7:-1].double().log_softmax(-1)
        with model.set_precision(assignment):
            found = model.infer_forward(ids).logits[:, 7:-1].double().log_softmax(-1)
        wanted = ((exact.exp() * (exact - found)).sum(-1) * scored).sum(1) / scored.sum(1)
        torch.testing.assert_close(costs[:, layer, bits - 3], wanted.float(), atol=1e-7, rtol=1e-3)
    embedded = torch.stack([model.model.get_input_embeddings()(row[: (own != -100).int().argmax()]).mean(0) for row, own in zip(ids, labels)])
    torch.testing.assert_close(pooled[:, 0], embedded, atol=1e-5, rtol=1e-5)


def test_routers_that_know_nothing_are_the_static_assignment(measured):
    "Without factors every prompt gets one assignment, and at any price it lies on the greedy path."
    model, windows, costs, _ = measured
    mean = costs.mean(0)
    set_static(model.routers, mean)
    path = greedy_assignments(
        lambda a: sum(mean[n, bits - 3].item() for n, bits in enumerate(a)), 2, model.precisions
    )
    known, seen = [assignment for assignment, _ in path], []
    for price in (0.0, *(2.0**-k for k in range(20))):
        model.routers.price.fill_(price)
        bits = score_windows(model, windows, 8)[["layer_0", "layer_1"]].to_numpy()
        assert (bits == bits[0]).all()
        seen.append(bits[0].tolist())
    assert all(assignment in known for assignment in seen)
    assert len({tuple(assignment) for assignment in seen}) > 5


def test_what_the_prompt_says_is_used(measured):
    "Costs ten times as high for half of the windows: those get more bits, at the same average."
    model, _, costs, pooled = measured
    marked = torch.arange(20) % 2 == 0
    shifted = pooled + 50 * torch.where(marked, 1.0, -1.0)[:, None, None] * torch.eye(1, pooled.shape[-1])
    torch.manual_seed(0)
    routers = Routers(2, pooled.shape[-1], model.precisions)
    share = fit_costs(routers, costs.mean(0) * torch.where(marked, 10.0, 1.0)[:, None, None], shifted)
    assert share > 0.9
    routers.price.fill_(0.05)
    bits = torch.stack([routers(n, shifted[:, n]).argmax(-1) for n in range(2)], 1).float().mean(1)
    assert bits[marked].min() >= bits[~marked].max() + 1


def test_what_the_prompt_explains_is_said_without_dropout(measured):
    _, _, costs, pooled = measured
    routers, held = Routers(2, pooled.shape[-1], [3, 4, 5, 6, 7, 8], dropout=0.5), torch.arange(20) % 5 == 4
    share, counted = fit_costs(routers, costs, pooled), costs[~held].mean(0) > 0
    assert not routers.training and share != 0
    factors = torch.stack([routers.factors(n, pooled[held, n]) for n in range(2)], dim=1)
    ratios = costs / costs[~held].mean(0).where(counted, 1.0)
    assert share == explained(factors, ratios[held], counted)


@pytest.mark.parametrize("target", [3.0, 8.0])
def test_a_budget_at_either_end_is_met(measured, target):
    model, windows, costs, pooled = measured
    fit_costs(model.routers, costs, pooled)
    assert fit_price(model, windows, 8, target) == target


def test_a_start_from_costs_obeys_the_weights(tiny, tmp_path):
    "Without a target the price is the objective's: the dearer a bit, the fewer are chosen, before any training."
    bits = []
    for weight in (1e-7, 1e-4, 1.0):
        options = dict(weight_ce=1.0, weight_precision=weight, num_epochs=0)
        _, epochs = run(router_config(tiny, tmp_path / str(weight), **options))
        bits.append(epochs.average_bits.iloc[0])
    assert bits[0] > bits[1] > bits[2] == 3


def test_eight_bits_keep_the_perplexity_on_held_out_text(tmp_path):
    original = bundled_path("models/deep")
    config = QuantizeConfig(str(original), str(tmp_path / "any"), dataset=["prose"], seq_len=64, num_examples=12, dtype="float32", device="cpu")
    model = LayerwiseQuantizeForCausalLM.from_quantized(run_quantize(config))
    windows = text_windows(load_tokenizer(original), ["prose"], 64, 24, "test")
    ids, labels = collate(windows, 16)
    with torch.no_grad():
        dense = window_losses(load_model(original)(input_ids=ids).logits, labels).mean()
    losses = []
    for bits in (3, 8):
        with model.set_precision(bits):
            losses.append(score_windows(model, windows, 16).ce.mean())
    assert abs(math.exp(losses[1] - dense.item()) - 1) < 0.005
    assert losses[0] > losses[1]


def on_line(points: dict, bits: float) -> float:
    "The value at `bits` between its neighbours."
    low, high = max(b for b in points if b <= bits), min(b for b in points if b >= bits)
    share = (bits - low) / (high - low) if high > low else 0.0
    return (1 - share) * points[low] + share * points[high]


def test_a_fitted_router_beats_what_ignores_the_input(tmp_path):
    "Live and small: the bundled base model on text that it knows and text that it does not, at four bits."
    original, kinds = bundled_path("models/base"), ["tasks", "prose"]
    config = QuantizeConfig(str(original), str(tmp_path / "any"), parent_precision=6, dtype="float32")
    options = dict(dataset=kinds, seq_len=48, num_examples=12, device="cpu")
    torch.manual_seed(0)
    model = LayerwiseQuantizeForCausalLM.from_quantized(run_quantize(dataclasses.replace(config, **options)))
    model.slot.keep_all = True
    sizes = dict(train=80, validation=40, test=80)
    windows = {split: text_windows(load_tokenizer(original), kinds, 48, n, split) for split, n in sizes.items()}
    exact = exact_logits(model, windows["test"])

    def score(assignment=None):
        with model.set_precision(assignment):
            return score_windows(model, windows["test"], 16, exact=exact)[["bits", "ce", "kl"]].mean()

    costs, pooled = measure_costs(model, windows["train"], 16)
    mean, layers = costs.mean(0), costs.shape[1]
    path = greedy_assignments(
        lambda a: sum(mean[n, bits - 3].item() for n, bits in enumerate(a)), layers, model.precisions
    )
    static = {sum(a) / layers: score(a).kl for a, _ in path if abs(sum(a) / layers - 4) < 1}
    fixed = {bits: score(bits) for bits in (3, 4, 5)}
    fit_costs(model.routers, costs, pooled)
    fit_price(model, windows["validation"], 16, 4.0)
    routed = score()
    assert abs(routed.bits - 4) < 0.1
    assert routed.ce < on_line({b: row.ce for b, row in fixed.items()}, routed.bits)
    assert routed.kl < 0.6 * on_line({b: row.kl for b, row in fixed.items()}, routed.bits)
    assert routed.kl < on_line(static, routed.bits)


@pytest.fixture(scope="module")
def benchmark():
    "The committed measurement: rows and facts by seed."
    return json.loads((bundled_path("benchmarks") / "router.json").read_text())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measured_routers_are_at_or_below_the_fixed_line_on_every_seed(benchmark, seed):
    "The line is drawn here, from the rows of the fixed precisions."
    rows = [row for row in benchmark["rows"] if row["seed"] == seed]
    line = {row["bits"]: row["ce"] for row in rows if row["method"] == "fixed"}
    routed = [row for row in rows if row["method"] == "router"]
    assert sorted(line) == [3, 4, 5, 6, 7, 8] and len(routed) == 8
    for row in routed:
        above = row["ce"] - on_line(line, row["bits"])
        assert above <= 0, (row["target"], above)
        assert row["against"]["fixed"]["mean"] == pytest.approx(above, abs=1e-6)


def test_measured_routers_beat_every_choice_that_ignores_the_input(benchmark):
    "At each budget, over three seeds: below fixed bits and below both static assignments, at equal average bits."
    rows = [row for row in benchmark["rows"] if row["method"] == "router"]
    budgets = {row["target"] for row in rows}
    assert len(budgets) == 8 and {row["seed"] for row in rows} == {0, 1, 2}
    for budget in budgets:
        found = [row for row in rows if row["target"] == budget]
        assert len(found) == 3 and all(abs(row["bits"] - budget) <= 0.05 for row in found)
        assert len(found[0]["against"]) == 3
        for opponent in found[0]["against"]:
            gaps = [row["against"][opponent]["mean"] for row in found]
            assert sum(gaps) / 3 <= 0, (budget, opponent, gaps)


def test_measured_models_keep_the_perplexity_at_eight_bits(benchmark):
    for facts in benchmark["facts"]:
        (at_eight,) = [
            row["ce"]
            for row in benchmark["rows"]
            if (row["seed"], row["method"], row["bits"]) == (facts["seed"], "fixed", 8)
        ]
        assert abs(math.exp(at_eight - facts["float_ce"]) - 1) < 0.005


@pytest.mark.parametrize("kind", [QuantizeConfig, RouterConfig])
def test_the_command_line_reads_the_config(kind):
    fields = [
        (f.name, f.type, dataclasses.field(default=f.default) if f.default is not dataclasses.MISSING else dataclasses.field(default_factory=f.default_factory))
        for f in dataclasses.fields(kind)
    ]
    parser = HfArgumentParser(dataclasses.make_dataclass("Flags", fields))
    (parsed,) = parser.parse_args_into_dataclasses(["--dataset", "c4", "prose", "--max_length", "128", "--device", "cpu"])
    config = kind(**vars(parsed))
    assert (config.dataset, config.seq_len, config.device) == (["c4", "prose"], 128, "cpu")
