"""Bad input, case by case: one clear sentence that names the file or the option, soon, and nothing that was there is changed."""

import dataclasses
import json
import os
import re
import shutil
import signal
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_lab.adapter_files import read_adapter
from merge_lab.adapters import check_adapter
from merge_lab.chat import load_task
from merge_lab.cli import main, parse
from merge_lab.commands import COMMANDS
from merge_lab.run_folder import read_rows, seal
from merge_lab.weight_files import read_header, read_headers, UnreadableComponent
from small_runs import ADAPTERS, CHAT, COMPARE, DAM, LAYERS, LORA, make_ground, MERGE, QUANTIZE, ROUTER, TOPK, TRAIN


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    "Made once; each case gets a copy, and works in it."
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def here(ground, tmp_path, monkeypatch):
    "A copy of all that, as the current folder."
    shutil.copytree(ground, tmp_path / "here", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MERGE_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


def held(folder):
    "Bytes of every file below a folder, but for locks and what a run says of itself."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name not in (".lock", "log.txt")}


# ---- ways to spoil a file


def put(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())


def pipe(path):
    "What a reader waits for."
    Path(path).unlink(missing_ok=True)
    os.mkfifo(path)


def edit(path, **changes):
    "Set entries of a JSON file; those that are ... go."
    values = json.loads(Path(path).read_text()) | changes
    put(path, json.dumps({name: value for name, value in values.items() if value is not ...}))


