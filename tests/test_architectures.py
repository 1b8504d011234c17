"""Every architecture that transformers offers: preflight, a step, export, and the export read back, here and by transformers 4."""

import dataclasses
import json
import re
import subprocess

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from merge_lab.components import preflight
from merge_lab.loop_config import LoopConfig
from merge_lab.leaves import MaskedOwner
from merge_lab.mergeable import extract_learned_alphas, fuse_mergeable_layers, replace_layers_with_mergeable
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.tinylm import perturb, tiny_tokenizer
from merge_lab.training import MergerTrainer, training_arguments
from merge_lab.verify import python_of, READERS, readers_folder

IDS = torch.tensor([[1, 5, 9, 13, 7, 21, 3, 4], [1, 8, 3, 40, 2, 11, 6, 5]])
BATCH = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
SIZES = {  # over all config classes
    96: "vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
    48: "intermediate_size ffn_hidden_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp "
    "dense_intermediate_size prefix_dense_intermediate_size expert_intermediate_size",
    32: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width input_embedding_size output_embedding_size "
    "embed_dim hidden_dim attention_hidden_size rotary_ndims",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size",
    16: "q_lora_rank mamba_d_head mamba_head_dim linear_head_dim",
    8: "head_dim kv_channels global_head_dim kv_lora_rank qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim state_size "
    "ssm_state_size mamba_d_state mamba_chunk_size chunk_size sliding_window attention_window hidden_size_per_layer_input index_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts laurel_rank rotary_dim linear_num_value_heads linear_conv_kernel_dim mamba_n_heads n_mamba_heads "
    "mamba_num_heads time_step_rank mamba_dt_rank qk_rope_head_dim conv_kernel",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_key_value_heads "
    "num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts linear_num_key_heads kda_num_heads attn_layer_period "
    "expert_layer_period mamba_expand expand altup_num_inputs num_block mem_rank adapter_rank qk_conv_kernel eos_token_id",
    1: "n_shared_experts num_shared_experts n_group topk_group n_groups mamba_n_groups first_k_dense_replace moe_layer_start_index "
    "attn_layer_offset expert_layer_offset pretraining_tp bos_token_id",
    0: "pad_token_id num_kv_shared_layers",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
MORE = {  # what a family needs beside, to be small or whole
    "bamba": dict(attn_layer_indices=[1]),
    "ctrl": dict(dff=48),
    "dbrx": dict(attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8), ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, num_key_value_heads=2),
    "dots3_note": dict(num_key_value_heads=4),
    "dots3_note_text": dict(num_key_value_heads=4),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3": dict(
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
        ),
        mm_tokens_per_image=4,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(expert_ffn_hidden_size=24, head_dim=4, zero_expert_num=1),
    "mamba2": dict(num_heads=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=2),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "roc_bert": dict(pronunciation_vocab_size=32, shape_vocab_size=32),
    "xlm": dict(emb_dim=32, n_words=96),
    "xmod": dict(default_language="en_XX"),
    "youtu": dict(pad_token_id=None),
    "zamba": dict(layers_block_type=["mamba", "hybrid", "hybrid"], num_hidden_layers=3),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}


def shrunk(config_class):
    "Values that make a config of this class a tiny one; every kind of layer stays, and parts of its own shrink too."
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    values = {name: size for name, size in SMALL.items() if name in fields and (fields[name].default is not None or name.endswith("token_id"))}
    if "layer_types" in fields and getattr(config_class(), "layer_types", None):
        kinds = list(dict.fromkeys(config_class().layer_types))
        values["layer_types"] = (2 * kinds)[: max(2, len(kinds))]
        values["num_hidden_layers"] = len(values["layer_types"])
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = 4
    parts = getattr(config_class, "sub_configs", {})
    return values | {name: shrunk(part) for name, part in parts.items() if dataclasses.is_dataclass(part)}


def tiny(kind, **more):
    "A tiny config of a type."
    return CONFIG_MAPPING[kind](**shrunk(CONFIG_MAPPING[kind]) | MORE.get(kind, {}) | more)


