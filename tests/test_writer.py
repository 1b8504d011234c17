"""What checkpoints say to other readers: older config keys of every family, names in files, and what transformers 4 makes of them."""

import json
import subprocess

import pytest
import torch
from torch.testing import assert_close
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from merge_lab.components import preflight
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import bundled_path
from merge_lab.verify import READERS, compare_readers, python_of, text_tokens
from merge_lab.writer import write_model_config

THETA = 54321.0  # no family's default


def with_theta(kind):
    "A config of the family with bases of its own for RoPE, or None where it has none."
    try:
        config = CONFIG_MAPPING[kind]()
    except (TypeError, ValueError, AttributeError, StrictDataclassError):  # a few families cannot be made without arguments
        return None
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return None
    tables = [table for table in rope.values() if isinstance(table, dict)] or [rope]
    for place, table in enumerate(tables):
        if "rope_theta" in table:
            table["rope_theta"] = THETA + place
    own = config.to_dict().get("rope_theta")  # families of 5 that tell it twice; changing one of the two makes no config of theirs
    return config if own is None and any("rope_theta" in table for table in tables) else None


FAMILIES = {kind: config for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if (config := with_theta(kind)) is not None}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for kind, config in FAMILIES.items():
        write_model_config(config, folder / kind)
        config.save_pretrained(folder / f"{kind}-plain")
    return folder


def test_many_families_have_rotary_embeddings():
    assert len(FAMILIES) > 60


@pytest.mark.parametrize("kind", FAMILIES)
def test_older_keys_stand_beside_the_new_ones(configs, kind):
    told = json.loads((configs / kind / "config.json").read_text())
    thetas = {value for name, value in told.items() if name in ("rope_theta", "rotary_emb_base", "global_rope_theta")}
    rope = told["rope_parameters"]
    flat = rope.get("full_attention") or next((table for table in rope.values() if isinstance(table, dict)), rope)
    assert thetas == {flat["rope_theta"]}
    read = [AutoConfig.from_pretrained(configs / name).to_dict() for name in (kind, f"{kind}-plain")]
    assert {name: read[0].get(name) for name in read[1] if name != "_name_or_path"} == {name: value for name, value in read[1].items() if name != "_name_or_path"}


@pytest.fixture(scope="module")
def transformers_4():
    try:
        return python_of("transformers-4")
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no environment with transformers 4: {error}")


READ = """
import json, sys, warnings, logging
logging.disable(50)
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
folder, kinds = sys.argv[1], json.loads(sys.argv[2])
found = {}
for kind in kinds:
    if kind in CONFIG_MAPPING_NAMES:
        try:
            found[kind] = json.loads(AutoConfig.from_pretrained(folder + "/" + kind).to_json_string(use_diff=False))
        except Exception as error:
            found[kind] = {"error": repr(error)}
print("FOUND" + json.dumps(found))
"""
UNREADABLE = {
    "dbrx": "4.57 refuses keys that 5 writes into its parts",
    "granitemoehybrid": "its default in 5 names no kind of layer, which 4.57 asks for",
}


def test_transformers_4_reads_the_same_rope(configs, transformers_4):
    done = subprocess.run([transformers_4, "-c", READ, configs, json.dumps(list(FAMILIES))], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.split("FOUND")[1])
    assert len(found) > 50
    for kind, read in found.items():
        if kind in UNREADABLE:
            assert "error" in read, f"{kind} is read now: {UNREADABLE[kind]}"
            continue
        rope = FAMILIES[kind].rope_parameters
        flat = rope.get("full_attention") or next((table for table in rope.values() if isinstance(table, dict)), rope)
        theta = next((read[name] for name in ("rope_theta", "rotary_emb_base", "global_rope_theta") if name in read), None)
        assert theta == flat["rope_theta"], kind
        if "partial_rotary_factor" in flat:
            assert read.get("partial_rotary_factor", read.get("rotary_pct")) == flat["partial_rotary_factor"], kind
        if "sliding_attention" in rope and (local := read.get("rope_local_base_freq", read.get("local_rope_theta"))) is not None:
            assert local == rope["sliding_attention"]["rope_theta"], kind


def small(kind, **more):
    options = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    options |= dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2) | more
    known = CONFIG_MAPPING[kind]()
    return CONFIG_MAPPING[kind](**{name: value for name, value in options.items() if hasattr(known, name)})


EXPORTS = {
    "llama": dict(rope_parameters={"rope_type": "default", "rope_theta": THETA}),
    "llama, scaled": dict(rope_parameters={
        "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }),
    "llama, tied": dict(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": THETA}),
    "qwen2": dict(rope_parameters={"rope_type": "default", "rope_theta": THETA}),
    "qwen3": dict(head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": THETA}),
    "mixtral": dict(num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": THETA}),
    "qwen3_moe": dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, rope_parameters={"rope_type": "default", "rope_theta": THETA}),
    "gemma3_text": dict(head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": dict(rope_parameters={"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}),
    "phi": dict(rope_parameters={"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}),
}  # fmt: skip


@pytest.fixture(scope="module", params=EXPORTS)
def export(request, tmp_path_factory):
    "A merge of two experts: the merger and its checkpoint."
    folder, kind = tmp_path_factory.mktemp("export"), request.param.split(",")[0]
    config, paths = small(kind, **EXPORTS[request.param]), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = folder / f"expert{seed}"
        AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (path / name).write_bytes((bundled_path("models/base") / name).read_bytes())
        paths.append(str(path))
    merger = Merger.from_config(MergerConfig(paths, mask_init={"strategy": "uniform", "factors": [0.3, 0.7]})).eval()
    merger.save_merged(folder / "merged", max_shard_size="200KB")
    return merger, folder / "merged", paths


def test_an_export_is_named_as_its_parents_and_says_the_same(export):
    from merge_lab.verify import stored_in

    merger, folder, paths = export
    assert set(stored_in(folder)) == set(stored_in(paths[0]))
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    report = preflight([*paths, str(folder)])
    assert report.ok.all(), report[~report.ok].obstacle.tolist()
    ids = torch.tensor([text_tokens(folder, 40)])
    with torch.no_grad():
        assert_close(again.eval()(ids).logits, merger(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


READ_BY_4 = ("llama, scaled", "mixtral", "gemma3_text", "gpt_neox")  # a process each; what the others have in common with these is tested above


@pytest.mark.parametrize("export", READ_BY_4, indirect=True)
def test_transformers_4_says_the_same_of_an_export(export, transformers_4):
    folder = export[1]
    table = compare_readers(folder, ["transformers-4"], text_tokens(folder, 40))
    assert table.same.all(), table.remark.tolist()
    assert table.largest.max() < 1e-4


def test_every_reader_is_pinned():
    for reader in READERS.values():
        assert all("==" in package or "<" in package for package in reader.packages)