def drop(path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def tensors(path, change):
    "Rewrite a safetensors file by a function of its tensors."
    found = load_file(path)
    save_file(change(found) or found, path, metadata={"format": "pt"})


def header(path, change):
    "Rewrite the header of a safetensors file as text, and leave its numbers."
    data = Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    values = json.loads(data[8 : 8 + length])
    text = change(values)
    text = (json.dumps(values) if text is None else text).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(values):
    "Entry of the first tensor of a header."
    return next(value for name, value in values.items() if name != "__metadata__")


def shards(folder):
    "Store a model's weights in two shards with their index."
    found = load_file(f"{folder}/model.safetensors")
    names, half = list(found), len(found) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, held_names in parts.items():
        save_file({name: found[name] for name in held_names}, f"{folder}/{file}", metadata={"format": "pt"})
    drop(f"{folder}/model.safetensors")
    put(f"{folder}/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {name: file for file, held_names in parts.items() for name in held_names}}))
    return f"{folder}/model.safetensors.index.json"


def index(change):
    "Spoil the index of the shards of b."
    path = shards("b")
    values = json.loads(Path(path).read_text())
    change(values["weight_map"])
    put(path, json.dumps(values))


def chat(*values, name="chat_a/train.jsonl"):
    "Put rows, or lines of text, in place of the first dataset's."
    put(name, "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))


def said(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def options(text, words="mask-merge"):
    "A YAML file with options in place of flags."
    put("options.yaml", text)
    return f"{words.split()[0]} options.yaml {' '.join(words.split()[1:])}"


def template(text):
    put("a/chat_template.jinja", text)


def resealed(name, data):
    "A file of the newest checkpoint replaced, as if it had been written so."
    put(f"run/checkpoint-2/{name}", data)
    seal("run/checkpoint-2")


class Runs:
    "What a pickle of bad intent does."

    def __reduce__(self):
        return os.mkdir, ("pickle_was_run",)


RESUME = MERGE.replace("--output_dir out", "--output_dir run") + TRAIN + " --resume --save_steps 1"
BLOCK = f"{LAYERS} --strategy block --n_pairs 1 --data_dir chat_a"
SUITE = "compare --suite s.yaml --output_dir out"
UNTOUCHED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

# ---- the table: name -> words of the command, what is spoiled before, and what the answer says

CASES = {
    # the command line
    "no such command": ("merge", None, "unknown command 'merge'"),
    "a flag that is not there": (f"{MERGE} --learning_rat 1", None, "--learning_rat.*--learning_rate"),
    "a flag without its value": ("mask-merge --mode", None, "--mode"),
    "a word for a number": (f"{MERGE} --max_steps many", None, "max_steps"),
    "a number that is none": (f"{MERGE} --learning_rate nan", None, "learning_rate"),
    "an infinite number": (f"{MERGE} --learning_rate inf", None, "learning_rate"),
    "a negative number": (f"{MERGE} --held_out_rows -1", None, "held_out_rows"),
    "a number beyond its range": (f"{MERGE} --max_steps 100001", None, "max_steps"),
    "no step": (f"{MERGE} --max_steps 0", None, "max_steps=0"),
    "a choice that is none": (f"{MERGE} --mode columns", None, "mode.*vector_input"),
    "a mapping that is no mapping": (f"{MERGE} --mask_init {{strategy", None, "mask_init"),
    "an optimizer that is none": (f"{MERGE} --optim adam", None, "optim='adam'"),
    "a tracker that is none": (f"{MERGE} --report_to nowhere", None, "report_to='nowhere'"),
    "a device that is none": (f"{MERGE} --device tpu", None, "device"),
    "a word too many": ("quantize a b", None, "unexpected words"),
    "two names of one option": (f"{LAYERS} --num_steps 3", None, "num_steps"),
    "a file of options that is not there": ("mask-merge nothing.yaml", None, "nothing.yaml: no such file"),
    # files of options, of every system
    "YAML that is no YAML": ("mask-merge options.yaml", lambda: put("options.yaml", "model_paths: [a, b"), "options.yaml: not a YAML file"),
    "YAML with tabs": ("mask-merge options.yaml", lambda: put("options.yaml", "mode:\n\tscalar"), "options.yaml: not a YAML file"),
    "YAML that is a list": ("mask-merge options.yaml", lambda: put("options.yaml", "- a\n- b"), "options.yaml.*got list"),
    "YAML that is a picture": ("mask-merge options.yaml", lambda: put("options.yaml", b"\x89PNG\r\n\x1a\n\x00\xff"), "options.yaml: not a YAML file"),
    "YAML that is a pipe": ("mask-merge options.yaml", lambda: pipe("options.yaml"), "options.yaml: not a YAML file.*a pipe or a device"),
    "YAML without an end": ("mask-merge options.yaml", lambda: Path("options.yaml").symlink_to("/dev/zero"), "options.yaml: not a YAML file.*a pipe or a device"),
    "a config that is a pipe": (MERGE, lambda: pipe("b/config.json"), "b: config.json is a pipe or a device"),
    "weights that are a pipe": (MERGE, lambda: pipe("b/model.safetensors"), "b: model.safetensors is a pipe or a device"),
    "a tokenizer that is a pipe": (MERGE, lambda: pipe("b/tokenizer.json"), "b: tokenizer.json is a pipe or a device"),
    "an adapter that is a pipe": (ADAPTERS, lambda: pipe("y/adapter_config.json"), "y has no adapter_config.json"),
    "data that are a pipe": (MERGE, lambda: pipe("chat_b/train.jsonl"), "chat_b/train.jsonl: missing"),
    "a checkpoint to verify whose config is a pipe": ("verify b", lambda: pipe("b/config.json"), "b.*config.json"),
    "a quantised model whose config is a pipe": (ROUTER, lambda: pipe("q/config.json"), "config.json"),
    "a run whose options are a pipe": (RESUME, lambda: pipe("run/config.yaml"), "holds no run|a pipe"),
    "a history that is a pipe": (RESUME, lambda: pipe("run/history.jsonl"), "history.jsonl"),
    "YAML with a name twice": ("mask-merge options.yaml", lambda: put("options.yaml", "seed: 1\nseed: 2"), "'seed' stands there twice"),
    "YAML with a name twice, deep down": ("mask-merge options.yaml", lambda: put("options.yaml", "mask_init: {strategy: uniform, strategy: random}"), "'strategy' stands there twice"),
    "YAML that makes an object": ("mask-merge options.yaml", lambda: put("options.yaml", "seed: !!python/object/apply:os.mkdir [x]"), "options.yaml: not a YAML file"),
    "YAML with a name of no option": ("mask-merge options.yaml", lambda: put("options.yaml", "modus: scalar"), "options.yaml: unknown option 'modus'"),
    "YAML with a number for a name": ("mask-merge options.yaml", lambda: put("options.yaml", "1: scalar"), "options.yaml: unknown option 1"),
    "YAML with a list for a name": ("mask-merge options.yaml", lambda: put("options.yaml", "? [a, b]\n: scalar"), "options.yaml: not a YAML file"),
    "YAML without end": ("mask-merge options.yaml", lambda: put("options.yaml", "mask_init: " + "{a: " * 3000), "options.yaml: not a YAML file"),
    "YAML that bears more and more": ("mask-merge options.yaml", lambda: put("options.yaml", "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi"))), "options.yaml"),
    "YAML that holds itself": ("mask-merge options.yaml", lambda: put("options.yaml", "mask_init: &x {strategy: *x}"), "mask_init"),
    "YAML with a boolean for a number": ("lora-merge options.yaml", lambda: put("options.yaml", "max_steps: true"), "max_steps=True"),
    "YAML with a number for a boolean": ("dam-train options.yaml", lambda: put("options.yaml", "save_merged: 3"), "save_merged=3"),
    "YAML with a text for a list": ("compare options.yaml", lambda: put("options.yaml", "model_paths: a"), "model_paths='a'"),
    "YAML with a date for a text": ("quantize options.yaml", lambda: put("options.yaml", "model_path: 2024-01-01"), "model_path"),
    "YAML with a date of no calendar": ("quantize options.yaml", lambda: put("options.yaml", "model_path: 2024-02-31"), "options.yaml"),
    "YAML with a mapping for a text": ("router options.yaml", lambda: put("options.yaml", "output_dir: {a: b}"), "output_dir"),
    "YAML with nothing for a text": ("export options.yaml", lambda: put("options.yaml", "path:"), "path"),
    "YAML with a list for a number": ("layer-merge options.yaml", lambda: put("options.yaml", "n_pairs: [1]"), "n_pairs"),
    "YAML with a float for a whole number": ("dam-topk options.yaml", lambda: put("options.yaml", "k: 2.5"), "k=2.5"),
    "YAML with a number that no float holds": ("lora options.yaml", lambda: put("options.yaml", f"learning_rate: 1{'0' * 400}"), "learning_rate"),
    "YAML with numbers among paths": ("mask-merge options.yaml", lambda: put("options.yaml", "model_paths: [1, 2]"), "model_paths"),
    "YAML with null among paths": ("mask-merge options.yaml", lambda: put("options.yaml", "model_paths: [a, null]"), "model_paths"),
    "YAML with an empty path": ("mask-merge options.yaml", lambda: put("options.yaml", "model_paths: [a, '']\ndataset_configs: {chat_a: 3, chat_b: 3}\noutput_dir: out"), "paths="),
    "YAML with a null byte in a path": ("mask-merge options.yaml", lambda: put("options.yaml", 'model_paths: [a, "b\\0"]'), "model_paths.*null bytes"),
    "YAML with an access token": ("mask-merge options.yaml", lambda: put("options.yaml", f"model_paths: [a, 'https://me:hf_{'x' * 34}@huggingface.co/b']"), "model_paths: it holds an access token"),
    "YAML with samples that are no number": ("mask-merge options.yaml", lambda: put("options.yaml", "dataset_configs: {chat_a: few}"), "dataset_configs"),
    "YAML with a text for the masks' start": ("mask-merge options.yaml", lambda: put("options.yaml", "mask_init: uniform"), "mask_init"),
    "YAML with a start that is none": ("mask-merge options.yaml", lambda: put("options.yaml", "mask_init: {strategy: chaos}"), "chaos"),
    "YAML with factors that are texts": ("mask-merge options.yaml", lambda: put("options.yaml", "mask_init: {strategy: uniform, factors: [a, b]}"), "factors"),
    "a name with slashes to the root": ("mask-merge " + MERGE.split(" ", 1)[1].replace("--output_dir out", "--output_dir /proc/nothing/out"), None, "/proc"),
    # folders of a run
    "no components": ("mask-merge --output_dir out", None, "component"),
    "one component": ("mask-merge --model_paths a --output_dir out", None, "at least two"),
    "a component that is not there": (MERGE.replace("a b", "a nowhere"), None, "nowhere"),
    "a component that is a file": (MERGE.replace("a b", "a text.txt"), None, "text.txt: this is a file"),
    "a folder for the run that is a file": (MERGE.replace("output_dir out", "output_dir text.txt"), None, "text.txt is a file"),
    "a folder for the run with other files": (MERGE.replace("output_dir out", "output_dir chat_a"), None, "chat_a holds files and is not a run"),
    "a run that is there": (MERGE.replace("output_dir out", "output_dir run"), None, "run already holds a run"),
    "overwriting what is read": (MERGE.replace("a b", "a run/merged").replace("output_dir out", "output_dir run --overwrite"), None, "overwrite would clear run"),
    "resuming nothing": (f"{MERGE} --resume", None, "out holds no run"),
    "resuming with another option": (f"{RESUME} --seed 9", None, "seed=9.*begun with"),
    "resuming with fewer steps": (RESUME.replace("max_steps 2", "max_steps 1"), None, "has made 2 steps"),
    "more processes than one": ("quantize a", None, "torchrun"),
    # configs, tokenizers, templates and generation configs of components
    "a config that was cut": (MERGE, lambda: put("b/config.json", "{"), "b: config.json is not a JSON object"),
    "a config that is a list": (MERGE, lambda: put("b/config.json", "[]"), "b: config.json"),
    "a config that is a picture": (MERGE, lambda: put("b/config.json", b"\xff\xfe\x00\x01"), "b: config.json"),
    "a config without end": (MERGE, lambda: put("b/config.json", "[" * 100_000), "b: config.json"),
    "a config of no type": (MERGE, lambda: edit("b/config.json", model_type=...), "b: config.json names no model_type"),
    "a config of an unknown type": (MERGE, lambda: edit("b/config.json", model_type="llama9"), "b: .*llama9"),
    "a config whose type is a number": (MERGE, lambda: edit("b/config.json", model_type=7), "b: "),
    "a config that brings code": (MERGE, lambda: edit("b/config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"}), "b: .*brings its own code"),
    "a config with a text for a size": (MERGE, lambda: edit("b/config.json", hidden_size="wide"), "b: "),
    "a config with a negative size": (MERGE, lambda: edit("b/config.json", num_hidden_layers=-1), "b has num_hidden_layers=-1"),
    "a config with heads that do not divide": (MERGE, lambda: edit("b/config.json", num_attention_heads=7), "b: "),
    "a config with more layers than there are": (MERGE, lambda: edit("b/config.json", num_hidden_layers=9), "b: .*lack"),
    "a config with far more layers": (MERGE, lambda: edit("b/config.json", num_hidden_layers=200_000), "b: "),
    "a config with another vocabulary": (MERGE, lambda: edit("b/config.json", vocab_size=10), "b: .*vocab_size 10"),
    "a config with rotations of no kind": (MERGE, lambda: edit("b/config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 1}), "b|rotary|rope"),
    "a config of packed weights": (MERGE, lambda: edit("b/config.json", quantization_config={"quant_method": "secret"}), "b: the weights are quantised"),
    "a tokenizer that was cut": (MERGE, lambda: put("b/tokenizer.json", "{"), "b: the tokenizer cannot be read"),
    "a tokenizer of another library": (MERGE, lambda: put("b/tokenizer.json", '{"model": {"type": "Magic"}}'), "b: the tokenizer cannot be read"),
    "a tokenizer that is not there": (MERGE, lambda: [drop(f"{x}/{name}") for x in "ab" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")], "tokenizer"),
    "a tokenizer_config that was cut": (MERGE, lambda: put("a/tokenizer_config.json", "{"), "a/tokenizer_config.json: not a JSON file"),
    "a tokenizer whose end has no row": (MERGE, lambda: edit("a/tokenizer_config.json", eos_token="<nowhere>"), "<nowhere>|eos"),
    "a template that was cut": (MERGE, lambda: template("{% for m in messages %}{{ m"), "chat template"),
    "a template that raises": (MERGE, lambda: template("{{ raise_exception('roles must alternate') }}"), "roles must alternate"),
    "a template that names nothing": (MERGE, lambda: template("{{ messages[0].nothing.more }}"), "chat template"),
    "a template that divides by zero": (MERGE, lambda: template("{{ 1 // 0 }}"), "chat template"),
    "a template that calls itself": (MERGE, lambda: template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "chat template"),
    "a template without end": (MERGE, lambda: template("{% for i in range(10**9) %}x{% endfor %}"), "chat template"),
    "a template that looks around": (MERGE, lambda: template("{{ ().__class__.__mro__[1].__subclasses__() }}" + UNTOUCHED), "chat template"),
    "a template that is a picture": (MERGE, lambda: put("a/chat_template.jinja", b"\xff\xd8\xff"), "chat_template|template"),
    "a template by a name of none": (f"{MERGE} --chat_template llama99", None, "chat_template='llama99'"),
    "a generation config that was cut": (MERGE, lambda: put("b/generation_config.json", "{"), "b: .*generation_config.json"),
    "a generation config of texts": (MERGE, lambda: put("b/generation_config.json", '{"max_new_tokens": "many", "do_sample": 3}'), "b: .*generation_config.json"),
    "a generation config that is a list": (MERGE, lambda: put("b/generation_config.json", "[1]"), "b: .*generation_config.json"),
    # weights: headers, indices, shards, numbers
    "weights that are empty": (MERGE, lambda: put("b/model.safetensors", b""), "model.safetensors"),
    "weights that were cut": (MERGE, lambda: put("b/model.safetensors", Path("b/model.safetensors").read_bytes()[:-9]), "model.safetensors is truncated"),
    "weights that end in the header": (MERGE, lambda: put("b/model.safetensors", Path("b/model.safetensors").read_bytes()[:40]), "header of model.safetensors"),
    "weights that are text": (MERGE, lambda: put("b/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"), "model.safetensors"),
    "a header that promises all memory": (MERGE, lambda: put("b/model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "header of model.safetensors"),
    "a header that is no JSON": (MERGE, lambda: header("b/model.safetensors", lambda h: "{" * 64), "header of model.safetensors"),
    "a header without end": (MERGE, lambda: header("b/model.safetensors", lambda h: '{"x":' * 50_000), "header of model.safetensors"),
    "a header that is a list": (MERGE, lambda: header("b/model.safetensors", lambda h: "[]"), "header of model.safetensors"),
    "a header with a shape of another size": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(shape=[3, 3])), "model.safetensors|in the weights"),
    "a header with a negative shape": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(shape=[-1, -64])), "model.safetensors|in the weights"),
    "a header with a shape of texts": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(shape=["a"])), "model.safetensors|in the weights"),
    "a header with an unknown dtype": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(dtype="F33")), "model.safetensors"),
    "a header with another dtype": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(dtype="I64")), "model.safetensors"),
    "a header with places that overlap": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(data_offsets=[8, 8 + first(h)["data_offsets"][1] - first(h)["data_offsets"][0]])), "model.safetensors"),
    "a header with places before the file": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(data_offsets=[-64, first(h)["data_offsets"][1]])), "model.safetensors"),
    "a header with places that are texts": (MERGE, lambda: header("b/model.safetensors", lambda h: first(h).update(data_offsets="here")), "header of model.safetensors"),
    "weights without their head": (MERGE, lambda: tensors("b/model.safetensors", lambda t: [t.pop(name) for name in list(t) if "lm_head" in name] and t), "lm_head"),
    "weights that lack a layer": (MERGE, lambda: tensors("b/model.safetensors", lambda t: [t.pop(name) for name in list(t) if "layers.1." in name] and t), "layers.1"),
    "weights that are NaN": (MERGE, lambda: tensors("b/model.safetensors", lambda t: t["model.norm.weight"].fill_(torch.nan) * 0 if False else t | {"model.norm.weight": torch.full_like(t["model.norm.weight"], torch.nan)}), "model.norm.weight"),
    "weights that are infinite in one place": (MERGE + TRAIN, lambda: tensors("b/model.safetensors", lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[-1:].fill_(torch.inf) is None), "model.layers.1.mlp.down_proj.weight"),
    "weights in a pickle": (MERGE, lambda: Path("b/model.safetensors").rename("b/pytorch_model.bin"), "no pickle is loaded"),
    "no weights": (MERGE, lambda: drop("b/model.safetensors"), "holds no weights"),
    "a shard that is not there": (MERGE, lambda: drop(shards("b").replace(".safetensors.index.json", "-00002-of-00002.safetensors")), "shards are missing"),
    "an index that was cut": (MERGE, lambda: put(shards("b"), "{"), "index"),
    "an index that is a list": (MERGE, lambda: put(shards("b"), "[]"), "index"),
    "an index without a map": (MERGE, lambda: put(shards("b"), '{"weight_map": null}'), "index"),
    "an index of numbers": (MERGE, lambda: put(shards("b"), '{"weight_map": {"x": 1}}'), "index"),
    "an index that is empty": (MERGE, lambda: put(shards("b"), '{"weight_map": {}}'), "b: .*the weights are 0 tensors"),
    "an index that leaves the folder": (MERGE, lambda: index(lambda m: m.update({next(iter(m)): "../a/model.safetensors"})), "outside its folder"),
    "an index to the root": (MERGE, lambda: index(lambda m: m.update({next(iter(m)): "/etc/passwd"})), "outside its folder"),
    "an index to the folder itself": (MERGE, lambda: index(lambda m: m.update({next(iter(m)): ".."})), "index|outside its folder"),
    "a tensor in two shards": (MERGE, lambda: (shards("b"), tensors("b/model-00001-of-00002.safetensors", lambda t: t | {"model.norm.weight": torch.ones(32)})), "model.norm.weight stands in model-00002-of-00002.safetensors and in another shard"),
    "an index that names what no shard has": (MERGE, lambda: index(lambda m: m.update(extra="model-00001-of-00002.safetensors")), "no shard holds extra"),
    # data
    "data that are not there": (MERGE.replace("chat_b", "nowhere"), None, "nowhere"),
    "data that are empty": (MERGE, lambda: put("chat_a/train.jsonl", ""), "chat_a/train.jsonl: no rows"),
    "data in a folder without any": (MERGE.replace("chat_b", "a"), None, "a/train.jsonl: missing"),
    "data that are no JSON": (MERGE, lambda: chat(CHAT[0], "{'messages': []}"), "train.jsonl:2: not JSON"),
    "data that were cut": (MERGE, lambda: chat(CHAT[0], json.dumps(CHAT[1])[:30]), "train.jsonl:2: not JSON"),
    "data without end": (MERGE, lambda: chat('{"messages": ' + "[" * 100_000), "train.jsonl:1: not JSON"),
    "data with a key twice": (MERGE, lambda: chat('{"messages": [], "messages": []}'), "train.jsonl:1.*twice"),
    "data that are a list of numbers": (MERGE, lambda: chat("[1, 2]"), "train.jsonl:1"),
    "data in no known form": (MERGE, lambda: chat({"foo": 1}), "train.jsonl:1"),
    "data with a number for a text": (MERGE, lambda: chat(said(("user", 3), ("assistant", "y"))), "train.jsonl:1"),
    "data without an answer": (MERGE, lambda: chat(said(("user", "the cat"))), "train.jsonl:1"),
    "data with an empty answer": (MERGE, lambda: chat(said(("user", "the cat"), ("assistant", ""))), "train.jsonl:1"),
    "data with messages of null": (MERGE, lambda: chat({"messages": None}), "train.jsonl:1"),
    "data with messages that are texts": (MERGE, lambda: chat({"messages": ["hello"]}), "train.jsonl:1"),
    "data with a picture in them": (MERGE, lambda: chat(said(("user", [{"type": "image", "image": "x.png"}]), ("assistant", "y"))), "train.jsonl:1"),
    "data that are no text": (MERGE, lambda: put("chat_a/train.jsonl", b'{"messages": "\xff\xfe\xfa"}'), "train.jsonl"),
    "data that are packed and cut": (MERGE, lambda: (put("chat_a/train.jsonl.gz", b"\x1f\x8b\x08\x00cut"), drop("chat_a/train.jsonl")), "train.jsonl.gz: packed"),
    "data in a zip": (MERGE, lambda: put("chat_a/train.jsonl", b"PK\x03\x04rest"), "packed .zip"),
    "a table with a row too short": (MERGE.replace("chat_b", "t.csv"), lambda: put("t.csv", "prompt,completion\na,b\nc\n"), "t.csv:3: 1 cells under 2 columns"),
    "a table with a name twice": (MERGE.replace("chat_b", "t.csv"), lambda: put("t.csv", "prompt,prompt\na,b\n"), "t.csv:1"),
    "a table with a quote that stays open": (MERGE.replace("chat_b", "t.csv"), lambda: put("t.csv", 'prompt,completion\na,"b\n'), "t.csv:2: not CSV"),
    "a table with null bytes": (MERGE.replace("chat_b", "t.csv"), lambda: put("t.csv", b"prompt,completion\na\x00b,c\n"), "t.csv"),
    "a Parquet file that is none": (MERGE.replace("chat_b", "t.parquet"), lambda: put("t.parquet", b"PAR1xxxxPAR1"), "t.parquet"),
    "a file of an unknown kind": (MERGE.replace("chat_b", "t.docx"), lambda: put("t.docx", "x"), "t.docx"),
    "a stored dataset that was cut": (MERGE.replace("chat_b", "disk"), lambda: (put("disk/dataset_info.json", "{"), put("disk/state.json", "{}")), "disk"),
    # checkpoints, histories and masks of a run
    "no checkpoint": (RESUME, lambda: [drop(f"run/checkpoint-{n}") for n in (1, 2)], "run has no checkpoint"),
    "checkpoints that lack a file": (RESUME, lambda: [drop(f"run/checkpoint-{n}/optimizer.json") for n in (1, 2)], "optimizer.json is missing"),
    "checkpoints that were edited": (RESUME, lambda: [put(f"run/checkpoint-{n}/trainer_state.json", "{}") for n in (1, 2)], "trainer_state.json is not what was written"),
    "a checkpoint with a state that was cut": (f"{RESUME} --max_steps 3", lambda: resealed("trainer_state.json", "{"), "trainer_state.json"),
    "checkpoints that were not finished": (RESUME, lambda: [drop(f"run/checkpoint-{n}/manifest.json") for n in (1, 2)], "manifest.json is missing"),
    "a checkpoint with an optimizer that was cut": (f"{RESUME} --max_steps 3", lambda: resealed("optimizer.safetensors", b"PK\x03\x04"), "optimizer.safetensors"),
    "a checkpoint with an optimizer that is a pickle": (f"{RESUME} --max_steps 3", lambda: (torch.save(Runs(), "run/checkpoint-2/optimizer.safetensors"), seal("run/checkpoint-2")), "optimizer.safetensors"),
    "a checkpoint with an optimizer that is a list": (f"{RESUME} --max_steps 3", lambda: resealed("optimizer.json", "[]"), "optimizer.json"),
    "a checkpoint with chance that is a pickle": (f"{RESUME} --max_steps 3", lambda: (torch.save(Runs(), "run/checkpoint-2/rng_state.json"), seal("run/checkpoint-2")), "rng_state.json"),
    "a checkpoint with masks that were cut": (f"{RESUME} --max_steps 3", lambda: resealed("masks.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{"), "masks.safetensors"),
    "a checkpoint with other masks": (RESUME, lambda: (tensors("run/checkpoint-2/masks.safetensors", lambda t: {"x": torch.ones(2)}), seal("run/checkpoint-2")), "masks"),
    "a history with a line that is none": (RESUME, lambda: put("run/history.jsonl", "{no\n" + Path("run/history.jsonl").read_text()), "history.jsonl:1: this line is no row"),
    "a history that is a list": (f"{RESUME} --max_steps 3", lambda: put("run/history.jsonl", "[1]\n[2]\n"), "history.jsonl:1"),
    "a run whose options were cut": (RESUME, lambda: put("run/config.yaml", Path("run/config.yaml").read_text()[:300] + "\n  - [: {"), "run/config.yaml"),
    "a run with options of another version": (RESUME, lambda: put("run/config.yaml", Path("run/config.yaml").read_text() + "brand_new: 1\n"), "run/config.yaml.*brand_new"),
    # verify, export, align, push, preflight, memory
    "verifying nothing": ("verify", None, "path=''"),
    "verifying what is not there": ("verify nowhere", None, "nowhere"),
    "verifying weights that were cut": ("verify run/merged", lambda: put("run/merged/model.safetensors", Path("run/merged/model.safetensors").read_bytes()[:-1]), "model.safetensors is not what was written"),
    "verifying weights that were cut, without checksums": ("verify run/merged", lambda: (put("run/merged/model.safetensors", Path("run/merged/model.safetensors").read_bytes()[:-1]), drop("run/merged/SHA256SUMS")), "model.safetensors is truncated"),
    "verifying a config that was changed": ("verify run/merged", lambda: edit("run/merged/config.json", rms_norm_eps=0.1), "config.json is not what was written"),
    "verifying with a reader of none": ("verify a --against nothing", None, "against"),
    "exporting nothing": ("export", None, "path=''"),
    "exporting what is not there": ("export nowhere", None, "nowhere"),
    "exporting data": ("export chat_a", None, "chat_a"),
    "exporting in a form of none": ("export run --format onnx", None, "format"),
    "exporting over other files": ("export run --output_dir chat_a", None, "chat_a holds files and is no export"),
    "exporting masks that were cut": ("export run", lambda: (put("run/masks/masks.safetensors", b"\x00"), shutil.rmtree("run/merged")), "masks.safetensors"),
    "exporting masks whose options were cut": ("export run/masks", lambda: put("run/masks/merger_config.json", "{"), "merger_config.json"),
    "exporting masks whose components are gone": ("export run/masks", lambda: drop("b"), "b"),
    "exporting masks whose components changed": ("export run/masks", lambda: tensors("b/model.safetensors", lambda t: {name: 2 * x for name, x in t.items()}), "changed"),
    "exporting masks of NaN": ("export run/masks", lambda: tensors("run/masks/masks.safetensors", lambda t: {name: torch.full_like(x, torch.nan) for name, x in t.items()}), "masks.safetensors|NaN|finite"),
    "exporting masks of another shape": ("export run/masks", lambda: tensors("run/masks/masks.safetensors", lambda t: {name: torch.ones(7) for name in t}), "mask"),
    "exporting a GGUF that was cut": ("export m.gguf", lambda: put("m.gguf", b"GGUF\x03\x00"), "m.gguf"),
    "pushing nothing": ("push", None, "push: expected"),
    "aligning one": ("align a", None, "at least two"),
    "aligning over other files": ("align a b --output_dir aligned", lambda: put("aligned/a/x", "x"), "aligned/a already holds files"),
    "comparing files one": ("preflight a", None, "at least two"),
    "memory of what is not there": ("memory nowhere", None, "nowhere"),
    "memory of a negative length": ("memory a --max_length -3", None, "max_length"),
    # layer merge, quantize, router
    "layer merge of what is not there": ("layer-merge nowhere --output_dir out", None, "nowhere"),
    "layer merge of all layers": (f"{LAYERS} --n_pairs 9 --data_dir chat_a", None, "n_pairs"),
    "layer merge of pairs that are none": (f"{LAYERS} --merge_pairs 0:0", None, "merge_pairs"),
    "layer merge of weights that are cut": (LAYERS, lambda: put("a/model.safetensors", Path("a/model.safetensors").read_bytes()[:-1]), "model.safetensors is truncated"),
    "layer merge on data of none": (f"{LAYERS} --data_dir nowhere", None, "nowhere"),
    "quantize nothing": ("quantize --output_dir out", None, "model_path=''"),
    "quantize what is not there": ("quantize nowhere --output_dir out", None, "nowhere"),
    "quantize with more bits than there are": (f"{QUANTIZE} --parent_precision 9", None, "parent_precision=9"),
    "quantize from more to fewer bits": (f"{QUANTIZE} --seed_precision 6 --parent_precision 3", None, "seed_precision=6"),
    "quantize with a mix of no number": (f"{QUANTIZE} --static nan", None, "static"),
    "quantize with a mix below the fewest bits": (f"{QUANTIZE} --static 2.5", None, "static=2.5"),
    "quantize on a text of none": (QUANTIZE.replace("text.txt", "nothing.txt"), None, "nothing.txt"),
    "quantize on an empty text": (QUANTIZE, lambda: put("text.txt", ""), "text.txt"),
    "quantize on a text that is no text": (QUANTIZE, lambda: put("text.txt", b"\xff\xfa" * 50), "text.txt"),
    "quantize on a device of none": (f"{QUANTIZE} --device abacus".replace("--device cpu ", ""), None, "device"),
    "router of nothing": ("router --output_dir out", None, "model_path=''"),
    "router of a plain model": (ROUTER.replace("router q", "router a"), None, "a"),
    "router of what is not there": (ROUTER.replace("router q", "router nowhere"), None, "nowhere"),
    "router of a config that was cut": (ROUTER, lambda: put("q/config.json", "{"), "q"),
    "router of a layer that was cut": (ROUTER, lambda: put(next(Path("q").rglob("*layer*.safetensors")), b"\x01"), "safetensors"),
    "router of a layer that is gone": (ROUTER, lambda: drop(max(Path("q").rglob("*layer*.safetensors"))), "layer"),
    "router of precisions of none": (f"{ROUTER} --precisions 2 40", None, "precisions"),
    "router with a target out of reach": (f"{ROUTER} --target_bits 1", None, "target_bits"),
    "router with a prefix of all": (ROUTER.replace("prefix_length 4", "prefix_length 99"), None, "prefix_length=99"),
    "router on too little text": (ROUTER, lambda: put("text.txt", "the cat"), "text.txt|window"),
    # adapters
    "lora on what is not there": (LORA.replace("base_model a", "base_model nowhere"), None, "nowhere"),
    "lora on data of none": (LORA.replace("chat_a/train.jsonl", "nothing.jsonl"), None, "nothing.jsonl"),
    "lora on data that are spoiled": (LORA, lambda: chat("{"), "train.jsonl:1"),
    "lora on modules of none": (f"{LORA} --target_modules nothing", None, "nothing"),
    "lora with a rank of none": (f"{LORA} --r 0", None, "r=0"),
    "merging one adapter": (ADAPTERS.replace("x y", "x"), None, "adapter"),
    "an adapter that is not there": (ADAPTERS.replace("x y", "x nowhere"), None, "nowhere"),
    "an adapter whose config was cut": (ADAPTERS, lambda: put("y/adapter_config.json", "{"), "y.*adapter_config.json"),
    "an adapter whose config is a list": (ADAPTERS, lambda: put("y/adapter_config.json", "[]"), "y.*adapter_config.json"),
    "an adapter of an unknown kind": (ADAPTERS, lambda: edit("y/adapter_config.json", peft_type="MAGIC"), "y.*MAGIC"),
    "an adapter with a rank of text": (ADAPTERS, lambda: edit("y/adapter_config.json", r="two"), "y"),
    "an adapter with a rank of zero": (ADAPTERS, lambda: edit("y/adapter_config.json", r=0), "y"),
    "an adapter without weights": (ADAPTERS, lambda: drop("y/adapter_model.safetensors"), "y.*adapter_model.safetensors"),
    "an adapter in a pickle": (ADAPTERS, lambda: Path("y/adapter_model.safetensors").rename("y/adapter_model.bin"), "no pickle is loaded"),
    "an adapter that was cut": (ADAPTERS, lambda: put("y/adapter_model.safetensors", Path("y/adapter_model.safetensors").read_bytes()[:-1]), "adapter_model.safetensors"),
    "an adapter with half of its factors": (ADAPTERS, lambda: tensors("y/adapter_model.safetensors", lambda t: {name: x for name, x in t.items() if "lora_B" not in name}), "y"),
    "an adapter of another width": (ADAPTERS, lambda: tensors("y/adapter_model.safetensors", lambda t: {name: torch.ones(2, 5) if "lora_A" in name else x for name, x in t.items()}), "y"),
    "an adapter of other layers": (ADAPTERS, lambda: tensors("y/adapter_model.safetensors", lambda t: {name.replace("layers.0", "layers.7"): x for name, x in t.items()}), "y.*layers.7|layers.7"),
    "an adapter of NaN": (ADAPTERS, lambda: tensors("y/adapter_model.safetensors", lambda t: {name: x * torch.nan for name, x in t.items()}), "y|lora"),
    "an adapter of no base": ("mask-merge --model_paths x y --dataset_configs chat_a chat_b --output_dir out", lambda: [edit(f"{x}/adapter_config.json", base_model_name_or_path=None) for x in "xy"], "does not name its base"),
    "an adapter of a base that is gone": ("mask-merge --model_paths x y --dataset_configs chat_a chat_b --output_dir out", lambda: drop("a"), "base 'a' is not on this machine"),
    # DAM
    "dam of nothing": ("dam-merge", None, "base_model|model_paths"),
    "dam of one": ("dam-merge a b --output_dir out", None, "model"),
    "dam of other shapes": ("dam-merge a b q --output_dir out", None, "q: "),
    "teachers of nothing": ("dam-topk --output_dir out", None, "model_paths|datasets"),
    "teachers of too few data": (TOPK.replace("chat_b chat_a", "chat_b"), None, "datasets"),
    "teachers of a split of none": (f"{TOPK} --split winter", None, "winter"),
    "training dam on no masks": (DAM.replace("name dam", "name a"), None, "a"),
    "training dam on masks that were cut": (DAM, lambda: put("dam/masks.safetensors", b"{}"), "masks.safetensors"),
    "training dam on facts that were cut": (DAM, lambda: put("dam/dam.json", "{"), "dam.json"),
    "training dam on no dataset": (DAM.replace("dir topk", "dir chat_a"), None, "chat_a has no"),
    "training dam on a dataset that is gone": (f"{DAM} --no_generate_logits_on_fly", lambda: [drop(file) for file in Path("topk").rglob("*.arrow")], "topk"),
    "training dam on a dataset that was cut": (f"{DAM} --no_generate_logits_on_fly", lambda: [put(file, b"\xff" * 40) for file in Path("topk").rglob("*.arrow")], "topk"),
    "training dam on a dataset of a cut state": (f"{DAM} --no_generate_logits_on_fly", lambda: put("topk/state.json", "{"), "topk"),
    "training dam at another temperature": (f"{DAM} --temperature 3 --no_generate_logits_on_fly", None, "temperature=3"),
    # compare
    "comparing nothing": ("compare --output_dir out", None, "model_paths|suite"),
    "comparing a suite of none": ("compare --suite winter --output_dir out", None, "suite.*winter"),
    "comparing a suite that is spoiled": ("compare --suite s.yaml --output_dir out", lambda: put("s.yaml", "model_paths: [a"), "s.yaml"),
    "comparing a suite of other options": ("compare --suite s.yaml --output_dir out", lambda: put("s.yaml", "modells: [a, b]"), "s.yaml.*modells"),
    "comparing with fewer data": (COMPARE.replace("chat_a chat_b", "chat_a"), None, "dataset"),
    "comparing a method of none": (f"{COMPARE} --methods magic", None, "magic"),
    "comparing a recipe that is not there": (f"{COMPARE} --recipes none.yml", None, "none.yml"),
    "comparing a recipe that is spoiled": (f"{COMPARE} --recipes r.yml", lambda: put("r.yml", "merge_method: [linear"), "r.yml"),
    "comparing one model": (COMPARE.replace("a b", "a"), None, "expected at least two models"),
    "comparing more models than there are": (f"{COMPARE} --components 2 5", None, "there are 2 models"),
    "comparing by no metric": (f"{COMPARE} --metric beauty", None, "--metric"),
    "comparing what is trained by none": (f"{COMPARE} --trained magic", None, "trained='magic'"),
    "a suite that is a list": (SUITE, lambda: put("s.yaml", "- a"), "s.yaml.*got list"),
    "a suite with a number for models": (SUITE, lambda: put("s.yaml", "model_paths: 3"), "model_paths=3"),
    "a suite of models that are gone": (SUITE, lambda: put("s.yaml", "model_paths: [a, nowhere]\ndatasets: [chat_a, chat_b]"), "nowhere"),
    "a suite of recipes that are gone": (SUITE, lambda: put("s.yaml", "model_paths: [a, b]\ndatasets: [chat_a, chat_b]\nrecipes: [r.yml]"), "r.yml"),
    "a suite in a layout of none": (SUITE, lambda: put("s.yaml", "mergebench: {a: b}"), "mergebench='a'"),
    "a suite in a layout that is a number": (SUITE, lambda: put("s.yaml", "mergebench: 3"), "mergebench=3: expected a base"),
    "a suite of domains that are a text": (SUITE, lambda: put("s.yaml", "mergebench: {base: b, domains: math}"), "a list of domains"),
    "resuming a merge as a comparison": (COMPARE.replace("_dir out", "_dir run") + " --resume", None, "run/config.yaml"),
    "ablating nothing": ("ablate --output_dir out", None, "expected at least two models"),
    "ablating along no axis": (f"{COMPARE} --axes beauty".replace("compare", "ablate"), None, "axes='beauty'"),
    "ablating with fewer data": (COMPARE.replace("compare", "ablate").replace("chat_a chat_b", "chat_a"), None, "datasets"),
    # components in few bits or thin, answers and prompts of the models' own, layer by layer
    "components in bits of none": (f"{MERGE} --frozen_bits 3", None, "--frozen_bits"),
    "components in bits, and thin": (f"{MERGE} --frozen_bits 4 --thin_deltas", None, "frozen_bits with thin_deltas"),
    "components in bits, and divided": (f"{MERGE} --frozen_bits 8 --shard", None, "shard=True with frozen_bits=8"),
    "components in bits, and compiled": (f"{MERGE} --frozen_bits 8 --torch_compile", None, "frozen_bits with torch_compile"),
    "thin deltas from one of the components": (f"{MERGE} --thin_deltas --source_keys 0 1 --base_model a", None, "base_model a is among them"),
    "answers of nobody": (f"{MERGE} --answers parrots", None, "--answers"),
    "answers without a token": (f"{MERGE} --answers components --answer_tokens 0", None, "answer_tokens=0"),
    "answers colder than cold": (f"{MERGE} --answers components --answer_temperature -1", None, "answer_temperature=-1"),
    "answers drawn at one temperature and weighed at another": (f"{MERGE} --on_policy 1 --answer_temperature 0.5", None, "rollout_steps=4 with answer_temperature=0.5"),
    "neither data nor prompts": ("mask-merge --model_paths a b --output_dir out --answers components", None, "no data for a, b.*written_prompts"),
    "more of the blend's answers than rows": (f"{MERGE} --on_policy 1.5", None, "on_policy=1.5"),
    "the blend's answers without a teacher": (f"{MERGE} --on_policy 0.5 --loss_func_name ce", None, "nobody scores what the blend writes"),
    "the blend's answers that are learned in no step": (f"{MERGE} --on_policy 0.5 --rollout_steps 0", None, "rollout_steps=0"),
    "the blend's answers layer by layer": (f"{MERGE} --train_mode layerwise --on_policy 0.5", None, "train_mode='layerwise' with on_policy"),
    "layer by layer in no step": (f"{MERGE} --train_mode layerwise --layer_steps 0", None, "layer_steps=0"),
    "layers of none to compare": (f"{MERGE} --loss_func_name hidden --hidden_layers 9", None, "hidden_layers=.9.: expected 0 to 1"),
    "layers of none of adapters": (f"{ADAPTERS} --loss_func_name hidden --hidden_layers 9", None, "hidden_layers=.9.: expected 0 to 1"),
    # ways of shortening
    "a way of shortening that is none": (f"{LAYERS} --strategy cut", None, "--strategy"),
    "a block of pairs": (f"{BLOCK} --merge_pairs 0,1", None, "merge_pairs with strategy='block'"),
    "a block of all layers": (BLOCK.replace("n_pairs 1", "n_pairs 40"), None, "n_pairs=40"),
    "a block that is not tried": (f"{BLOCK} --block_tries 0", None, "block_tries=0"),
    "further fine-tunes in pairs": (f"{LAYERS} --strategy pairs --n_pairs 1 --other_models b --other_data chat_b", None, "blended by 'block' only"),
    "further fine-tunes without data": (f"{BLOCK} --other_models b", None, "1 other_models, 0 other_data"),
    "further fine-tunes that are not there": (f"{BLOCK} --other_models nowhere --other_data chat_b", None, "nowhere: no such folder"),
    "further fine-tunes of another depth": (f"{BLOCK} --other_models c --other_data chat_b", lambda: (shutil.copytree("b", "c"), edit("c/config.json", num_hidden_layers=1)), "differ in layers"),
    "data of further fine-tunes that are not there": (f"{BLOCK} --other_models b --other_data nowhere", None, "other_data='nowhere'"),
    # exports
    "exporting a rank of no adapter": ("export run --format hf --rank 2", None, "rank=2 with format='hf'"),
    "exporting a type that the form has not": ("export run --format hf --dtype q8_0", None, "dtype of format hf='q8_0'"),
    "exporting a toy for llama.cpp": ("export run --format gguf", None, "llama.cpp has none of that type"),
    "exporting a recipe of many coefficients": ("export run --format mergekit", None, "32 coefficients"),
    "exporting an adapter of full rank": ("export run --format adapter --base_model a", None, "no LoRA adapter holds it"),
}