def family(kind, n=2, **more):
    "Fine-tunes of one random model."
    models, config = [], tiny(kind, **more)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 3e6, "not tiny: see SIZES and MORE"
    for seed in range(n):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(tiny(kind, **more), dtype=torch.float32).eval())
        perturb(models[-1], 0.2, seed)
    return models


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**BATCH, **inputs).logits


OWNERS = ["bert", "camembert", "gpt_oss", "qwen3_5_text", "qwen3_next", "mamba2", "doge", "gemma3n_text", "jetmoe", "hrm_text"]


@pytest.mark.parametrize("kind", OWNERS)
def test_parameters_beside_children_are_blended_and_so_are_the_children(kind):
    models = family(kind)
    wanted, plain = [logits_of(model) for model in models], family(kind, n=1)[0]
    states = [{name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)} for model in models]
    types = {name: type(module).__name__ for name, module in plain.named_modules()}
    merger = Merger(models, MergerConfig()).eval()
    owners = {name for name, leaf in merger.leaves().items() if isinstance(leaf, MaskedOwner)}
    assert owners and all(type(merger.model.get_submodule(name)).__name__ == types[name] for name in owners)
    for i in range(2):
        merger.init_masks({"strategy": "odd_one_out", "selected_idx": i})
        assert torch.equal(logits_of(merger), wanted[i])
        with merger.as_component(1 - i):
            assert torch.equal(logits_of(merger), wanted[1 - i])
    assert {name for name, _, _ in merger.masked_parameters()} <= states[0].keys()
    merger.init_masks({"strategy": "uniform", "factors": [0.3, 0.7]})
    merged = merger.merged_state_dict()
    named = merged.keys() & states[0].keys()
    assert len(named) == len(list(plain.parameters()))
    for name in named:
        assert_close(merged[name], 0.3 * states[0][name] + 0.7 * states[1][name])
    plain.load_state_dict(merged, strict=False)
    plain.tie_weights()
    assert_close(logits_of(plain), logits_of(merger), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["doge", "qwen3_5_text", "gpt_oss"])
def test_what_is_computed_again_in_backward_sees_the_blend(kind):
    results = []
    for checkpointing in (False, True):
        merger = Merger(family(kind), MergerConfig())
        if checkpointing:
            merger.checkpoint_activations()
        merger.train()
        loss = merger(objective=Objective(), labels=IDS, source=torch.tensor([0, 1]), **BATCH)["loss"]
        results.append(torch.autograd.grad(loss, [p for p in merger.parameters() if p.requires_grad]))
    for one, other in zip(*results):
        assert_close(one, other)


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("kind", ["gpt_oss", "mamba2", "doge", "diffllama", "nemotron_h"])
def test_layers_whose_modules_have_parameters_and_children_are_paired(kind, per_module):
    deeper = dict(layer_types=["full_attention"] * 4) if kind == "gpt_oss" else dict(layer_types=["mamba"] * 4) if kind == "nemotron_h" else {}
    model = family(kind, n=1, **{"num_hidden_layers": 4} | deeper)[0].requires_grad_(False)
    wanted = logits_of(model, use_cache=False)
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    into, removed = (2, 3) if kind == "diffllama" else (1, 2)  # a layer's number is in its attention there, so only the last may go
    replace_layers_with_mergeable(model, [(into, removed, 0.7)], "given", per_module=per_module)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.equal(*(as_before(model) for _ in range(2))) and torch.equal(as_before(model), wanted)
    model(**BATCH, use_cache=False).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in trained) and len(trained) == (len(extract_learned_alphas(model)[0][2]) if per_module else 1)
    blended = logits_of(model, use_cache=False)
    short = fuse_mergeable_layers(model)
    assert_close(logits_of(short, use_cache=False), blended, atol=1e-5, rtol=1e-5)
    parts = [(name, name.replace(f".{into}.", f".{removed}.", 1)) for name in tensors if f".{into}." in name]
    fused = dict(short.named_parameters())
    assert parts and len(fused) == len(tensors) - len(parts)
    for kept, other in parts:
        assert_close(fused[kept], 0.7 * tensors[kept] + 0.3 * tensors[other])


def as_before(model):
    from merge_lab.mergeable import as_original

    with as_original(model):
        return logits_of(model, use_cache=False)


