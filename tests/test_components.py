"""Components: every bad input, every obstacle, and loads that leave nothing to chance."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from merge_lab.architecture import silence_dropout
from merge_lab.checkpoints import component_bytes, component_names, load_tokenizer, read_component, read_header, read_tokenizer, UnreadableComponent
from merge_lab.components import align_vocabulary, check_components, IncompatibleComponents, load_components, load_model, preflight, untie_embeddings

WORDS = ["<unk>", "<s>", "</s>"]
WORDS += ["the", "cat", "sat", "on", "a", "mat", "and", "slept"]
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = {
    "llama": dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=64),
}
SIZES["qwen2"] = {**SIZES["llama"], "num_key_value_heads": 1}
ARCHITECTURES = ["llama", "qwen2", "gpt2"]


def save_tokenizer(folder, words=WORDS, normalizer=None, chat_template=None):
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    rules = Tokenizer(model)
    rules.pre_tokenizer = Whitespace()
    if normalizer is not None:
        rules.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def save_component(folder, architecture="llama", words=WORDS, seed=0, **settings):
    settings = {"vocab_size": len(words), **SIZES[architecture], **IDS, **settings}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # no bias is 0 and no norm is 1
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder, words)
    return folder


def edit_json(file, **values):
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, **values}))


def errors(report):
    return list(report[report.level == "error"].property)


def notes(report):
    return list(report[report.level == "note"].property)


def row(report, property):
    return report.set_index("property").loc[property]


@pytest.fixture
def pair(tmp_path):
    return [save_component(tmp_path / name, seed=i) for i, name in enumerate("ab")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fine_tunes_of_one_model_pass(tmp_path, architecture):
    paths = [
        save_component(tmp_path / name, architecture, seed=i)
        for i, name in enumerate("abc")
    ]
    report = preflight(paths)
    assert report.ok.all() and (report.level == "").all()
    assert list(report.columns) == (
        ["property", "a", "b", "c", "ok", "level", "obstacle", "remedy"]
    )
    assert check_components(paths).equals(report)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_gives_the_checkpoint_frozen(tmp_path, architecture):
    path = save_component(tmp_path / "a", architecture)
    model = load_model(path)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    held = load_file(path / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in held.items())
    assert component_bytes(path) == sum(v.nbytes for v in held.values())
    assert component_bytes(path, torch.bfloat16) == component_bytes(path) // 2
    assert load_model(path, dtype="bfloat16").dtype == torch.bfloat16


def test_dtype_auto_is_the_checkpoints_own(pair):
    AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.bfloat16).save_pretrained(
        pair[1]
    )
    assert load_model(pair[1], dtype="auto").dtype == torch.bfloat16
    assert load_model(pair[1]).dtype == torch.float32
    report = preflight(pair)
    assert report.ok.all() and notes(report) == ["dtype"]
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_model(pair[0], dtype=torch.int8)


# Every obstacle has a row of its own


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(rms_norm_eps=1e-5), ["norm eps"]),
        (
            dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            ["RoPE"],
        ),
        (
            dict(rope_parameters={"rope_type": "linear", "factor": 2.0}),
            ["RoPE"],
        ),
        (dict(num_attention_heads=4), ["attention heads"]),
        (dict(hidden_act="gelu"), ["activation"]),
        (dict(tie_word_embeddings=True), ["tied embeddings"]),
        (dict(num_hidden_layers=3), ["layers", "tensor names"]),
        (dict(intermediate_size=32), ["width", "tensor shapes"]),
        (dict(attention_bias=True), ["other settings", "tensor names"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_each_difference_is_named(pair, tmp_path, settings, expected):
    other = save_component(tmp_path / "other", **settings)
    report = preflight([*pair, other])
    assert errors(report) == expected
    assert all("other" in text for text in report[~report.ok].obstacle)
    assert (report[~report.ok].remedy != "").all()
    with pytest.raises(IncompatibleComponents) as caught:
        check_components([*pair, other])
    assert caught.value.report.equals(report)
    for obstacle, remedy in report.loc[~report.ok, ["obstacle", "remedy"]].values:
        assert obstacle in str(caught.value) and remedy in str(caught.value)


def test_sliding_window_and_softcapping(tmp_path):
    plain = save_component(tmp_path / "plain", "qwen2")
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    sliding = save_component(tmp_path / "sliding", "qwen2", **window)
    assert errors(preflight([plain, sliding])) == ["attention pattern"]
    scaled = [
        save_component(tmp_path / f"{value}", "gpt2", scale_attn_weights=value)
        for value in (True, False)
    ]
    assert errors(preflight(scaled)) == ["logit scaling"]


def test_setting_without_effect_is_no_obstacle(pair):
    edit_json(
        pair[1] / "config.json",
        use_cache=False,
        attention_dropout=0.5,
        initializer_range=0.1,
        made_by="someone",
    )
    assert preflight(pair).ok.all()


def test_other_model_type_is_told_once(pair, tmp_path):
    report = preflight([*pair, save_component(tmp_path / "gpt2", "gpt2")])
    assert errors(report) == ["model type"]
    assert list(report.property) == ["files", "model type"]


def test_missing_tensor_is_named_with_its_shape(pair):
    file = pair[1] / "model.safetensors"
    held = load_file(file)
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, file, metadata={"format": "pt"})
    report = preflight(pair)
    assert errors(report) == ["tensor names"]
    said = row(report, "tensor names").obstacle
    assert "only a has layers.1.mlp.up_proj.weight (24, 16)" in said
    with pytest.raises(UnreadableComponent, match=r"lacks model\.layers\.1\.mlp\.up"):
        load_model(pair[1])


def test_copy_of_a_tied_head_is_no_obstacle(tmp_path):
    paths = [
        save_component(tmp_path / name, "gpt2", seed=i) for i, name in enumerate("ab")
    ]
    held = load_file(paths[1] / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in held.items()}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(bare, paths[1] / "model.safetensors", metadata={"format": "pt"})
    assert preflight(paths).ok.all()
    assert torch.equal(load_model(paths[1]).lm_head.weight, bare["wte.weight"])


def test_untied_model_without_head(pair):
    held = load_file(pair[1] / "model.safetensors")
    del held["lm_head.weight"]
    save_file(held, pair[1] / "model.safetensors", metadata={"format": "pt"})
    assert "lack lm_head.weight" in preflight(pair).obstacle[0]


# Vocabulary


def test_token_order(pair, tmp_path):
    save_tokenizer(pair[1], [*WORDS[:3], *reversed(WORDS[3:])])
    report = preflight(pair)
    assert errors(report) == ["tokenizer vocabulary"]
    assert (
        "a has the 3, cat 4, sat 5 and 5 more, b has the 10, cat 9, sat 8"
        in row(report, "tokenizer vocabulary").obstacle
    )


def test_token_of_one_only(pair):
    save_tokenizer(pair[1], [*WORDS[:-1], "purred"])
    said = row(preflight(pair), "tokenizer vocabulary").obstacle
    assert "only a has slept 10" in said and "only b has purred 10" in said


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokenizer_is_what_its_file_says(tmp_path, architecture):
    """AutoTokenizer makes a byte-level BPE of it for Qwen2."""
    path = save_component(tmp_path / "a", architecture)
    ids = load_tokenizer(path)("the cat sat on a mat")["input_ids"]
    assert ids == [3, 4, 5, 6, 7, 8]
    load_tokenizer(path).save_pretrained(tmp_path / "copy")
    assert read_tokenizer(tmp_path / "copy") == read_tokenizer(path)


def test_normalizer(pair):
    save_tokenizer(pair[1], normalizer=Lowercase())
    assert errors(preflight(pair)) == ["tokenizer rules"]


def test_chat_template_special_ids_and_context_are_notes(pair):
    save_tokenizer(pair[1], chat_template="{{ messages }}")
    edit_json(pair[1] / "config.json", eos_token_id=[2, 3], max_position_embeddings=32)
    report = preflight(pair)
    assert report.ok.all()
    assert notes(report) == ["special token ids", "chat template", "longest context"]


@pytest.mark.parametrize("bare", [[0], [0, 1]])
def test_missing_tokenizer_is_a_note(pair, bare):
    for i in bare:
        for file in pair[i].glob("token*"):
            file.unlink()
    report = preflight(pair)
    assert report.ok.all() and notes(report) == ["tokenizer vocabulary"]
    with pytest.raises(UnreadableComponent, match="no tokenizer"):
        align_vocabulary(pair, pair[0].parent / "out", policy="pad")


# Bad input: what the row `files` says, and the same from load_model


def remove_all(folder):
    shutil.rmtree(folder)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def be_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def no_config(folder):
    (folder / "config.json").unlink()


def config_not_json(folder):
    (folder / "config.json").write_text("{'model_type': llama")


def config_a_list(folder):
    (folder / "config.json").write_text("[1, 2]")


def no_model_type(folder):
    (folder / "config.json").write_text("{}")


def unknown_model_type(folder):
    edit_json(folder / "config.json", model_type="llama_from_the_future")


def not_causal(folder):
    config = AutoConfig.for_model("t5", d_model=8, num_layers=1)
    config.save_pretrained(folder)


def quantised(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def adapter(folder):
    empty(folder)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")


def cut_data(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)


def cut_header(folder):
    os.truncate(folder / "model.safetensors", 100)


def cut_length(folder):
    os.truncate(folder / "model.safetensors", 5)


def appended(folder):
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"more")


def garbled_header(folder):
    text = b"{this is not JSON}"
    content = struct.pack("<Q", len(text)) + text
    (folder / "model.safetensors").write_bytes(content)


def header_without_offsets(folder):
    text = b'{"x": {"dtype": "F32", "shape": [1]}}'
    content = struct.pack("<Q", len(text)) + text
    (folder / "model.safetensors").write_bytes(content)


def shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("model-*.safetensors"))


def shard_missing(folder):
    shard(folder)[1].unlink()


def shard_cut(folder):
    os.truncate(shard(folder)[1], 3000)


def index_damaged(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def index_disagrees(folder):
    shard(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))


BAD = {
    remove_all: ("no such folder", "Check the path"),
    empty: ("the folder is empty", "save_pretrained"),
    be_a_file: ("this is a file", "Give the folder"),
    no_config: ("no config.json", "save_pretrained"),
    config_not_json: ("config.json is not a JSON object", "again"),
    config_a_list: ("config.json is not a JSON object", "again"),
    no_model_type: ("names no model_type", "transformers model"),
    unknown_model_type: ("'llama_from_the_future'", "Update transformers"),
    not_causal: ("not a causal language model", "AutoModelForCausalLM"),
    quantised: ("quantised", "before quantisation"),
    pickled: ("no pickle is loaded", "Convert the model to safetensors"),
    no_weights: ("holds no weights", "save_pretrained"),
    adapter: ("does not name its base", "adapter_config.json"),
    cut_data: ("is truncated: its header promises", "again"),
    cut_header: ("the header of model.safetensors is cut off", "again"),
    cut_length: ("the header of model.safetensors is cut off", "again"),
    appended: ("is damaged: its header promises", "again"),
    garbled_header: ("the header of model.safetensors is damaged", "again"),
    header_without_offsets: ("the header of model.safetensors is damaged", "again"),
    shard_missing: ("1 of 3 shards are missing: model-00002-of-00003", "missing files"),
    shard_cut: ("model-00002-of-00003.safetensors is truncated", "again"),
    index_damaged: ("index of the shards is damaged", "again"),
    index_disagrees: ("no shard holds model.extra", "again"),
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_component_is_told(pair, spoil):
    spoil(pair[1])
    obstacle, remedy = BAD[spoil]
    report = preflight(pair)
    assert errors(report) == ["files"]
    files = row(report, "files")
    assert (files.a, files.b) == ("readable", "unreadable")
    assert files.obstacle.startswith("b: ") and obstacle in files.obstacle
    assert remedy in files.remedy
    with pytest.raises(UnreadableComponent) as caught:
        load_model(pair[1])
    assert obstacle in str(caught.value) and remedy in str(caught.value)
    with pytest.raises(IncompatibleComponents, match="cannot be merged"):
        preflight(pair, raise_on_error=True)


def test_damaged_tokenizer(pair):
    (pair[1] / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be read" in row(preflight(pair), "files").obstacle


def test_readable_ones_are_compared_beside_a_broken_one(pair, tmp_path):
    other = save_component(tmp_path / "other", rms_norm_eps=1e-5)
    cut_data(pair[1])
    report = preflight([*pair, other])
    assert errors(report) == ["files", "norm eps"]
    assert row(report, "norm eps").b == ""


def test_wrong_arguments(pair):
    for paths in ([], pair[:1]):
        with pytest.raises(ValueError, match="at least two"):
            preflight(paths)
    for paths in (str(pair[0]), pair[0], 3):
        with pytest.raises(TypeError, match="expected a list"):
            preflight(paths)
    with pytest.raises(TypeError, match="expected a folder or a hub name"):
        load_model(None)
    with pytest.raises(ValueError, match="policy='cut'.*'intersection', 'pad'"):
        align_vocabulary(pair, pair[0].parent / "out", policy="cut")


def test_same_path_twice_is_a_note(pair):
    report = preflight([pair[0], pair[0]])
    assert report.ok.all() and notes(report) == ["path"]
    assert {"a", "a (2)"} <= set(report.columns)


def test_names_are_unique_and_spare_the_columns_of_tables():
    paths = ["x/m", "y/m", "y/m", "z/ok", Path("q/property")]
    names = ["x/m", "y/m", "y/m (2)", "ok (2)", "property (2)"]
    assert component_names(paths) == names
    assert component_names(["a", "b/a", "/c/b/a"]) == ["a", "b/a", "c/b/a"]
    assert component_names(["x/merged", "other"]) == ["x", "other (2)"]
    runs = ["runs/a/final_merged", "runs/b/final_merged", "adapter_checkpoint"]
    assert component_names(runs) == ["a", "b", "adapter_checkpoint"]


def test_preflight_reads_headers_only(pair):
    """Data in holes of a sparse file: reading it all would take minutes."""
    file = pair[1] / "model.safetensors"
    header = {"x": dict(dtype="F32", shape=[2**36], data_offsets=[0, 2**38])}
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        try:
            stream.truncate(8 + len(text) + 2**38)  # 256 GiB on paper
        except OSError:
            pytest.skip("this file system has no sparse files of 256 GiB")
    edit_json(pair[1] / "config.json", tie_word_embeddings=True)
    assert component_bytes(pair[1]) == 2**38
    told = " ".join(preflight(pair).obstacle)
    assert "b: config.json asks for 2 layers, and the weights are 1 tensors." in told


def test_sharded_equals_single(pair):
    before = read_header(pair[0] / "model.safetensors")
    shard(pair[0])
    assert read_component(pair[0]).headers == before
    assert preflight(pair).ok.all()


# The hub: a cache made by hand, in a process that has no network

OFFLINE = """
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model, preflight