@contextmanager
def within(seconds):
    "Stop what takes more of the processor's time; how busy the machine is does not matter."

    def stop(*_):
        raise TimeoutError("it takes too long")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def answered(words, capsys):
    "How a command ends, and what it prints."
    with within(5):
        status = main(words.split())
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", CASES)
def test_is_answered(name, here, capsys, monkeypatch):
    words, spoil, expected = CASES[name]
    if spoil:
        spoil()
    if name == "more processes than one":
        monkeypatch.setenv("WORLD_SIZE", "2")
    before = held(here)
    status, out, err = answered(words, capsys)
    told = re.findall(r"^merge-lab.*", err, re.DOTALL | re.MULTILINE)[-1] if status == 2 else out
    assert status in (1, 2), f"{status}: {told}"
    assert re.search(expected, told, re.DOTALL), told
    assert "Traceback" not in err and "hf_" not in err
    assert held(here) == before and not list(here.rglob("pickle_was_run"))


def test_the_table_is_long_enough():
    assert len(CASES) >= 120


# ---- the same, with what chance thinks of: a fixed seed, so that every run of the suite asks the same

chance = settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(codec="utf-8"), max_size=12)
plain = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | texts
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8)
OPTIONS = {name: [field.name for field in dataclasses.fields(command.find(command.config)) if field.init] for name, command in COMMANDS.items()}


