"""What preflight accepts can be loaded: config against files, adapters against bases, tokenizers against rows."""


import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from merge_lab.components import align_vocabulary, load_model, preflight
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import whole_folder
from merge_lab.tinylm import save_tiny, tiny_model, tiny_tokenizer
from test_adapter_components import save_adapter
from test_architectures import IDS, tiny
from test_components import edit_json, row, save_component

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def refused(paths):
    report = preflight(paths)
    assert not report.ok.all() and all(report.remedy[~report.ok])
    return " ".join(report.obstacle[~report.ok])


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(num_hidden_layers=3), "config.json asks for model.layers.2"),
        (dict(intermediate_size=40), "(24, 16) in the weights, and (40, 16) by config.json"),
        (dict(num_key_value_heads=1), "by config.json"),
        (dict(attention_bias=True), "bias, which the weights lack"),
        (dict(pad_token_id=5000), "transformers makes no model of its config.json (Padding_idx"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_other_weights_is_refused_where_all_components_have_it(tmp_path, settings, said):
    paths = [save_component(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    for path in paths:
        edit_json(path / "config.json", **settings)
    assert said in refused(paths)


@pytest.mark.parametrize("kind", ["classifier", "value head", "fewer layers"])
def test_tensors_without_a_place_are_told(tmp_path, kind):
    paths = []
    for i, name in enumerate("ab"):
        path = save_component(tmp_path / name, "qwen2", seed=i, tie_word_embeddings=True)
        paths.append(path)
        if kind == "classifier":
            config = AutoModelForCausalLM.from_pretrained(path).config
            AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
        elif kind == "value head":
            tensors = load_file(path / "model.safetensors")
            save_file(tensors | {"v_head.summary.weight": torch.ones(1, 16)}, path / "model.safetensors", metadata={"format": "pt"})
        else:
            edit_json(path / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    named = {"classifier": "score.weight", "value head": "v_head.summary.weight", "fewer layers": "model.layers.1."}[kind]
    said = row(preflight(paths), "origin")
    assert said.level == "note" and named in said.obstacle and "left out" in said.obstacle


def more_tokens(folder, pad):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|{i}|>" for i in range(80)])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"} if pad else {})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("pad", [True, False])
def test_tokens_without_a_row_are_refused_where_every_text_needs_them(tmp_path, pad):
    paths = [save_tiny(tiny_model("llama", seed=i), tmp_path / name) for i, name in enumerate("ab")]
    for path in paths:
        more_tokens(path, pad)
    if pad:
        assert "pad_token '<|pad|>' has id" in refused(paths)
    else:
        said = row(preflight(paths), "origin")
        assert said.level == "note" and "tokens without a row" in said.obstacle
    copies = align_vocabulary(paths, tmp_path / "out", "pad")
    report = preflight(copies)
    assert report.ok.all() and "without a row" not in row(report, "origin").obstacle


@pytest.fixture
def adapters(tmp_path):
    base = str(save_tiny(tiny_model("llama"), tmp_path / "base"))
    return base, lambda name, **options: save_adapter(tmp_path / name, base, **options)


def test_adapters_that_make_other_layers_are_refused(adapters):
    _, save = adapters
    assert "layer_replication" in refused([save("a"), save("b", layer_replication=[[0, 2], [1, 2]])])


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(trainable_token_indices=[1]), dict(init_lora_weights="pissa")], ids=lambda o: next(iter(o)))
def test_adapters_that_peft_merges_are_held_against_their_base_too(adapters, tmp_path, options):
    _, save = adapters
    wide = str(save_tiny(tiny_model("llama", hidden_size=48, num_attention_heads=4), tmp_path / "wide"))
    other = save("other", **options)
    edit_json(Path(other) / "adapter_config.json", base_model_name_or_path=wide)
    assert "of its base" in refused([save_adapter(tmp_path / "on_wide", wide), other])


