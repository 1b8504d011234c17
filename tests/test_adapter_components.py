"""Adapters as components: held as a base and factors, blended, judged and exported as the models that they make."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from merge_lab.adapter_files import read_adapter
from merge_lab.adapters import load_base, merge_adapter, read_adapters
from merge_lab.components import find_base, load_model, preflight
from merge_lab.distributed import frozen_bytes
from merge_lab.memory import estimate_memory, track_memory, training_step
from merge_lab.merger import Merger, MergerConfig
from merge_lab.objective import Objective
from merge_lab.tinylm import save_tiny, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
FRESH = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
KINDS = {  # options of peft; {embedding} stands for the name of the table
    "factors": {},
    "rslora": dict(use_rslora=True, r=3),
    "dora": dict(use_dora=True),
    "saved embedding": dict(modules_to_save=["{embedding}"]),
    "saved head": dict(modules_to_save=["lm_head"]),
    "saved together": dict(modules_to_save=["{embedding}"], ensure_weight_tying=True),
    "adapted embedding": dict(target_modules=["{embedding}"]),
    "adapted head": dict(target_modules=["lm_head"]),
    "adapted both": dict(target_modules=["{embedding}", "lm_head"]),
    "biases": dict(bias="all"),
    "single tokens": dict(trainable_token_indices=[1, 2]),
}
HELD = {"factors", "rslora", "saved embedding", "saved head", "saved together", "adapted embedding", "adapted head", "adapted both", "biases"}


def save_adapter(folder, base, seed=0, noise=0.3, save="auto", **options) -> str:
    "An adapter none of whose trained numbers is what peft starts from."
    model = AutoModelForCausalLM.from_pretrained(base)
    kind = model.config.model_type
    targets = FRESH[kind] + options.pop("target_modules", [])
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "fan_in_fan_out": kind == "gpt2", "target_modules": targets} | options
    for name, value in options.items():
        if name in ("target_modules", "modules_to_save"):
            options[name] = [each.format(embedding=EMBEDDING[kind]) for each in value]
    adapted = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    trained = re.compile("lora_|modules_to_save|trainable_tokens" + ("|bias" if options.get("bias") else ""))
    for name, parameter in adapted.named_parameters():
        if trained.search(name):
            parameter.data.normal_(0, noise)
    adapted.save_pretrained(folder, save_embedding_layers=save)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")

    @functools.cache
    def base(kind: str, tied: bool) -> str:
        return str(save_tiny(tiny_model(kind, tie_word_embeddings=tied), root / f"{kind}-{tied}"))

    return base


@pytest.fixture
def pair(bases, tmp_path):
    base = bases("llama", False)
    return [save_adapter(tmp_path / name, base, seed) for seed, name in enumerate("ab")], base


def theirs(base, folder, ids):
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(ids).logits


def stirred(merger: Merger, amount=0.2) -> Merger:
    torch.manual_seed(7)
    for _, leaf, key in merger.masked_parameters():
        leaf.masks[key].data += torch.randn_like(leaf.masks[key]) * amount
    return merger


def share_of(merger: Merger, base: str) -> float:
    return frozen_bytes(merger) / sum(p.nbytes for p in load_model(base).parameters())


IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
CASES = [(kind, tied, name) for kind in FRESH for tied in (True, False) for name in KINDS]


@pytest.mark.parametrize("kind, tied, name", CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_component_is_what_peft_makes_of_it(bases, tmp_path, kind, tied, name):
    base = bases(kind, tied)
    plain, other = save_adapter(tmp_path / "plain", base, 1), save_adapter(tmp_path / "other", base, 2, **KINDS[name])
    assert preflight([plain, other, base]).ok.all()
    expected = theirs(base, other, IDS)
    assert_close(load_model(other)(IDS).logits, expected, rtol=1e-4, atol=1e-5)

    merger = Merger.from_config(MergerConfig([plain, other], mode="vector_output", base_model=base))
    assert_close(merger.component_forward(1, input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert_close(merger.component_forward(0, input_ids=IDS).logits, theirs(base, plain, IDS), rtol=1e-4, atol=1e-5)
    assert torch.equal(merger.component_forward(2, input_ids=IDS).logits, merger.component_forward(2, input_ids=IDS).logits)
    assert_close(merger.component_forward(2, input_ids=IDS).logits, load_model(base)(IDS).logits)
    assert (read_adapter(other).reason == "") == (name in HELD)

    stirred(merger).save_merged(tmp_path / "merged")
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
        assert_close(exported, merger(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["scalar", "vector_input", "vector_output"])
@pytest.mark.parametrize("constrain_mode", ["delta", "identity", "sum1", "spherical"])
@pytest.mark.parametrize("impl", ["fused", "accurate", "efficient"])
def test_blend_and_gradients_are_those_of_merged_models(pair, mode, constrain_mode, impl):
    adapters, base = pair
    config = MergerConfig(adapters, mode=mode, constrain_mode=constrain_mode, impl=impl, base_model=base)
    factored = Merger.from_config(config)
    paths = [*adapters, base] if constrain_mode == "delta" else adapters
    whole = Merger([load_model(path) for path in paths], config)
    if constrain_mode != "spherical":
        stirred(factored)
    masks = factored.mask_state()
    whole.load_mask_state({name: masks.get(name, mask) for name, mask in whole.mask_state().items()})
    losses = [merger(input_ids=IDS, labels=IDS).loss for merger in (factored, whole)]
    assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    own, other = ({name: leaf.masks[key].grad for name, leaf, key in merger.masked_parameters()} for merger in (factored, whole))
    assert own
    for name, gradient in own.items():  # the anchor's own mask has no effect
        assert_close(gradient, other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode, constrain_mode", [("vector_input", "delta"), ("vector_output", "identity"), ("scalar", "01")])
def test_gradients_are_exact_by_finite_differences(pair, mode, constrain_mode):
    "Of a leaf, in float64: layers above it round to float32."
    adapters, base = pair
    merger = stirred(Merger.from_config(MergerConfig(adapters, mode, constrain_mode, base_model=base))).double()
    leaf = merger.leaves()["model.layers.0.self_attn.q_proj"]
    mask, generator = leaf.masks["weight"], torch.Generator().manual_seed(1)
    x, way = torch.randn(5, 32, generator=generator).double(), torch.randn(mask.shape, generator=generator).double()
    leaf(x).square().sum().backward()
    sums = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            mask += step * way
            sums.append(leaf(x).square().sum().item())
            mask -= step * way
    assert (sums[0] - sums[1]) / 2e-5 == pytest.approx((mask.grad * way).sum().item(), rel=1e-7)


def test_one_hot_coefficients_give_a_component_to_the_bit(pair):
    adapters, base = pair
    for constrain_mode in ("delta", "identity"):
        init = {"strategy": "odd_one_out", "selected_idx": 1}
        merger = Merger.from_config(MergerConfig(adapters, constrain_mode=constrain_mode, base_model=base, mask_init=init))
        with torch.no_grad():
            assert torch.equal(merger(input_ids=IDS).logits, merger.component_forward(1, input_ids=IDS).logits)


def test_an_adapter_beside_a_whole_model(pair, tmp_path):
    "A full fine-tune, an adapter and a base: whatever they share is held once."
    (adapter, _), base = pair
    tuned = load_model(base)
    tuned.model.layers[0].mlp.down_proj.weight.data += 0.1
    save_tiny(tuned, tmp_path / "tuned")
    merger = stirred(Merger.from_config(MergerConfig([adapter, str(tmp_path / "tuned")], base_model=base)))
    assert share_of(merger, base) < 1.4
    assert_close(merger.component_forward(1, input_ids=IDS).logits, tuned(IDS).logits)
    merger.save_merged(tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(IDS).logits, merger(input_ids=IDS).logits.detach(), rtol=1e-4, atol=1e-5)


def test_adapters_of_two_bases_are_two_models(bases, tmp_path):
    other = save_tiny(tiny_model("llama", tie_word_embeddings=False, seed=5), tmp_path / "other")
    paths = [save_adapter(tmp_path / "a", bases("llama", False)), save_adapter(tmp_path / "b", str(other))]
    assert find_base(paths) is None
    merger = Merger.from_config(MergerConfig(paths))
    for i, (base, path) in enumerate(zip([bases("llama", False), other], paths)):
        assert_close(merger.component_forward(i, input_ids=IDS).logits, theirs(base, path, IDS), rtol=1e-4, atol=1e-5)


def test_generation_and_saved_masks(pair, tmp_path):
    adapters, base = pair
    merger = stirred(Merger.from_config(MergerConfig(adapters, base_model=base)))
    tokens = merger.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    merger.save_merged(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, plain)
    merger.save_pretrained(tmp_path / "masks")
    again = Merger.from_pretrained(tmp_path / "masks")
    assert torch.equal(again(input_ids=IDS).logits, merger(input_ids=IDS).logits)


def test_sixteen_bits_are_rounded_once(bases, tmp_path):
    "The export is the blend of float32 factors on the stored base, rounded once: within half a unit of the exact one, everywhere."
    base = bases("llama", False)
    half = save_tiny(load_model(base, "bfloat16"), tmp_path / "half")
    adapters = [save_adapter(tmp_path / name, str(half), seed, noise=0.05) for seed, name in enumerate("ab")]
    merger = stirred(Merger.from_config(MergerConfig(adapters, base_model=str(half), mode="vector_output")))
    leaf = merger.leaves()["model.layers.0.self_attn.q_proj"]
    held, alphas = leaf.weights["weight"], leaf.alphas("weight")
    exact = held.base(2).double() + sum(alpha.double() * held.delta(i).dense().double() for i, alpha in enumerate(alphas[:2]))
    made = merger.merged_state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert made.dtype == torch.bfloat16 and ((made.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def edit(source, folder, **values):
    (folder / source.name).write_text(json.dumps(json.loads(source.read_text()) | values))


def lost_base(folder):
    edit(folder / "adapter_config.json", folder, base_model_name_or_path="gone/away")
    return "base 'gone/away' is not on this machine"


def prompts(folder):
    edit(folder / "adapter_config.json", folder, peft_type="PROMPT_TUNING")
    return "type PROMPT_TUNING is no change of the base's weights"


def no_file(folder):
    (folder / "adapter_model.safetensors").unlink()
    return "the adapter has no adapter_model.safetensors"


def cut_off(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    return "truncated"


@pytest.mark.parametrize("spoil", [lost_base, prompts, no_file, cut_off], ids=lambda f: f.__name__)
def test_bad_adapter_is_refused_before_anything_is_loaded(pair, spoil):
    (adapter, other), _ = pair
    said = spoil(Path(other))
    report = preflight([adapter, other])
    assert not report.ok.all() and said in report.obstacle[0] and report.remedy[0]


def test_adapter_of_another_base_is_refused(pair, tmp_path):
    (adapter, other), _ = pair
    wide = save_tiny(tiny_model("llama", hidden_size=48, num_attention_heads=4), tmp_path / "wide")
    edit(Path(other) / "adapter_config.json", Path(other), base_model_name_or_path=str(wide))
    report = preflight([adapter, other])
    assert not report.ok[0] and "the adapter changes model.layers.0" in report.obstacle[0]


def test_base_is_found_above_the_adapter(pair, tmp_path, monkeypatch):
    "Training recorded a path relative to where it was started."
    (adapter, other), base = pair
    shutil.copytree(base, tmp_path / "models" / "base")
    for folder in (adapter, other):
        edit(Path(folder) / "adapter_config.json", Path(folder), base_model_name_or_path="models/base")
    monkeypatch.chdir("/")
    assert Path(find_base([adapter, other])) == tmp_path / "models" / "base" and preflight([adapter, other]).ok.all()


def test_estimate_is_what_is_measured(bases, tmp_path):
    "Components to the byte; the whole peak within 15 %."
    base = save_tiny(tiny_model("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=3, tie_word_embeddings=True), tmp_path / "base")
    paths = [*(save_adapter(tmp_path / name, base, seed) for seed, name in enumerate("ab")), str(base)]
    config = MergerConfig(paths[:2], base_model=paths[2])
    merger, objective = Merger.from_config(config), Objective({"kl": 1.0})
    ids = torch.randint(64, (2, 96))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, source=torch.arange(2))
    merger.train()
    optimizer = torch.optim.AdamW([p for p in merger.parameters() if p.requires_grad], foreach=False)
    training_step(merger, batch, objective, optimizer)
    with track_memory(merger) as used:
        training_step(merger, batch, objective, optimizer)
    asked = dict(n_components=3, seq_len=96, batch_size=2, dtype="float32", device="cpu", gradient_checkpointing=False)
    estimate = estimate_memory(str(base), paths=paths, constrain_mode="delta", base_model=paths[2], model_paths=paths[:2], **asked)
    assert estimate.parts["components"] == used.parts["components"]
    assert abs(estimate.peak_bytes / used.peak_bytes - 1) < 0.15
    assert used.parts["components"] < 1.15 * sum(p.nbytes for p in load_model(base).parameters())
    assert estimate_memory(str(base), **asked).parts["components"] > 2.5 * estimate.parts["components"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["{embedding}"], ["{embedding}", "lm_head"]], ids=" ".join)
def test_merged_adapter_is_the_adapter_where_base_and_head_are_one(bases, tmp_path, tied, targets):
    base = bases("llama", tied)
    folder = save_adapter(tmp_path / "adapter", base, target_modules=targets)
    expected = theirs(base, folder, IDS)
    _, report = merge_adapter(load_base(base, "cpu"), folder, tmp_path / "merged")
    assert report["max_logit_difference"] < 1e-4
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits.detach(), expected, rtol=1e-4, atol=1e-5)


def tuned_embedding(folder, base):
    "Embeddings that were trained and saved beside the factors."
    save_adapter(folder, base, save=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] += 1
    save_file(tensors, folder / "adapter_model.safetensors")


def saved_embedding(folder, base):
    save_adapter(folder, base, modules_to_save=["lm_head"])


def adapted_head(folder, base):
    save_adapter(folder, base, target_modules=["lm_head"])


def grown_vocabulary(folder, base):
    tuned_embedding(folder, base)
    tensors = load_file(folder / "adapter_model.safetensors")
    table = tensors["base_model.model.model.embed_tokens.weight"]
    tensors["base_model.model.model.embed_tokens.weight"] = torch.cat([table, table[:1]])
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("spoil", [tuned_embedding, saved_embedding, adapted_head, grown_vocabulary], ids=lambda f: f.__name__)
def test_lora_merge_refuses_what_would_change_the_base_for_all(bases, tmp_path, spoil):
    base = bases("llama", False)
    plain = save_adapter(tmp_path / "plain", base)
    spoil(tmp_path / "more", base)
    with pytest.raises(ValueError, match="(lm_head|embed_tokens)[a-z.]* of its own|modules_to_save"):
        read_adapters(load_base(base, "cpu"), [plain, tmp_path / "more"])


def test_lora_merge_takes_embeddings_that_are_the_bases(bases, tmp_path):
    "peft saves them where it is asked to, changed or not."
    base = bases("llama", False)
    adapters = [save_adapter(tmp_path / name, base, save=True) for name in "ab"]
    assert len(read_adapters(load_base(base, "cpu"), adapters)[1]) == 2


def test_changed_embeddings_belong_to_one_component(bases, tmp_path):
    base = bases("llama", False)
    plain = save_adapter(tmp_path / "plain", base, 1)
    tuned_embedding(tmp_path / "tuned", base)
    merger = stirred(Merger.from_config(MergerConfig([plain, str(tmp_path / "tuned")], base_model=base)))
    assert_close(merger.component_forward(0, input_ids=IDS).logits, theirs(base, plain, IDS), rtol=1e-4, atol=1e-5)
    assert_close(merger.component_forward(1, input_ids=IDS).logits, theirs(base, tmp_path / "tuned", IDS), rtol=1e-4, atol=1e-5)
    merger.save_merged(tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(IDS).logits, merger(input_ids=IDS).logits.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"non_linearity": "tanh"}, {"use_base_model": True, "non_linearity": "sigmoid"}], ids=str)
def test_dam_holds_adapters_as_factors(pair, tmp_path, options):
    from merge_lab.systems.dam import DAMConfig, DAMMerger, merge

    adapters, base = pair
    merger = merge(DAMConfig(base_model_id=base, model_ids=adapters, output_path=str(tmp_path / "dam"), **options))
    assert share_of(merger, base) < 1.3
    for i, adapter in enumerate(adapters):
        assert_close(merger.component_forward(i, input_ids=IDS).logits, theirs(base, adapter, IDS), rtol=1e-4, atol=1e-5)
    stirred(merger, 0.05).save_pretrained(tmp_path / "dam")
    again = DAMMerger.from_pretrained(tmp_path / "dam")
    assert torch.equal(again(input_ids=IDS).logits, merger(input_ids=IDS).logits)
    again.save_merged(tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(IDS).logits, merger(input_ids=IDS).logits.detach(), rtol=1e-4, atol=1e-5)


def test_mask_merge_of_adapters_end_to_end(tmp_path):
    "From two adapter folders to a checkpoint, and on from a stop to the same end."
    from merge_lab.run_folder import bundled_path
    from merge_lab.systems.mask_merge import MaskMergeConfig, run

    base, tasks = str(bundled_path("models/base")), ["rewrite", "summarize"]
    adapters = []
    for seed, task in enumerate(tasks):
        adapted = get_peft_model(load_model(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
        adapted.save_pretrained(tmp_path / task)
        adapters.append(str(tmp_path / task))
    config = MaskMergeConfig(
        model_paths=adapters, dataset_configs={str(bundled_path(f"tasks/{task}")): 24 for task in tasks}, max_steps=2, eval_samples=2,
        held_out_rows=2, per_device_train_batch_size=4, device="cpu", dtype="float32", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    result = run(config, progress=False)
    assert result.merger.has_base and share_of(result.merger, base) < 1.3
    assert "report.html" in result.written and (tmp_path / "run" / "merged" / "README.md").is_file()
    exported, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged"), torch.arange(12)[None]
    assert_close(exported(ids).logits, result.merger(input_ids=ids).logits.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", ["base", "adapter of a run"])
def test_masks_know_the_weights_of_adapters_and_of_their_base(bases, tmp_path, changed):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(bases("llama", False), base)
    paths = [str(run), save_adapter(tmp_path / "b", str(base), 2)]
    save_adapter(run / "adapter_checkpoint", str(base), 1)
    Merger.from_config(MergerConfig(paths)).save_pretrained(tmp_path / "masks")
    Merger.from_pretrained(tmp_path / "masks")
    file = base / "model.safetensors" if changed == "base" else run / "adapter_checkpoint" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its weights have changed"):
        Merger.from_pretrained(tmp_path / "masks")