@st.composite
def some_options(draw):
    "A command, and a file of its options with values of any kind."
    name = draw(st.sampled_from(sorted(OPTIONS)))
    return name, draw(st.dictionaries(st.sampled_from(OPTIONS[name]) | texts, values, max_size=4))


@chance
@given(some_options())
def test_any_options_are_read_or_refused(tmp_path_factory, drawn):
    name, options = drawn
    file = tmp_path_factory.getbasetemp() / "options.yaml"
    file.write_text(yaml.safe_dump(options, allow_unicode=True), encoding="utf-8")
    with suppress(ValueError):
        parse(name, [str(file)])


@chance
@given(st.sampled_from(sorted(OPTIONS)), st.lists(texts | st.sampled_from(["--seed", "--output_dir", "--dataset_configs", "--mask_init", "{a: [", "a=b", "-1", "none"]), max_size=5))
def test_any_words_are_read_or_refused(name, words):
    with suppress(ValueError):
        parse(name, [word for word in words if not word.endswith((".yaml", ".yml"))])


@chance
@given(st.dictionaries(texts, st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "BOOL", "X"]) | plain, "shape": st.lists(st.integers(-2, 9), max_size=3) | plain, "data_offsets": st.lists(st.integers(-4, 64), min_size=1, max_size=3) | plain}) | values, max_size=3), st.binary(max_size=64))  # fmt: skip
def test_any_header_is_read_as_safetensors_reads_it(tmp_path_factory, entries, data):
    file, text = tmp_path_factory.getbasetemp() / "x.safetensors", json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        told = read_header(file)
    except UnreadableComponent:
        return
    with safe_open(file, "pt") as tensors:
        assert set(told) == set(tensors.keys())


