"""Preflight of very large components: what it costs does not grow with what components have in common, or with what is alike."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, core_model_loading

from merge_lab import checkpoints, weight_files
from merge_lab.checkpoints import headers_in_memory, read_component, read_headers, stored_rows
from merge_lab.components import load_components, preflight
from merge_lab.quantized import plain_makers
from merge_lab.tinylm import save_tiny, tiny_model, tiny_tokenizer
from test_components import row

CONFIGS = {
    "llama 70B": ("llama", dict(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    )),
    "deepseek 671B": ("deepseek_v3", {}),  # 61 layers, 256 experts each
}  # fmt: skip


def one_by_one(name, shape):
    "Names and shapes under which a file holds the experts of a layer."
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".experts"):
        return {name: shape}
    parts = {"gate_proj": (shape[1] // 2, shape[2]), "up_proj": (shape[1] // 2, shape[2])} if kind == "gate_up_proj" else {kind: shape[1:]}
    return {f"{stem}.{i}.{part}.weight": size for i in range(shape[0]) for part, size in parts.items()}


def write_stub(file, shapes):
    "A safetensors file of zeros that takes no disk."
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("stubs"), {}
    for name, (kind, options) in CONFIGS.items():
        config = CONFIG_MAPPING[kind](**options, dtype="bfloat16", architectures=[f"{kind}ForCausalLM"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = {n: s for own, p in model.state_dict().items() for n, s in one_by_one(own, tuple(p.shape)).items()}
        parts = [dict(list(shapes.items())[i::20]) for i in range(20)]
        for folder in (root / f"{name} {i}" for i in range(2)):
            folder.mkdir()
            config.save_pretrained(folder)
            index = {}
            for i, part in enumerate(parts):
                file = folder / f"model-{i:05d}.safetensors"
                write_stub(file, part)
                index |= dict.fromkeys(part, file.name)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
            made.setdefault(name, []).append(folder)
    return made


def counted(monkeypatch, module, name):
    "Count the calls of a function."
    calls, function = [], getattr(module, name)

    def counting(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("name", CONFIGS)
def test_a_very_large_model_is_read_once_and_its_experts_once_a_layer(stubs, monkeypatch, name):
    indexes = [counted(monkeypatch, module, "_read_index") for module in (weight_files, checkpoints)]
    headers, renamed = counted(monkeypatch, weight_files, "read_header"), counted(monkeypatch, core_model_loading, "rename_source_key")
    report = preflight(stubs[name])
    assert report.ok.all(), report.obstacle[~report.ok].tolist()
    assert sum(map(len, indexes)) == 2 and len(headers) == 40  # each file of both components
    assert len(renamed) <= 2 * 1600


def test_rows_of_every_dtype_are_the_tensors(tmp_path):
    torch.manual_seed(0)
    tensors = {
        str(dtype): (torch.randn(300, 7, 40) * 9).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)
    } | {"none": torch.empty(0, 4), "one": torch.tensor(3.5), "short": torch.arange(5), "wide": torch.randn(3, 90_000)}
    save_file(tensors, tmp_path / "model.safetensors")
    headers = read_headers(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, header in headers.items():
            whole, rows = file.get_tensor(name), stored_rows(header)
            size = min(len(whole), max(1, 4096 * len(whole) // whole.numel())) if whole.numel() and whole.ndim else 0
            starts = sorted({(len(whole) - size) * i // 3 for i in range(4)}) if size else []
            wanted = torch.cat([whole[start : start + size] for start in starts]) if starts else whole.reshape(rows.shape)
            assert rows.dtype == wanted.dtype and torch.equal(rows.view(torch.uint8) if rows.ndim else rows, wanted.contiguous().view(torch.uint8) if rows.ndim else wanted)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "qwen3_moe", "jamba"])
def test_headers_of_experts_are_what_loading_makes_of_them(tmp_path, kind):
    from test_architectures import tiny

    model = AutoModelForCausalLM.from_config(tiny(kind))
    model.save_pretrained(tmp_path)
    held, state = headers_in_memory(model, read_headers(tmp_path)), model.state_dict()
    stored = {name: header for name, header in held.items() if name in state}
    assert all(header.shape == tuple(state[name].shape) and header.n_bytes == state[name].nbytes for name, header in stored.items() if header.n_bytes)
    assert sum(header.n_bytes for header in held.values()) == sum(header.n_bytes for header in read_headers(tmp_path).values())


def test_one_tokenizer_of_all_components_is_read_once(tmp_path, monkeypatch):
    paths = [save_tiny(tiny_model("llama", seed=i), tmp_path / name, tiny_tokenizer()) for i, name in enumerate("abc")]
    checkpoints._tokenizer_of.cache_clear()
    read = []

    class Counted:
        from_buffer = staticmethod(lambda content: read.append(1) or Tokenizer.from_buffer(content))
        from_file = staticmethod(lambda file: read.append(1) or Tokenizer.from_file(file))

    monkeypatch.setattr("tokenizers.Tokenizer", Counted)
    report = preflight(paths)
    assert report.ok.all() and len(read) == 1
    assert len({row(report, "tokenizer vocabulary")[name] for name in "abc"}) == 1
    assert len(list(load_components(paths))) == 3 and preflight(paths).ok.all() and len(read) == 1
    file = Path(paths[1], "tokenizer.json")
    told = json.loads(file.read_text())
    told["model"]["vocab"]["zzz"] = len(told["model"]["vocab"]) + 50
    file.write_text(json.dumps(told))
    assert not row(preflight(paths), "tokenizer vocabulary").ok and len(read) == 2
    assert "zzz" in read_component(paths[1]).tokenizer["tokens"]


def test_quantised_experts_are_found_without_asking_every_name_of_every_module():
    class Name(str):
        asked = 0

        def startswith(self, *arguments):
            Name.asked += 1
            return super().startswith(*arguments)

    names = [Name(f"layers.{i}.experts.{j}.up_proj.{part}") for i in range(4) for j in range(64) for part in ("weight", "weight_scale_inv")]
    makers = plain_makers(names, lambda name: torch.full((2, 2) if name.endswith("weight") else (1, 1), 3.0), {"quant_method": "fp8"})
    assert len(makers) == 256 and Name.asked <= len(names)
    assert torch.equal(makers["layers.3.experts.63.up_proj.weight"](), torch.full((2, 2), 9.0))