class Told(TrainerCallback):
    "Keeps what a config says at every step."

    def __init__(self, config):
        self.config, self.said = config, []

    def on_step_end(self, args, state, control, **kwargs):
        self.said.append(self.config.to_dict())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba2", "openai-gpt", "xlm", "xlnet"])
def test_training_makes_no_cache_and_leaves_the_config_as_it_is(kind, fused, tmp_path):
    "Also where a config of several parts has no `use_cache` of its own, so that exports say what components say."
    models = family(kind)
    before, caches = models[0].config.to_dict(), []
    merger, told = Merger(models, MergerConfig()), Told(models[0].config)
    for module in merger.model.modules():
        module.register_forward_hook(lambda module, args, output: caches.append(getattr(output, "past_key_values", getattr(output, "cache_params", None))))
    rows = [dict(input_ids=row, labels=row, attention_mask=torch.ones_like(row), source=torch.tensor(i)) for i, row in enumerate(IDS)]
    arguments = training_arguments(LoopConfig(max_steps=2, device="cpu", save_steps=0), tmp_path)
    trainer = MergerTrainer(merger, arguments, Objective(fused=fused), train_dataset=rows)
    trainer.add_callback(told)
    trainer.train()
    assert told.said == [before, before] and merger.config.to_dict() == before
    assert caches and all(cache is None for cache in caches)


# the matrix

BY_DEFAULT = [  # dense, tied and untied; mixtures of experts; hybrids and state spaces; wrappers; heads of more than a linear
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "cohere", "granite",
    "olmo2", "stablelm", "starcoder2", "smollm3", "modernbert-decoder", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "ernie4_5_moe",
    "jetmoe", "afmoe", "llama4", "mamba", "mamba2", "qwen3_next", "qwen3_5_text", "falcon_h1", "nemotron_h", "lfm2", "gemma3", "gemma4", "mllama",
    "bert", "rembert", "xlm-roberta",
]  # fmt: skip
REFUSED = {  # what preflight says, for a reason that transformers gives
    "emu3": "not a causal language model",
    "mllama": "not a causal language model",
}
BROKEN: dict[str, str] = {}  # what is known to be wrong, and why
LEFT_OUT = {  # none is made here, and why
    "blt": "its tables of hashed bytes are large whatever its widths are",
    "cohere_compass_text": "transformers makes none from its config's defaults",
    "dots1": "transformers makes none from its config's defaults",
    "dots3_note": "its config names the layers that differ, of 42",
    "dots3_note_text": "its config names the layers that differ, of 42",
    "fuyu": "its language model is a config of any type",
    "gemma3n": "its picture tower needs timm",
    "gemma4_assistant": "a draft that reads another model's cache",
    "gemma4_unified": "its tables of patches are large whatever its widths are",
    "gemma4_unified_assistant": "a draft that reads another model's cache",
    "got_ocr2": "its language model is a config of any type",
    "moshi": "its parts check each other's vocabularies",
    "moss_transcribe_diarize": "its language model is a config of any type",
    "musicgen": "transformers makes a causal model of its decoder's config only",
    "musicgen_melody": "transformers makes a causal model of its decoder's config only",
    "phi4_multimodal": "its sound tower is large whatever its widths are",
    "qwen4_exp": "transformers makes none from its config's defaults",
    "qwen4_exp_text": "transformers makes none from its config's defaults",
    "reformer": "it reads only texts whose length is a multiple of its chunks'",
    "xlstm": "its widths follow from others that are no fields of its config",
}
IDLE = {  # parameters without a gradient, by a part of the name
    "expert_bias|e_score_correction_bias": "chooses experts by rank, and no rank has a slope",
    "indexer|compressor": "chooses by rank what is attended to, or begins with longer texts",
    "encoder_attn|cross_attn": "reads an encoder that is not there",
    "embed_positions": "waves of fixed lengths, looked up without a gradient",
    "pooler|mask_emb|seg_embed|r_s_bias": "of another task than the next token",
    "z_L_init": "begins a loop whose first rounds have no gradient",
    "vision|visual|image|audio|multi_modal": "of a part that reads pictures or sounds, and rows of text have none",
}


