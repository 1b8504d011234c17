"""Components that other tools made: what is repaired, aligned, dequantised, told or refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from merge_lab import checkpoints, components
from merge_lab.checkpoints import component_names, load_tokenizer, read_component, UnreadableComponent
from merge_lab.cli import main
from merge_lab.components import align_vocabulary, load_components, load_model, preflight, untie_embeddings
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.quantized import AWQ_ORDER
from merge_lab.writer import mended_generation, save_plain
from test_components import edit_json, errors, notes, row, save_component, save_tokenizer, WORDS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache of each test's own."
    monkeypatch.setenv("MERGE_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pair(tmp_path):
    return [save_component(tmp_path / name, seed=i) for i, name in enumerate("ab")]


@pytest.fixture
def told(caplog):
    "What was logged of this package, as one text."
    caplog.set_level(logging.INFO, logger="merge_lab")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


# Generation configs that transformers loads and refuses to save

REFUSED = [
    dict(temperature=0.6, top_p=0.9),
    dict(top_k=20, do_sample=False),
    dict(min_p=0.1),
    dict(epsilon_cutoff=0.5, num_beams=4),
    dict(temperature=0.0),
    dict(length_penalty=0.5, early_stopping=True),
    dict(pad_token_id=-1),
    dict(num_return_sequences=3),
]


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_refused_generation_config_is_mended_and_told(settings, told, tmp_path):
    config = GenerationConfig(eos_token_id=[2, 5])
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError):
        config.save_pretrained(tmp_path)
    mended = mended_generation(config)
    mended.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]
    sampling = {"temperature", "top_p", "top_k", "min_p"} & {name for name, value in settings.items() if value}
    assert bool(mended.do_sample) == bool(sampling)
    assert ("do_sample" if sampling else next(iter(settings))) in told()
    assert all(getattr(mended, name) == settings[name] for name in sampling)


@pytest.mark.parametrize("settings", REFUSED[:5], ids=str)
def test_generation_config_never_stops_an_export(settings, pair, tmp_path, told):
    for path in pair:
        edit_json(path / "generation_config.json", **settings)
    merger = Merger.from_config(MergerConfig([str(path) for path in pair]))
    merger.model.generation_config.eos_token_id = [2, 3]  # a change makes transformers strict
    merger.save_merged(tmp_path / "merged")
    model = load_model(pair[0])
    model.generation_config.eos_token_id = [2, 3]
    save_plain(model, tmp_path / "plain")
    for folder in ("merged", "plain"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert "is mended" in told()


# One vocabulary


def test_alignment_writes_all_or_nothing(pair, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    calls, save = [], components.save_plain

    def fails_late(model, folder, tokenizer=None):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("the disk is full")
        save(model, folder, tokenizer)

    monkeypatch.setattr(components, "save_plain", fails_late)
    with pytest.raises(OSError, match="disk is full"):
        align_vocabulary(pair, tmp_path / "out", policy="pad")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    calls[:] = [None]
    with pytest.raises(OSError, match="disk is full"):
        untie_embeddings(pair[0], tmp_path / "untied")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]
    monkeypatch.undo()
    copies = align_vocabulary(pair, tmp_path / "out", policy="pad")
    assert preflight(copies).ok.all() and (tmp_path / "out" / "mine.txt").exists()


def chat_pair(tmp_path, architecture="llama", **settings):
    "Two fine-tunes that gave the same new ids to other tokens."
    own = {"a": [*WORDS, "user", "end"], "b": [*WORDS, "tool", "user", "call"]}
    return [
        save_component(tmp_path / name, architecture, words=words, vocab_size=16, seed=i, **settings)
        for i, (name, words) in enumerate(own.items())
    ], own


@pytest.mark.parametrize("architecture, tied", [("llama", False), ("llama", True), ("qwen2", False), ("gpt2", True)])
def test_union_follows_tokens_and_takes_rows_from_whoever_has_them(tmp_path, architecture, tied):
    paths, own = chat_pair(tmp_path, architecture, tie_word_embeddings=tied)
    assert errors(preflight(paths)) == ["tokenizer vocabulary"]
    copies = align_vocabulary(paths, tmp_path / "out", policy="union")
    report = preflight(copies)
    assert report.ok.all() and notes(report) == []
    union = [*own["a"], "tool", "call"]
    tokenizer = load_tokenizer(copies[1])
    assert tokenizer.convert_ids_to_tokens(range(len(union))) == union
    assert tokenizer("the call cat")["input_ids"] == [3, union.index("call"), 4]
    before = [load_model(path).get_input_embeddings().weight for path in paths]
    after = [load_model(path).get_input_embeddings().weight for path in copies]
    for i, token in enumerate(union):
        for component, words in enumerate(own.values()):
            giver = component if token in words else 1 - component
            row_of = list(own.values())[giver].index(token)
            assert torch.equal(after[component][i], before[giver][row_of]), token
    shared = [words.index(token) for words in (own["b"],) for token in WORDS]
    model, aligned = load_model(paths[1]), load_model(copies[1])
    ids = torch.arange(8)[None]
    torch.testing.assert_close(aligned(ids).logits[..., : len(WORDS)], model(ids).logits[..., shared])


def test_union_keeps_the_flags_of_added_tokens(tmp_path):
    paths = [save_component(tmp_path / name, vocab_size=20) for name in "ab"]
    for path, added in zip(paths, (["<|x|>"], ["<|y|>", "<|x|>"])):
        tokenizer = load_tokenizer(path)
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        tokenizer.chat_template = f"{{{{ messages }}}} {path.name}"
        tokenizer.save_pretrained(path)
    tokenizer = load_tokenizer(align_vocabulary(paths, tmp_path / "out", policy="union")[1])
    ids = tokenizer("the<|y|>cat<|x|>")["input_ids"]
    assert ids == [3, len(WORDS) + 1, 4, len(WORDS)] and tokenizer.chat_template.endswith("a")
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["the", "cat"]


def test_union_refuses_other_rules_and_writes_nothing(tmp_path):
    from tokenizers.normalizers import Lowercase

    paths, own = chat_pair(tmp_path)
    save_tokenizer(paths[1], own["b"], normalizer=Lowercase())
    with pytest.raises(ValueError, match="another normalizer"):
        align_vocabulary(paths, tmp_path / "out", policy="union")
    assert not (tmp_path / "out").exists()


def test_align_command(tmp_path, capsys):
    paths, _ = chat_pair(tmp_path)
    assert main(["preflight", *map(str, paths)]) == 1 and "merge-lab align" in capsys.readouterr().out
    assert main(["align", *map(str, paths), "--output_dir", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert main(["preflight", *written]) == 0
    assert main(["align", *map(str, paths), "--policy", "cut", "--output_dir", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("architecture, tied", [("llama", False), ("llama", True), ("gpt2", True)])
@pytest.mark.parametrize("order", [(11, 16), (16, 11), (13, 16)])
def test_equal_up_to_padding_just_works(tmp_path, architecture, tied, order):
    paths = [
        save_component(tmp_path / str(size), architecture, vocab_size=size, tie_word_embeddings=tied, seed=size) for size in order
    ]
    report = preflight(paths)
    assert report.ok.all() and notes(report) == ["vocabulary size"]
    assert "rows of padding" in row(report, "vocabulary size").remedy
    plain, models = [load_model(path) for path in paths], list(load_components(paths))
    large = plain[order.index(16)].get_output_embeddings().weight
    ids = torch.arange(11)[None]
    for before, after in zip(plain, models):
        rows = before.config.vocab_size
        assert after.config.vocab_size == 16
        torch.testing.assert_close(after(ids).logits[..., :rows], before(ids).logits)
        assert torch.equal(after.get_output_embeddings().weight[rows:], large[rows:])
    merger = Merger.from_config(MergerConfig([str(path) for path in paths]))
    merger.save_merged(tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    assert again.config.vocab_size == 16
    torch.testing.assert_close(again(ids).logits, merger(ids).logits)


def test_other_tokens_are_no_padding(tmp_path):
    paths = [save_component(tmp_path / "a"), save_component(tmp_path / "b", words=[*WORDS, "new"], vocab_size=16)]
    assert errors(preflight(paths)) == ["vocabulary size", "tokenizer vocabulary"]
    short = [save_component(tmp_path / "c", vocab_size=10), save_component(tmp_path / "d", vocab_size=16)]
    assert "vocabulary size" in errors(preflight(short))  # a token has no row


# Quantised weights: each packer is written from the format's description, and gives what its integers stand for


def pack_rows(values, bits):  # (rows, n) of small integers -> (rows, n * bits / 32) int32
    words = torch.zeros(len(values), values.shape[1] * bits // 32, dtype=torch.int64)
    for i in range(values.shape[1]):
        words[:, i * bits // 32] |= values[:, i].long() << (i * bits % 32)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def int8_of_bitsandbytes(name, w):
    scb = w.abs().amax(1)
    q = (w / scb[:, None] * 127).round()
    return {f"{name}.weight": q.to(torch.int8), f"{name}.SCB": scb, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}, q * scb[:, None] / 127


def nf4_of_bitsandbytes(name, w, block=8):
    table = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16) ** 2
    absmax = w.flatten().view(-1, block).abs().amax(1)
    shares = w.flatten().view(-1, block) / absmax[:, None]
    q = (shares[..., None] - table).abs().argmin(-1).flatten()
    state = json.dumps({"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(w.shape)}).encode()
    tensors = {"": (q[::2] << 4 | q[1::2]).to(torch.uint8)[:, None], ".absmax": absmax, ".quant_map": table}
    tensors[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    return {f"{name}.weight{part}": tensor for part, tensor in tensors.items()}, (table[q].view(-1, block) * absmax[:, None]).view(w.shape)


def fp8_blocks(name, w, block=16):
    scale = torch.rand(-(-w.shape[0] // block), -(-w.shape[1] // block)) + 0.5
    each = scale.repeat_interleave(block, 0)[: w.shape[0]].repeat_interleave(block, 1)[:, : w.shape[1]]
    q = (w / each).to(torch.float8_e4m3fn)
    return {f"{name}.weight": q, f"{name}.weight_scale_inv": scale}, q.float() * each


def fp8_tensor(name, w):
    q = (w / 0.01).to(torch.float8_e4m3fn)
    scales = {f"{name}.weight_scale": torch.tensor([0.01]), f"{name}.input_scale": torch.tensor([1.0])}
    return {f"{name}.weight": q, **scales}, q.float() * 0.01


def compressed_int4(name, w, group=8):
    grouped = w.view(len(w), -1, group)
    scale = grouped.abs().amax(-1) / 7
    q = (grouped / scale[..., None]).round().clamp(-8, 7)
    tensors = {"packed": pack_rows(q.view(w.shape) + 8, 4), "scale": scale, "shape": torch.tensor(w.shape)}
    return {f"{name}.weight_{part}": tensor for part, tensor in tensors.items()}, (q * scale[..., None]).view(w.shape)


def integers(w, group):  # w (out, in) -> q (in, out), zeros and scales (groups, out)
    grouped = w.t().reshape(-1, group, len(w))
    low, high = grouped.amin(1), grouped.amax(1)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(1, 15)
    q = (grouped / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    return q.flatten(0, 1), zero, scale, ((q - zero[:, None]) * scale[:, None]).flatten(0, 1).t()


def gptq(name, w, group=8):
    q, zero, scale, want = integers(w, group)
    order = torch.arange(len(q), dtype=torch.int32) // group
    packed = {"qweight": pack_rows(q.t(), 4).t().contiguous(), "qzeros": pack_rows(zero - 1, 4), "scales": scale, "g_idx": order}
    return {f"{name}.{part}": tensor for part, tensor in packed.items()}, want


def awq(name, w, group=8):
    q, zero, scale, want = integers(w, group)
    place = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # of the column that each place of a word holds
    mixed = lambda x: x.unflatten(1, (-1, 8))[..., place].flatten(1)
    assert place[torch.tensor(AWQ_ORDER)].tolist() == list(range(8))
    packed = {"qweight": pack_rows(mixed(q), 4), "qzeros": pack_rows(mixed(zero), 4), "scales": scale}
    return {f"{name}.{part}": tensor for part, tensor in packed.items()}, want


PACKERS = {
    "int8": (int8_of_bitsandbytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (nf4_of_bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp8 blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "fp8 tensor": (fp8_tensor, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "packed": (compressed_int4, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 8}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
}


def quantise(folder, kind):
    "Quantise the linears of a component in its place; returns what they then stand for."
    packer, section = PACKERS[kind]
    stored, want = {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        if "proj" in name and name.endswith(".weight"):
            packed, want[name] = packer(name.removesuffix(".weight"), w)
            stored |= packed
        else:
            stored[name] = want[name] = w
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config=section)
    return want


@pytest.mark.parametrize("kind", PACKERS)
def test_quantised_component_is_dequantised_and_told(kind, pair, tmp_path, told):
    want = quantise(pair[1], kind)
    report = preflight(pair)
    assert report.ok.all() and notes(report) == ["origin"] and PACKERS[kind][1]["quant_method"] in row(report, "origin").obstacle
    assert "is dequantised" in told() and "stays lost" in told()
    state = load_model(pair[1]).state_dict()
    for name, tensor in want.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    plain = load_model(pair[0]).state_dict()
    assert any(not torch.equal(want[name], plain[name]) for name in want)
    merger = Merger.from_config(MergerConfig([str(path) for path in pair]))
    merger.save_merged(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert load_tokenizer(pair[1])("cat")["input_ids"] == [4]


def test_copies_are_made_once_and_anew_for_a_changed_file(pair, cache):
    quantise(pair[0], "int8")
    first = read_component(pair[0]).folder
    stamp = (first / "config.json").stat().st_mtime_ns
    checkpoints._dequantized.cache_clear()
    assert read_component(pair[0]).folder == first and (first / "config.json").stat().st_mtime_ns == stamp
    weights = load_file(pair[0] / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.SCB"] *= 2
    save_file(weights, pair[0] / "model.safetensors", {"format": "pt"})
    os.utime(pair[0] / "model.safetensors", ns=(1, 1))
    second = read_component(pair[0]).folder
    name = "model.layers.0.mlp.up_proj.weight"
    assert second != first and len(list(cache.iterdir())) == 2
    torch.testing.assert_close(load_model(second).state_dict()[name], 2 * load_model(first).state_dict()[name])


def test_a_copy_that_is_cut_short_leaves_nothing(pair, cache, monkeypatch):
    quantise(pair[0], "nf4")
    real = checkpoints.save_tensors
    monkeypatch.setattr(checkpoints, "save_tensors", lambda *args: (real(*args), (_ for _ in ()).throw(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        load_model(pair[0])
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    os.environ["MERGE_LAB_CACHE"] = str(cache)
    assert load_model(pair[0]) is not None


@pytest.mark.parametrize(
    "section, reason",
    [
        ({"quant_method": "aqlm"}, "'aqlm' are not known here"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "layout of its own"),
        ({"quant_method": "fp8"}, "no file holds a quantised tensor"),
    ],
)
def test_what_cannot_be_dequantised_is_refused_with_its_reason(pair, section, reason):
    edit_json(pair[1] / "config.json", quantization_config=section)
    report = preflight(pair)
    assert errors(report) == ["files"] and reason in row(report, "files").obstacle
    assert "before quantisation" in row(report, "files").remedy
    with pytest.raises(UnreadableComponent, match="quantised"):
        load_model(pair[1])


# GGUF


def write_gguf(file, kind="Q8_0", seed=0):
    "A tiny Llama of llama.cpp's layout."
    gguf = pytest.importorskip("gguf")
    writer, kind = gguf.GGUFWriter(str(file), "llama"), getattr(gguf.GGMLQuantizationType, kind)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    torch.manual_seed(seed)
    shapes = {"token_embd": (len(WORDS), 32), "output": (len(WORDS), 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    held = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in held.items():
        packed = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        held[name] = torch.tensor(gguf.quants.dequantize(packed, kind))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("kind, dtype", [("Q8_0", torch.bfloat16), ("Q4_0", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_gguf_is_a_component(tmp_path, kind, dtype, told, cache):
    paths = []
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name)
        held = write_gguf(tmp_path / name / f"{name}.gguf", kind, seed=i)
        paths.append(tmp_path / name if i else tmp_path / name / f"{name}.gguf")
    report = preflight(paths)
    assert report.ok.all() and kind in row(report, "origin").obstacle
    assert list(report.columns[1:3]) == ["a.gguf", "b"] and "is dequantised" in told() and kind in told()
    model = load_model(paths[1], dtype="auto")
    assert model.dtype == dtype
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.float(), held["blk.0.ffn_up"], rtol=1e-2, atol=1e-3)
    merger = Merger.from_config(MergerConfig([str(path) for path in paths], dtype="float32"))
    merger.save_merged(tmp_path / "merged")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(load_model(tmp_path / "merged")(ids).logits, merger(ids).logits)
    assert len(list(cache.iterdir())) == 2


def test_gguf_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    save_tokenizer(tmp_path / "a")
    write_gguf(tmp_path / "a" / "a.gguf")
    shutil.copyfile(tmp_path / "a" / "a.gguf", tmp_path / "a" / "b.gguf")
    with pytest.raises(UnreadableComponent, match="2 GGUF files .*Give one of them"):
        load_model(tmp_path / "a")
    data = (tmp_path / "a" / "b.gguf").read_bytes()
    (tmp_path / "a" / "b.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableComponent, match=r"b.gguf: the GGUF is damaged|cannot read this GGUF"):
        load_model(tmp_path / "a" / "b.gguf")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


# Weights that are no numbers


def spoil(folder, name, value, place):
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[place] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(pair, value, name):
    spoil(pair[1], name, value, slice(None))
    report = preflight(pair)
    assert errors(report) == ["files"] and f"{name} in b holds" in row(report, "files").obstacle
    with pytest.raises(UnreadableComponent, match=name):
        load_model(pair[1])


def test_one_number_out_of_many_is_found_while_loading(tmp_path):
    path = save_component(tmp_path / "a", hidden_size=128, intermediate_size=1024)
    spoil(path, "model.layers.0.mlp.up_proj.weight", float("nan"), 50_000)
    with pytest.raises(UnreadableComponent, match=r"up_proj.weight .* holds 1 of"):
        load_model(path)


# File and config


def test_a_files_dtype_counts_and_is_told(pair):
    edit_json(pair[0] / "config.json", dtype="bfloat16")
    report = preflight(pair)
    assert report.ok.all() and "says bfloat16" in row(report, "file and config").obstacle
    assert load_model(pair[0], dtype="auto").dtype == torch.float32
    assert {model.dtype for model in load_components(pair)} == {torch.float32}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_head_beside_a_tied_config_counts_and_is_told(tmp_path, architecture):
    paths = [save_component(tmp_path / name, architecture, tie_word_embeddings=False, seed=i) for i, name in enumerate("ab")]
    edit_json(paths[0] / "config.json", tie_word_embeddings=True)
    report = preflight(paths)
    assert report.ok.all() and "a head that differs" in row(report, "file and config").obstacle
    tied = save_component(tmp_path / "tied", architecture, tie_word_embeddings=True)
    assert errors(preflight([paths[0], tied])) == ["tied embeddings"]
    head = load_file(paths[0] / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load_model(paths[0]).lm_head.weight, head)
    merger = Merger.from_config(MergerConfig([str(path) for path in paths]))
    merger.save_merged(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(8)[None]
    torch.testing.assert_close(load_model(tmp_path / "merged")(ids).logits, merger(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_vocab_size_against_rows_is_refused(tmp_path, architecture):
    paths = [save_component(tmp_path / name, architecture) for name in "ab"]
    edit_json(paths[1] / "config.json", vocab_size=16)
    report = preflight(paths)
    assert errors(report) == ["files"] and "vocab_size 16" in row(report, "files").obstacle
    edit_json(paths[1] / "config.json", vocab_size=len(WORDS))  # the remedy
    assert preflight(paths).ok.all()


@pytest.mark.parametrize("settings", [dict(max_new_tokens=0), dict(cache_implementation="odd"), dict(early_stopping="later")], ids=str)
def test_generation_config_that_cannot_be_loaded_is_refused(pair, settings):
    edit_json(pair[1] / "generation_config.json", **settings)
    report = preflight(pair)
    assert errors(report) == ["files"] and "generation_config.json" in row(report, "files").obstacle
    with pytest.raises(UnreadableComponent, match="generation_config.json"):
        load_model(pair[1])


# Traps of other tools


@pytest.mark.parametrize("shards", [False, True])
def test_weights_beside_an_adapter_are_read_once(pair, shards):
    from peft import get_peft_model, LoraConfig

    model = get_peft_model(load_model(pair[0]), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(pair[0])
    merged = model.merge_and_unload()
    want = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    (pair[0] / "model.safetensors").unlink()
    merged.save_pretrained(pair[0], max_shard_size="8KB" if shards else "1GB")
    assert (pair[0] / "model.safetensors").exists() != shards
    state = load_model(pair[0]).state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)
    report = preflight(pair)
    assert report.ok.all() and "adapter is not applied" in row(report, "origin").obstacle


def test_traps_of_mergekit_are_named(tmp_path):
    ours = save_component(tmp_path / "ours", vocab_size=16)
    theirs = save_component(tmp_path / "theirs", eos_token_id=5)
    (theirs / "generation_config.json").unlink()
    (theirs / "mergekit_config.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    report = preflight([theirs, ours])
    said = row(report, "origin").obstacle
    assert report.ok.all() and row(report, "origin").level == "note"
    assert "by chance" in said and "eos_token_id 5" in said and "vocab_size 11" in said
    assert "no generation_config.json" in said and "cut to the 11 tokens" in said
    (theirs / "mergekit_config.yml").write_text("merge_method: ties\nbase_model: base\n")
    assert "by chance" not in row(preflight([theirs, ours]), "origin").obstacle


# The hub's cache


def in_cache(root, name, path):
    folder = root / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("f" * 40)
    (folder / "blobs").mkdir()
    (folder / "snapshots" / ("f" * 40)).mkdir(parents=True)
    for i, file in enumerate(sorted(path.iterdir())):
        shutil.copyfile(file, folder / "blobs" / str(i))
        os.symlink(Path("../../blobs") / str(i), folder / "snapshots" / ("f" * 40) / file.name)
    return folder


def test_snapshots_are_components_by_path(pair, tmp_path):
    folders = [in_cache(tmp_path / "hub", f"someone/{path.name}", path) for path in pair]
    snapshots = [folder / "snapshots" / ("f" * 40) for folder in folders]
    assert component_names(snapshots) == component_names(folders) == ["a", "b"]
    for paths in (snapshots, folders):
        assert preflight(paths).ok.all()
        merger = Merger.from_config(MergerConfig([str(path) for path in paths]))
        assert torch.equal(next(iter(merger.leaves().values())).weights["weight"][1], load_model(pair[1]).model.embed_tokens.weight)


HUB = """
from merge_lab.components import load_model, preflight

report = preflight(["someone/packed", "someone/b"])
assert report.ok.all(), report
assert "bitsandbytes" in report.set_index("property").loc["origin"].obstacle
print(load_model("someone/packed").model.layers[0].mlp.up_proj.weight.double().sum().item())
"""


def test_quantised_hub_name_offline(pair, tmp_path):
    want = quantise(pair[0], "int8")["model.layers.0.mlp.up_proj.weight"].double().sum().item()
    in_cache(tmp_path / "hub", "someone/packed", pair[0])
    in_cache(tmp_path / "hub", "someone/b", pair[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - want) < 1e-4