report = preflight(["someone/a", "someone/b"])
assert report.ok.all() and list(report.columns[1:3]) == ["a", "b"]
assert load_tokenizer("someone/a")("cat")["input_ids"] == [4]
print(load_model("someone/b").lm_head.weight.double().sum().item())
print(preflight(["someone/bare", "someone/unknown", "no/such/place"]).obstacle[0])
"""


def test_hub_names_offline(pair, tmp_path):
    for name, path in zip(["a", "b", "bare"], [*pair, pair[0]]):
        root = tmp_path / "cache" / f"models--someone--{name}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        shutil.copytree(path, root / "snapshots" / ("0" * 40))
    (root / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    cache = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, **cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    total, told = done.stdout.splitlines()
    assert float(total) == load_model(pair[1]).lm_head.weight.double().sum().item()
    assert "bare: the weights are not in the local hub cache" in told
    assert "unknown: no such folder, not in the local hub cache" in told
    assert "place: no such folder, and not a name that the hub allows" in told


# Loading


def test_threads_load_whole_tied_models(tmp_path):
    path = save_component(tmp_path / "a", "gpt2")
    want, loaded = load_file(path / "model.safetensors"), []

    def load():
        loaded.append(load_model(path))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 6
    for model in loaded:
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, want["transformer.wte.weight"])


def test_components_come_in_order_when_asked_for(pair):
    models = load_components([*pair, "./nowhere"], dtype="float32")
    for path in pair:
        held = load_file(path / "model.safetensors")["lm_head.weight"]
        assert torch.equal(next(models).lm_head.weight, held)
    with pytest.raises(UnreadableComponent, match="no such folder"):
        next(models)
    with pytest.raises(UnreadableComponent, match="no such folder"):  # a dtype for all is found in all headers, before a weight is loaded
        next(load_components([*pair, "./nowhere"]))


@pytest.mark.parametrize(
    "architecture, settings",
    [
        ("llama", dict(attention_dropout=0.5)),
        ("qwen2", dict(attention_dropout=0.5)),
        ("gpt2", dict(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_silenced_model_is_deterministic_in_training_mode(
    tmp_path, architecture, settings, attention
):
    path = save_component(tmp_path / "a", architecture, **settings)
    model = load_model(path, attn_implementation=attention)
    ids = torch.arange(8)[None]
    want = model(ids).logits
    assert not torch.allclose(model.train()(ids).logits, want)
    silence_dropout(model)
    assert torch.equal(model(ids).logits, want)


# Remedies


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_pad_keeps_every_logit_and_bounds_new_ones(tmp_path, architecture, tied):
    low, high = (
        save_component(
            tmp_path / f"{size}",
            architecture,
            vocab_size=size,
            tie_word_embeddings=tied,
        )
        for size in (11, 16)
    )
    copies = align_vocabulary([low, high], tmp_path / "out", policy="pad")
    assert preflight(copies).ok.all()
    ids = torch.arange(11)[None]
    for path, copy in zip((low, high), copies):
        model, aligned = load_model(path), load_model(copy)
        rows = model.config.vocab_size
        assert aligned.config.vocab_size == 16
        assert aligned.config.tie_word_embeddings is tied
        logits = aligned(ids).logits
        torch.testing.assert_close(logits[..., :rows], model(ids).logits)
        shares = logits.softmax(-1)
        assert (shares[..., rows:] <= shares[..., :rows].sum(-1, True) / rows).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_intersection_follows_tokens_not_positions(tmp_path, architecture):
    words = [*WORDS[:3], "<|user|>", *reversed(WORDS[3:])]
    base = save_component(tmp_path / "base", architecture)
    chat = save_component(
        tmp_path / "chat", architecture, words=words, vocab_size=20, eos_token_id=3
    )
    assert errors(preflight([chat, base])) == [
        "vocabulary size",
        "tokenizer vocabulary",
    ]
    copies = align_vocabulary([chat, base], tmp_path / "out", policy="intersection")
    report = preflight(copies)
    assert report.ok.all() and notes(report) == []
    aligned, model = load_model(copies[0]), load_model(chat)
    assert aligned.config.vocab_size == len(WORDS) and aligned.config.eos_token_id == 2
    assert aligned.generation_config.eos_token_id == 2
    tokenizer, own = load_tokenizer(copies[0]), load_tokenizer(chat)
    text = "the cat sat on a mat"
    ids, own_ids = (torch.tensor([t(text)["input_ids"]]) for t in (tokenizer, own))
    assert not torch.equal(ids, own_ids)
    kept = [words.index(word) for word in WORDS]
    torch.testing.assert_close(aligned(ids).logits, model(own_ids).logits[..., kept])


def test_alignment_refuses_what_it_cannot_do(pair, tmp_path):
    save_tokenizer(pair[1], [*WORDS[:-1], "purred"])
    for policy in ("pad", "intersection"):
        with pytest.raises(ValueError, match="no component's tokenizer"):
            align_vocabulary(pair, tmp_path / "out", policy=policy)
    assert not (tmp_path / "out").exists()
    save_tokenizer(pair[1])
    align_vocabulary(pair, tmp_path / "out", policy="pad")
    with pytest.raises(FileExistsError, match="already holds files"):
        align_vocabulary(pair, tmp_path / "out", policy="pad")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untied_copy_computes_the_same(tmp_path, architecture):
    tied = save_component(tmp_path / "tied", architecture, tie_word_embeddings=True)
    free = save_component(tmp_path / "free", architecture, tie_word_embeddings=False)
    assert errors(preflight([tied, free])) == ["tied embeddings"]
    copy = untie_embeddings(tied, tmp_path / "copy")
    assert preflight([copy, free]).ok.all()
    model, ids = load_model(copy), torch.arange(8)[None]
    assert (
        model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    )
    assert torch.equal(model(ids).logits, load_model(tied)(ids).logits)