@chance
@given(st.binary(max_size=40) | values.map(lambda value: json.dumps({"weight_map": value}).encode()))
def test_any_index_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_bytes(data)
    with suppress(UnreadableComponent):
        read_headers(folder)


turns = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system"]) | plain, "content": texts | values, "tool_calls": values})
chats = st.fixed_dictionaries({}, optional={"messages": st.lists(turns, max_size=3) | values, "conversations": values, "prompt": texts | values, "completion": texts | values, "tools": values})


@chance
@given(st.lists(chats | values, min_size=1, max_size=3), st.sampled_from(["jsonl", "json"]))
def test_any_rows_are_conversations_or_refused(tmp_path_factory, found, ending):
    file = tmp_path_factory.getbasetemp() / f"rows.{ending}"
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    with suppress(ValueError):
        for row in load_task(file, None):
            assert row["messages"]


@chance
@given(st.binary(max_size=60) | texts.map(str.encode), st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_any_bytes_are_a_table_or_refused(tmp_path_factory, data, ending):
    file = tmp_path_factory.getbasetemp() / f"table.{ending}"
    file.write_bytes(b"prompt,completion\n" * (ending == "csv") + data)
    with suppress(ValueError):
        load_task(file, None)


@chance
@given(st.lists(values.map(json.dumps) | texts, max_size=4))
def test_any_history_is_rows_or_refused(tmp_path_factory, lines):
    file = tmp_path_factory.getbasetemp() / "history.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with suppress(ValueError):
        assert all(isinstance(row, dict) for row in read_rows(file))


@chance
@given(st.fixed_dictionaries({}, optional={"r": plain | values, "rank_pattern": values, "peft_type": plain, "bias": plain, "modules_to_save": values, "base_model_name_or_path": values}) | values)
def test_any_adapter_config_is_read_or_refused(tmp_path_factory, told):
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2), "base_model.model.a.lora_B.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with suppress(UnreadableComponent):
        read_adapter(folder)
    with suppress(ValueError):
        check_adapter(folder)