def matrix():
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if kind not in LEFT_OUT:
            wrong = [pytest.mark.xfail(reason=BROKEN[kind], strict=True)] if kind in BROKEN else []
            yield pytest.param(kind, marks=wrong if kind in BY_DEFAULT else [*wrong, pytest.mark.slow])


EXPORTS = {}  # type -> folder of the merged model, and what it says of IDS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.parametrize("kind", matrix())
def test_what_preflight_accepts_trains_exports_and_reloads(kind, root):
    paths, wanted = [], []
    for i, model in enumerate(family(kind)):
        paths.append(str(root / kind / str(i)))
        wanted.append(logits_of(model))
        model.save_pretrained(paths[i])
        tiny_tokenizer().save_pretrained(paths[i])
    report = preflight(paths)
    told = " ".join(report.obstacle[~report.ok])
    assert (REFUSED[kind] in told) if kind in REFUSED else not told
    if kind in REFUSED:
        return
    merger = Merger.from_config(MergerConfig(paths, dtype="float32")).eval()
    for i in range(2):
        with merger.as_component(i):
            assert_close(logits_of(merger), wanted[i], atol=1e-5, rtol=1e-5)
    merger(objective=Objective(), labels=IDS, source=torch.tensor([0, 1]), **BATCH)["loss"].backward()
    masks = {name: leaf.masks[key] for name, leaf, key in merger.masked_parameters()}
    idle = [name for name, mask in masks.items() if mask.grad is None and not re.search("|".join(IDLE), name)]
    assert not idle and all(mask.grad.isfinite().all() for mask in masks.values() if mask.grad is not None)
    torch.optim.SGD(masks.values(), lr=0.1).step()
    merger.save_merged(root / kind / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(root / kind / "merged", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits_of(merged.eval()), logits_of(merger), atol=1e-5, rtol=1e-5)
    report = preflight([paths[0], str(root / kind / "merged")])
    assert report.ok.all(), list(report.obstacle[~report.ok])
    EXPORTS[kind] = root / kind / "merged", logits_of(merged)


OLDER = {  # what transformers 4.57 does not read as it is meant, and why
    "gemma3": "transformers 5 itself writes the picture tower without the prefix that 4.57 gives it",
}
READ_BY_4 = """
import json, sys, torch
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
from transformers.utils import logging
logging.set_verbosity_error()
told, ids = {}, torch.tensor(json.loads(sys.argv[2]))
for kind, folder in json.loads(sys.argv[1]).items():
    if json.load(open(folder + "/config.json"))["model_type"] not in CONFIG_MAPPING:
        continue
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        apart = (logits - torch.load(folder + "/logits.pt")).abs().max().item()
        told[kind] = [info["missing_keys"], info["unexpected_keys"], apart]
    except Exception as error:
        told[kind] = repr(error)
print(json.dumps(told, default=list))
"""


def reader_4():
    "The interpreter of an environment with transformers 4."
    made = readers_folder() / "transformers-4" / "made_of.txt"
    if not made.exists() or made.read_text(encoding="utf-8") != " ".join(READERS["transformers-4"].packages):
        pytest.skip("no environment with transformers 4.57; `merge-lab verify MODEL --against transformers-4` makes one")
    return python_of("transformers-4")


def test_transformers_4_reads_what_it_knows_alike():
    python = reader_4()
    if not EXPORTS:
        pytest.skip("nothing was exported before")
    for folder, logits in EXPORTS.values():
        torch.save(logits, folder / "logits.pt")
    folders = json.dumps({kind: str(folder) for kind, (folder, _) in EXPORTS.items()})
    done = subprocess.run([python, "-c", READ_BY_4, folders, json.dumps(IDS.tolist())], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    alike = {kind: said for kind, said in told.items() if not isinstance(said, str) and not said[0] and not said[1] and said[2] < 1e-5}
    assert told.keys() - alike.keys() <= OLDER.keys(), {kind: told[kind] for kind in told.keys() - alike.keys() - OLDER.keys()}
    assert len(EXPORTS) < 30 or len(alike) >= 25
