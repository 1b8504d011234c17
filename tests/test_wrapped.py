"""Checkpoints and adapters that were saved from a wrapped model (torch.compile, FSDP, DistributedDataParallel): read by the names of the model itself."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_lab.adapter_files import read_adapter
from merge_lab.adapters import load_base, read_adapters
from merge_lab.components import load_components, load_model, preflight, untie_embeddings
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.tinylm import save_tiny, tiny_model, tiny_tokenizer
from merge_lab.writer import save_plain
from test_adapter_components import save_adapter
from test_architectures import family
from test_components import row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WRAPS = {
    "compiled": "_orig_mod.{}".format,
    "parallel": "module.{}".format,
    "compiled in parallel": "module._orig_mod.{}".format,
    "parallel and compiled": "_orig_mod.module.{}".format,
    "sharded": "_fsdp_wrapped_module.{}".format,
    "layers compiled": lambda name: name.replace(".0.", ".0._orig_mod.").replace(".1.", ".1._checkpoint_wrapped_module._orig_mod."),
    "all compiled": lambda name: "_orig_mod." + name.replace("norm", "_orig_mod.norm"),
}


def wrap(folder, name):
    "Rename the tensors of a checkpoint or an adapter as a wrapper would."
    for file in Path(folder).glob("*.safetensors"):
        save_file({WRAPS[name](key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def save_any(kind, folder, seed):
    if kind != "mixtral":
        return save_tiny(tiny_model(kind, seed=seed), folder, tiny_tokenizer())
    family(kind, n=seed + 1)[seed].save_pretrained(folder)
    return folder


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("kind, name", [*(("mixtral", name) for name in WRAPS), ("gpt2", "compiled"), ("gpt2", "layers compiled"), ("llama", "parallel")])
def test_a_checkpoint_of_a_wrapped_model_is_the_model(tmp_path, kind, name):
    paths = [save_any(kind, tmp_path / place, i) for i, place in enumerate("ab")]
    plain = [load_model(path) for path in paths]
    stored = load_file(paths[0] / "model.safetensors")
    for path in paths:
        wrap(path, name)
    report = preflight(paths)
    told = row(report, "origin")
    assert report.ok.all(), report.obstacle.tolist()
    assert told.level == "note" and "wrapped model" in told.obstacle
    for model, own in zip(load_components(paths), plain):
        assert equal(model, own)
    save_plain(load_model(paths[0]), tmp_path / "again", None)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(tensor, again[key]) for key, tensor in stored.items())


def test_a_wrapped_checkpoint_stands_beside_one_that_is_not(tmp_path):
    paths = [save_tiny(tiny_model("llama", seed=i), tmp_path / place, tiny_tokenizer()) for i, place in enumerate("ab")]
    want = Merger.from_config(MergerConfig([str(path) for path in paths])).merged_state_dict()
    shutil.copytree(paths[1], tmp_path / "c")
    wrap(tmp_path / "c", "compiled")
    pair = [str(paths[0]), str(tmp_path / "c")]
    assert preflight(pair).ok.all()
    merged = Merger.from_config(MergerConfig(pair)).merged_state_dict()
    assert merged.keys() == want.keys() and all(torch.equal(tensor, want[name]) for name, tensor in merged.items())


def test_a_tied_head_that_differs_is_seen_below_a_wrapper(tmp_path):
    path = untie_embeddings(save_tiny(tiny_model("llama", tie_word_embeddings=True), tmp_path / "tied"), tmp_path / "a")
    other = shutil.copytree(path, tmp_path / "b")
    file = wrap(path, "parallel") / "model.safetensors"
    tensors = load_file(file)
    tensors["module.lm_head.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    for folder in (path, other):
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "the files hold a head that differs" in row(preflight([path, path]), "file and config").obstacle


@pytest.mark.parametrize("options", [{}, dict(use_dora=True)], ids=["factors", "dora"])
@pytest.mark.parametrize("name", ["parallel", "compiled", "base compiled", "base in parallel"])
def test_an_adapter_of_a_wrapped_model_is_the_adapter(tmp_path, name, options):
    base = str(save_tiny(tiny_model("llama"), tmp_path / "base"))
    paths = [save_adapter(tmp_path / place, base, seed, **options) for seed, place in enumerate("ab")]
    plain, pairs = [load_model(path) for path in paths], read_adapter(paths[0]).pairs.keys()
    factors = None if options else read_adapters(load_base(base, "cpu"), paths)[1]
    for path in paths:
        file = Path(path, "adapter_model.safetensors")
        wrapped = WRAPS.get(name) or (lambda key: key.replace("base_model.model.", f"base_model.model.{'_orig_mod' if 'compiled' in name else 'module'}.", 1))
        save_file({wrapped(key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    report = preflight(paths)
    assert report.ok.all(), report.obstacle.tolist()
    assert "without what a wrapper put into them" in row(report, "files")["a"]
    assert read_adapter(paths[0]).pairs.keys() == pairs
    assert all(equal(load_model(path), own) for path, own in zip(paths, plain))
    if factors:
        again = read_adapters(load_base(base, "cpu"), paths)[1]
        assert all(torch.equal(a, b) for own, other in zip(factors, again) for key in own for a, b in zip(own[key], other[key]))


def test_a_name_that_only_some_tensors_carry_is_their_own(tmp_path):
    path = save_tiny(tiny_model("llama"), tmp_path / "a")
    tensors = load_file(path / "model.safetensors")
    save_file({key if "norm" in key else f"module.{key}": tensor for key, tensor in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    assert not preflight([path, path]).ok.all()