def test_adapters_of_other_types_are_held_against_their_base_too(adapters, tmp_path):
    from peft import get_peft_model, LoHaConfig

    base = adapters[0]
    wide = str(save_tiny(tiny_model("llama", hidden_size=48, num_attention_heads=4), tmp_path / "wide"))
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "loha")
    edit_json(tmp_path / "loha" / "adapter_config.json", base_model_name_or_path=wide)
    assert "peft cannot put the adapter on its base" in refused([save_adapter(tmp_path / "on_wide", wide), tmp_path / "loha"])


def test_no_numbers_in_an_adapter_or_below_it_are_refused(adapters, tmp_path):
    base, save = adapters
    paths = [save("a"), save("b")]
    file = Path(paths[1]) / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    assert name in refused(paths)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_model(paths[1])
    file = Path(base) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copyfile(Path(paths[0]) / "adapter_model.safetensors", Path(paths[1]) / "adapter_model.safetensors")
    assert "model.norm.weight" in refused(paths)


def as_written_by_4(kind, tensors, rank=4):
    "Tensors of an adapter by the names of transformers 4; of a mixture with an adapter on each expert."
    if kind == "gemma3":
        return {name.replace("model.model.language_model.", "model.language_model.model."): tensor for name, tensor in tensors.items()}
    torch.manual_seed(3)
    sizes = dict(w1=(48, 32), w2=(32, 48), w3=(48, 32))
    place = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}.lora_{}.weight"
    for layer, expert, (w, (rows, columns)) in ((i, j, size) for i in range(2) for j in range(4) for size in sizes.items()):
        tensors[place.format(layer, expert, w, "A")] = torch.randn(rank, columns)
        tensors[place.format(layer, expert, w, "B")] = torch.randn(rows, rank)
    return tensors


@pytest.mark.parametrize("kind, held", [("gemma3", True), ("mixtral", False)])
def test_adapters_of_transformers_4_are_components(tmp_path, kind, held, caplog):
    from peft import get_peft_model, LoraConfig

    caplog.set_level(logging.INFO, logger="merge_lab")
    base, folders = str(tmp_path / "base"), [str(tmp_path / name) for name in ("plain", "older")]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny(kind), dtype=torch.float32).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    for i, folder in enumerate(folders):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=r".*layers.*q_proj"))
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(folder)
    file = Path(folders[1]) / "adapter_model.safetensors"
    save_file(as_written_by_4(kind, load_file(file)), file)
    if not held:
        edit_json(file.with_name("adapter_config.json"), target_modules=["q_proj", "w1", "w2", "w3"])
    expected = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(IDS).logits for folder in folders]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert preflight([*folders, base]).ok.all()
    merger = Merger.from_config(MergerConfig(folders, base_model=base))
    for i in range(2):
        assert_close(merger.component_forward(i, input_ids=IDS).logits, expected[i], rtol=1e-4, atol=1e-5)
    assert ("an older transformers" in caplog.text) != held


def test_a_kill_leaves_nothing_beside_that_loads(tmp_path):
    if not (child := os.fork()):
        with whole_folder(tmp_path / "out") as made:
            (made / "config.json").write_text("{}")
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists() and not any(tmp_path.glob("*/config.json"))


@pytest.mark.parametrize("name, remedy", [("model.fp16.safetensors", "Rename it"), ("consolidated.safetensors", "Save the model with save_pretrained")])
def test_weights_under_another_name_are_named(tmp_path, name, remedy):
    paths = [save_component(tmp_path / each, seed=i) for i, each in enumerate("ab")]
    (paths[0] / "model.safetensors").rename(paths[0] / name)
    assert f"holds {name}, and neither" in refused(paths) and remedy in row(preflight(paths), "files").remedy
    if remedy == "Rename it":
        (paths[0] / name).rename(paths[0] / "model.safetensors")
        assert preflight(paths).ok.all()
