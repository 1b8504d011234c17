"Layer merging: what is trained is what is exported, for every kind of decoder."

import copy
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
import yaml

from merge_lab import calibration, depth, student
from merge_lab.chat import format_choice, load_mmlu
from merge_lab.evaluation import perplexity
from merge_lab.merger import checkpoint_activations
from merge_lab.run_folder import begin_run, bundled_path, read_history, RunInterrupted
from merge_lab.systems import layer_merge as lm
from merge_lab.tinylm import save_tiny, tiny_model, tiny_tokenizer
from merge_lab.toy_corpus import text_hash

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]
WINDOWED = ["mistral", "gemma2", "gemma3"]
PAIRS = [(1, 2, 0.8), (3, 4, 0.3)]


def token_ids(seed=0, shape=(2, 14)):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def batch_of(seed=0, shape=(2, 14)):
    ids = token_ids(seed, shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def mergeable_start():
    "Shares before any step."
    return lm.alpha_values(mergeable())


def short_sighted(architecture="llama", depth=6):
    "A tiny model; a window shorter than the tests' texts, so that layer types matter."
    seen = {"sliding_window": 4} if architecture in WINDOWED else {}
    return tiny_model(architecture, num_hidden_layers=depth, **seen)


def mergeable(architecture="llama", pairs=PAIRS, strategy="given", depth=6, **options):
    model = short_sighted(architecture, depth)
    return lm.replace_layers_with_mergeable(model, pairs, strategy, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("per_module", [False, True])
def test_trained_fused_saved_and_reloaded_are_one_model(
    architecture, per_module, tmp_path
):
    model = mergeable(architecture, per_module=per_module)
    lm.train_alpha_parameters(
        model,
        [batch_of()],
        num_steps=2,
        learning_rate=0.2,
        loss="kl",
        progress=False,
    )
    alphas = lm.alpha_values(model).values()
    assert all(abs(alpha - 0.5) > 0.02 for alpha in alphas)
    ids = token_ids(1)
    with torch.no_grad():
        trained = model(ids).logits
        fused = lm.fuse_mergeable_layers(model)
        torch.testing.assert_close(fused(ids).logits, trained, rtol=0, atol=1e-5)
    fused.save_pretrained(tmp_path)
    reloaded, info = type(fused).from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(fused) is type(tiny_model(architecture))
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, trained, rtol=0, atol=1e-5)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    cached, plain = (
        reloaded.generate(ids, use_cache=c, **options) for c in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("blend", ["weights", "outputs"])
def test_mergeable_model_generates_with_and_without_cache(architecture, blend):
    model = mergeable(architecture, blend=blend)
    ids = token_ids(2)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    cached, plain = (model.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)


def test_the_layer_types_matter_in_these_tests():
    "Otherwise a layer fused under the wrong type would go unseen."
    ids = token_ids()
    for architecture in WINDOWED:
        near = short_sighted(architecture)
        far = tiny_model(architecture, num_hidden_layers=6, sliding_window=4096)
        far.load_state_dict(near.state_dict())
        with torch.no_grad():
            assert (near(ids).logits - far(ids).logits).abs().max() > 1e-3


def test_config_and_indices_after_fusing():
    model = lm.fuse_mergeable_layers(
        mergeable("gemma2", [(0, 1, 0.6), (3, 4, 0.6)], depth=6)
    )
    original = tiny_model("gemma2", num_hidden_layers=6).config.layer_types
    assert model.config.num_hidden_layers == 4
    assert model.config.layer_types == [original[i] for i in (0, 2, 3, 5)]
    layers = lm.decoder_layers(model)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert not any("alpha" in name for name, _ in model.named_parameters())
    assert not hasattr(model, "merge_record")


def test_biases_and_norms_are_merged_too():
    original = tiny_model("qwen2", num_hidden_layers=4)
    layers = [copy.deepcopy(layer) for layer in lm.decoder_layers(original)]
    fused = lm.fuse_mergeable_layers(
        lm.replace_layers_with_mergeable(original, [(1, 2, 0.8)], "given")
    )
    own, other = (dict(layers[i].named_parameters()) for i in (1, 2))
    for name, merged in lm.decoder_layers(fused)[1].named_parameters():
        torch.testing.assert_close(merged, 0.8 * own[name] + 0.2 * other[name])
    assert "self_attn.q_proj.bias" in own and "input_layernorm.weight" in own


def test_names_follow_the_original_model():
    model = mergeable(pairs=[(1, 2, 0.6), (4, 5, 0.6)])
    names = list(lm.alpha_parameters(model))
    assert names == ["model.layers.1.alpha_logit", "model.layers.4.alpha_logit"]
    assert all(p.dtype == torch.float32 for p in lm.alpha_parameters(model).values())


def test_alpha_stays_fp32_and_moves_in_a_bf16_model():
    model = tiny_model("llama", num_hidden_layers=4, dtype=torch.bfloat16)
    lm.replace_layers_with_mergeable(model, [(1, 2, 0.622)])
    lm.train_alpha_parameters(
        model, [batch_of()], num_steps=1, learning_rate=1e-3, progress=False
    )
    (change,) = lm.alpha_table(model)["change"].abs()
    assert 1e-4 < change < 1e-3
    (logit,) = lm.alpha_parameters(model).values()
    assert logit.dtype == torch.float32
    assert next(lm.fuse_mergeable_layers(model).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("per_module", [False, True])
def test_gradient_equals_finite_differences(loss, per_module):
    model = tiny_model("gpt2", num_hidden_layers=4, dtype=torch.float64)
    lm.replace_layers_with_mergeable(
        model, [(1, 2, 0.8)], "given", per_module=per_module
    ).double()
    batch = batch_of(3)
    for logit in list(lm.alpha_parameters(model).values())[:3]:
        (gradient,) = torch.autograd.grad(lm.alpha_loss(model, batch, loss), logit)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                logit.add_(step)
                values.append(lm.alpha_loss(model, batch, loss).item())
        difference = (values[0] - values[1]) / 2e-5
        assert gradient.item() == pytest.approx(difference, rel=1e-5, abs=1e-10)
        with torch.no_grad():
            logit.add_(1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_losses_are_those_of_the_plain_model(architecture):
    original = short_sighted(architecture)
    model = lm.replace_layers_with_mergeable(copy.deepcopy(original), PAIRS, "given")
    batch = batch_of(4)
    batch["attention_mask"][0, 9:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    scored = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        teacher = original(**inputs).logits[:, :-1][scored].log_softmax(-1)
        student = model(**inputs).logits[:, :-1][scored].log_softmax(-1)
        targets = batch["labels"][:, 1:][scored]
        ce = torch.nn.functional.nll_loss(student, targets)
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        torch.testing.assert_close(lm.alpha_loss(model, batch, "ce"), ce)
        torch.testing.assert_close(lm.alpha_loss(model, batch, "kl"), kl)


def test_padding_is_never_scored():
    model = mergeable()
    short, long = batch_of(5, (1, 6)), batch_of(5, (1, 6))
    pad = torch.full((1, 4), 7)
    long["input_ids"] = torch.cat([long["input_ids"], pad], 1)
    long["labels"] = torch.cat([long["labels"], pad], 1)  # even if labels forget it
    long["attention_mask"] = torch.cat([long["attention_mask"], 0 * pad], 1)
    for loss in lm.ALPHA_LOSSES:
        one, other = (lm.alpha_loss(model, b, loss) for b in (short, long))
        torch.testing.assert_close(one, other)


def test_accumulation_equals_a_larger_batch():
    trained = []
    small = [batch_of(6, (1, 14)), batch_of(7, (1, 5))]
    wide = {k: torch.zeros(2, 14, dtype=torch.long) for k in small[0]}
    wide["labels"] -= 100
    for row, batch in enumerate(small):
        for key, value in batch.items():
            wide[key][row, : value.shape[1]] = value[0]
    for loader, count in ((small, 2), ([wide], 1)):
        model = mergeable()
        options = {"gradient_accumulation_steps": count, "progress": False}
        lm.train_alpha_parameters(model, loader, 3, 0.05, **options)
        losses = list(model.merge_record.history["loss"])
        trained.append((losses, list(lm.alpha_values(model).values())))
    assert trained[0][0] == pytest.approx(trained[1][0], abs=1e-5)
    assert trained[0][1] == pytest.approx(trained[1][1], abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activation_checkpointing_changes_nothing(architecture):
    results = []
    for checkpointing in (False, True):
        model = mergeable(architecture)
        if checkpointing:
            checkpoint_activations(model)
        lm.train_alpha_parameters(
            model, [batch_of()], num_steps=3, learning_rate=0.05, progress=False
        )
        assert not model.training
        results.append(list(lm.alpha_values(model).values()))
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    assert results[0] != pytest.approx([0.8, 0.3], abs=1e-3)


@pytest.mark.parametrize("max_grad_norm", [None, 0.0, 1.0])
def test_only_alphas_are_trained(max_grad_norm):
    model = mergeable().requires_grad_(True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    options = {"learning_rate": 0.1, "max_grad_norm": max_grad_norm, "progress": False}
    lm.train_alpha_parameters(model, [batch_of()], num_steps=2, **options)
    for name, parameter in model.named_parameters():
        is_alpha = name.endswith("alpha_logit")
        assert parameter.requires_grad == is_alpha
        assert torch.equal(parameter, before[name]) != is_alpha


def test_early_stop_and_a_stop_from_outside():
    model = mergeable()
    lm.train_alpha_parameters(
        model,
        [batch_of()],
        num_steps=50,
        learning_rate=1e-9,
        patience=3,
        progress=False,
    )
    assert len(model.merge_record.history) == 6
    lm.train_alpha_parameters(
        model,
        [batch_of()],
        num_steps=50,
        progress=False,
        on_step=lambda step, loss: step == 2,
    )
    assert list(model.merge_record.history["step"]) == [1, 2]


@pytest.mark.parametrize("blend", ["weights", "outputs"])
def test_the_original_is_still_inside(blend):
    original = short_sighted("gemma2")
    model = lm.replace_layers_with_mergeable(
        copy.deepcopy(original), PAIRS, "given", blend=blend
    )
    ids = token_ids(8)
    with torch.no_grad():
        wanted, merged = original(ids).logits, model(ids).logits
        with lm.as_original(model):
            assert torch.equal(model(ids, use_cache=False).logits, wanted)
        assert torch.equal(model(ids).logits, merged)
    assert not torch.allclose(merged, wanted, atol=1e-3)


def test_outputs_and_weights_are_two_functions():
    ids = token_ids(9)
    with torch.no_grad():
        weights, outputs = (mergeable(blend=b)(ids).logits for b in lm.BLENDS)
        one_layer = mergeable(
            pairs=[(1, 2, 1 - 1e-7)], blend="outputs"
        )  # almost the first layer alone
        removed = lm.remove_layers(tiny_model("llama", num_hidden_layers=6), [2])
        torch.testing.assert_close(
            one_layer(ids).logits, removed(ids).logits, atol=1e-4, rtol=0
        )
    assert (weights - outputs).abs().max() > 1e-3


@pytest.mark.parametrize("said_again", [False, True])
def test_learned_pairs_start_another_model_where_this_one_ended(said_again):
    model = mergeable(per_module=True)
    lm.train_alpha_parameters(
        model, [batch_of()], num_steps=2, learning_rate=0.3, progress=False
    )
    (stored,) = lm.extract_learned_alphas(model, [(3, 4)])
    assert stored[:2] == (3, 4) and "mlp.up_proj" in stored[2]
    again = mergeable(pairs=lm.extract_learned_alphas(model), per_module=said_again)
    (found,) = lm.extract_learned_alphas(again, [(3, 4)])
    assert found[2] == pytest.approx(stored[2], abs=1e-6)
    with torch.no_grad():
        ids = token_ids(10)
        torch.testing.assert_close(
            again(ids).logits, model(ids).logits, atol=1e-5, rtol=0
        )
    with pytest.raises(ValueError, match="the model has"):
        lm.extract_learned_alphas(model, [(0, 1)])


def test_pairs_that_cannot_be_merged():
    for pairs in ([(1, 6, 0.5)], [(1, 1, 0.5)], [(1, 2, 0.5), (2, 3, 0.5)], []):
        with pytest.raises(ValueError, match="pair"):
            mergeable(pairs=pairs)
    with pytest.raises(ValueError, match="has no alpha"):
        mergeable(pairs=[(1, 2)])
    model = tiny_model("llama", num_hidden_layers=4)
    lm.decoder_layers(model)[2].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(ValueError, match="mlp.up_proj"):
        lm.replace_layers_with_mergeable(model, [(1, 2, 0.5)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shares": {"mlp.up_proj": 0.4}}, "expected one for each of .*mlp.down_proj"),
        ({"blend": "outputs"}, "outputs have one share"),
    ],
)
def test_shares_that_a_pair_cannot_have_change_nothing(options, said):
    model = short_sighted()
    shares = dict.fromkeys(lm.leaf_pairs(*lm.decoder_layers(model)[:2]), 0.4)
    pairs = [(1, 2, 0.5), (3, 4, options.pop("shares", shares))]
    with pytest.raises(ValueError, match=said):
        lm.replace_layers_with_mergeable(model, pairs, "given", **options)
    layers = lm.decoder_layers(model)
    assert len(layers) == 6
    assert not any(isinstance(layer, lm.MergeableLayer) for layer in layers)


def mixture_of_experts():
    "Three dense layers, then three with experts: a layer's kind goes by its number."
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        v_head_dim=8,
        first_k_dense_replace=3,
        **heads,
        **experts,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_layer_that_would_load_as_another_kind_is_refused(tmp_path):
    model = mixture_of_experts()
    with pytest.raises(ValueError, match=r"layers \[1\], layer 3 becomes layer 2"):
        lm.replace_layers_with_mergeable(model, [(0, 1, 0.5)])
    with pytest.raises(ValueError, match="DeepseekV3Config makes of another kind"):
        lm.remove_layers(model, [0])
    assert len(lm.decoder_layers(model)) == 6 == model.config.num_hidden_layers
    fused = lm.replace_layers_with_mergeable(model, [(4, 5, 0.6)], "given")
    fused = lm.fuse_mergeable_layers(fused)
    fused.save_pretrained(tmp_path)
    ids = token_ids(13)
    with torch.no_grad():
        reloaded = type(fused).from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(reloaded, fused(ids).logits)


def test_best_disjoint_is_the_best():
    import itertools

    generator = torch.Generator().manual_seed(11)
    for n_scores in (3, 6, 8):
        scores = torch.rand(n_scores, generator=generator).tolist()
        for n_pairs in range(1, (n_scores + 1) // 2 + 1):
            sets = [
                c
                for c in itertools.combinations(range(n_scores), n_pairs)
                if all(b - a > 1 for a, b in itertools.pairwise(c))
            ]
            best = max(sets, key=lambda c: sum(scores[i] for i in c))
            assert depth.best_disjoint(scores, n_pairs) == list(best)


def test_calibration_never_asks_test_questions():
    tokenizer = lm.load_tokenizer(bundled_path("models/deep"))
    loader = lm.prepare_calibration_data(tokenizer, bundled_path("mmlu"), 40, 4)
    told = "".join(tokenizer.batch_decode([r["input_ids"] for r in loader.dataset]))
    tests = load_mmlu(bundled_path("mmlu"), "test")
    dev = {
        str(r)
        for rows in load_mmlu(bundled_path("mmlu"), "dev").values()
        for r in rows
    }
    for rows in tests.values():
        for row in rows:
            assert (
                str(row) in dev
                or calibration.choice_prompt("x", row, [], "letter", "") not in told
            )
    for batch in loader:
        hidden = batch["attention_mask"] == 0
        assert batch["labels"][hidden].eq(-100).all()


@pytest.mark.parametrize("max_length", [300, 150, 110, 40])
def test_a_long_prompt_loses_examples_and_keeps_its_question(max_length):
    tokenizer = lm.load_tokenizer(bundled_path("models/deep"))
    generator = torch.Generator().manual_seed(0)
    drawn = calibration.draw_questions(bundled_path("mmlu"), "dev", 12, generator)
    counts = []
    for subject, row, examples in drawn:
        encoded = calibration.encode_solved(tokenizer, subject, row, examples, max_length)
        text = tokenizer.decode(encoded["input_ids"], skip_special_tokens=True)
        assert len(encoded["input_ids"]) <= max_length
        assert encoded["input_ids"][-1] == tokenizer.eos_token_id
        asked = f"{format_choice(row)} {'ABCD'[row['answer']]}"
        if max_length == 40:  # too long by itself: the end of it
            prompt = calibration.choice_prompt(subject, row, [], "letter", calibration.INTRO)
            assert f"{prompt} {'ABCD'[row['answer']]}".endswith(text[1:])
            assert len(encoded["input_ids"]) == max_length
        else:
            assert text.startswith("The following") and text.endswith(asked)
        counts.append(text.count("Answer:") - 1)
        for example in examples[: counts[-1]]:
            assert format_choice(example, "letter") in text
    assert {300: 4, 150: 1, 110: 0, 40: 0}[max_length] in counts


def test_every_kind_of_chat_data_has_its_split(tmp_path):
    tokenizer = lm.load_tokenizer(bundled_path("models/deep"))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Number {i}?"},
                {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(20)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for split in ("train", "validation", "test", None):
        loader = lm.prepare_calibration_data(tokenizer, file, split=split)
        found[split] = {tuple(row["input_ids"]) for row in loader.dataset}
    assert [len(found[name]) for name in found] == [16, 2, 2, 16]
    assert found["train"] == found[None]
    assert not found["train"] & (found["validation"] | found["test"])
    with pytest.raises(ValueError, match="split='dev'"):
        lm.prepare_calibration_data(tokenizer, file, split="dev")
    folder = bundled_path("tasks/rewrite")
    with pytest.raises(ValueError, match="dev.jsonl: missing"):
        lm.prepare_calibration_data(tokenizer, folder, split="dev")


def test_run_writes_a_model_that_loads(tmp_path):
    tokenizer = tiny_tokenizer()
    save_tiny(tiny_model("qwen2", num_hidden_layers=6), tmp_path / "model", tokenizer)
    text = "\n\n".join(["The cat saw a small bird on the river road today ."] * 12)
    (tmp_path / "text.txt").write_text(text)
    config = lm.LayerMergeConfig(
        model_path=str(tmp_path / "model"),
        output_dir=str(tmp_path / "run"),
        data_dir=str(tmp_path / "text.txt"),
        eval_text=str(tmp_path / "text.txt"),
        merge_pairs=["1,2,0.7", "3,4"],
        num_steps=2,
        learning_rate=0.1,
        loss="kl",
        per_module=False,
        heal_steps=2,
        device="cpu",
    )
    result = lm.run(config, progress=False)
    assert list(result.alphas["into"]) == [1, 3]
    rule = depth.published_alpha(result.similarity, 3, 4)  # none given: from similarity
    assert rule != lm.PUBLISHED_ALPHA
    assert list(result.alphas["before"]) == pytest.approx([0.7, rule])
    assert result.search.empty and not (tmp_path / "run/search.csv").exists()
    scores = json.loads((tmp_path / "run/results.json").read_text())
    assert scores["this run"]["layers"] == 4 and scores["original"]["layers"] == 6
    reloaded = lm.load_model(tmp_path / "run/merged")
    with torch.no_grad():
        ids = token_ids(12)
        torch.testing.assert_close(
            reloaded(ids).logits, result.model(ids).logits, atol=1e-5, rtol=0
        )
    with pytest.raises(FileExistsError, match="already holds a run"):
        lm.run(config, progress=False)


@pytest.mark.parametrize("per_module", [False, True])
def test_a_searched_start_is_no_worse_than_what_it_tried(per_module):
    batches = [batch_of(seed) for seed in range(3)]
    model = mergeable(strategy="similarity", per_module=per_module)
    tried = lm.search_start(model, batches, n_batches=3)
    found = lm.mean_loss(model, batches)
    assert found == pytest.approx(tried["loss"].min(), abs=1e-6)
    for alpha in (0.5, lm.PUBLISHED_ALPHA, 0.98):
        fixed = mergeable(pairs=[(1, 2, alpha), (3, 4, alpha)])
        assert found <= lm.mean_loss(fixed, batches) + 1e-6
    chosen = [pair[2] for pair in model.merge_record.pairs]
    assert set(lm.alpha_table(model)["before"]) == set(chosen)
    shares = lm.alpha_table(model).groupby("into")["after"].mean()
    assert list(shares) == pytest.approx(chosen, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_searched_start_is_better_than_removal_on_the_bundled_model(seed):
    "The layers themselves are taken out: 0.98 is a stand-in, and no proof."
    model = lm.load_model(bundled_path("models/deep"), dtype="float32")
    tokenizer = lm.load_tokenizer(bundled_path("models/deep"))
    batches = list(
        lm.prepare_calibration_data(
            tokenizer, bundled_path("mmlu"), 8, 4, 128, seed=seed
        )
    )
    pairs = [(1, 2, None), (8, 9, None)]
    removed = lm.remove_layers(copy.deepcopy(model), [2, 9])
    kept = lm.remove_layers(copy.deepcopy(model), [1, 8])
    lm.replace_layers_with_mergeable(model, pairs)
    lm.search_start(model, batches)
    found = lm.mean_loss(model, batches)
    assert found < lm.mean_loss(removed, batches)
    assert found < lm.mean_loss(kept, batches)


def test_nothing_to_search_on_is_said():
    with pytest.raises(ValueError, match="the dataloader is empty"):
        lm.search_start(mergeable(), [])


def test_mean_loss_counts_every_token_once():
    model, wide = mergeable(), batch_of(20, (3, 14))
    rows = [{k: v[i : i + 1] for k, v in wide.items()} for i in range(3)]
    with torch.no_grad():
        together = lm.alpha_loss(model, wide).item()
    assert lm.mean_loss(model, rows) == pytest.approx(together, abs=1e-5)


def run_config(tmp_path, **options):
    "A short run on a tiny model, saved here."
    save_tiny(
        tiny_model("llama", num_hidden_layers=6), tmp_path / "model", tiny_tokenizer()
    )
    text = "\n\n".join(["The cat saw a small bird on the river road today ."] * 8)
    (tmp_path / "text.txt").write_text(text)
    given = {
        "model_path": str(tmp_path / "model"),
        "output_dir": str(tmp_path / "run"),
        "data_dir": str(tmp_path / "text.txt"),
        "num_steps": 3,
        "n_pairs": 2,
        "device": "cpu",
    }
    return lm.LayerMergeConfig(**given | options)


def test_a_run_draws_its_figures(tmp_path):
    options = {"eval_text": str(tmp_path / "text.txt"), "compare": True}
    result = lm.run(run_config(tmp_path, **options), progress=False)
    for name in ("similarity", "alphas", "scores", "loss"):
        picture = (tmp_path / f"run/plots/{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 2000
    assert list(result.table.index)[-1] == "this run" and len(result.table) == 2 + len(lm.UNTRAINED)
    _, data, text = (tmp_path / "run/merged/README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert yaml.safe_load(data)["library_name"] == "transformers" and "# model, 2 layers shorter" in text and str(tmp_path) not in text
    assert told["model_path"] == "model" and told["max_steps"] == 3 and not {"output_dir", "device", "resume", "eval_text"} & told.keys()
    assert set(result.alphas["before"]) <= set(lm.START_ALPHAS)
    tried = pd.read_csv(tmp_path / "run/search.csv")
    assert len(tried) == 3 * len(lm.START_ALPHAS)  # all together, then each of two
    best = tried.loc[tried.groupby("into")["loss"].idxmin()].set_index("into")["alpha"]
    for into, before in zip(result.alphas["into"], result.alphas["before"]):
        assert before == best[str(into)]


def test_healing_recomputes_activations_too(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, []
    monkeypatch.setattr(LlamaMLP, "forward", lambda *x: calls.append(1) or forward(*x))
    options = {"num_steps": 0, "search_start": False, "n_pairs": 1, "heal_steps": 1}
    counts = []
    for recompute in (False, True):
        calls.clear()
        folder = str(tmp_path / str(recompute))
        options |= {"gradient_checkpointing": recompute, "output_dir": folder}
        result = lm.run(run_config(tmp_path, **options), progress=False)
        counts.append(len(calls))
        layers = lm.decoder_layers(result.model)
        assert not any(layer.gradient_checkpointing for layer in layers)
    assert counts[1] - counts[0] == 5  # each layer once more, in the one step


@pytest.mark.parametrize(
    ("strategy", "start"), [("fixed_07", 0.7), ("uniform", 0.5), ("similarity", None)]
)
def test_a_start_that_is_asked_for_is_the_start(strategy, start, tmp_path, caplog):
    caplog.set_level("INFO", "merge_lab")
    options = {"alpha_init_strategy": strategy, "num_steps": 0, "n_pairs": 1}
    result = lm.run(run_config(tmp_path, **options), progress=False)
    before = set(result.alphas["before"])
    assert before == {start} if start else before <= set(lm.START_ALPHAS)
    assert result.search.empty == (start is not None)
    assert f"start, {'searched' if start is None else strategy}" in caplog.text
    assert "no data_dir" not in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_dir": "nowhere"}, "data_dir='nowhere': there is no such file"),
        ({"n_pairs": 4}, "n_pairs=4: expected 1 to 3"),
        ({"merge_pairs": ["1,9"]}, "pair (1, 9): expected layers 0 to 5"),
        ({"merge_pairs": ["1,2", "2,3"]}, "a layer can be in one pair only"),
        ({"eval_text": "nowhere.txt"}, "eval_text='nowhere.txt': there is no such"),
        ({"mmlu_dir": "nowhere"}, "nowhere"),
        ({"merge_pairs": ["1,2"], "alpha_init_strategy": "given"}, "has no alpha"),
        ({"merge_pairs": ["1,2,1.3"]}, "alpha=1.3"),
        ({"per_module": True, "blend": "outputs"}, "outputs have one share"),
        ({"report_to": "nowhere"}, "report_to='nowhere'"),
    ],
)
def test_what_is_wrong_is_said_before_a_run_begins(options, said, tmp_path):
    kept = begin_run(run_config(tmp_path)) / "config.yaml"
    before = kept.read_text()
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        lm.run(run_config(tmp_path, overwrite=True, **options), progress=False)
    assert kept.read_text() == before
    options["output_dir"] = str(tmp_path / "new/run")
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        lm.run(run_config(tmp_path, **options), progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options, files", [({"strategy": "pairs"}, ["history"]), ({"strategy": "block", "hidden_steps": 2, "block_steps": 3, "block_tries": 1, "heal_steps": 2}, ["hidden", "history", "healing"])])
def test_tensorboard_gets_the_loss_of_every_stage(options, files, tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    lm.run(run_config(tmp_path, report_to="tensorboard", logging_steps=1, compare=True, **options), progress=False)
    events = sorted((tmp_path / "run").rglob("events.out.tfevents.*"))
    told = [[scalar.value for scalar in event_accumulator.EventAccumulator(str(file)).Reload().Scalars("train/loss")] for file in events]
    wanted = [read_history(tmp_path / f"run/{file}.jsonl").loss.tolist() for file in files]
    assert sorted(map(len, told)) == sorted(map(len, wanted))  # a file for each stage, and none for what is only compared
    for losses in wanted:
        assert any(len(losses) == len(own) and own == pytest.approx(losses, abs=1e-3) for own in told), (losses, told)


def test_a_run_never_clears_what_it_reads(tmp_path):
    folder = begin_run(run_config(tmp_path))
    config = run_config(tmp_path, overwrite=True, model_path=str(folder / "merged"))
    (folder / "merged").mkdir()
    with pytest.raises(ValueError, match="overwrite would clear .* which holds"):
        lm.run(config, progress=False)
    assert (folder / "merged").exists()


def test_bundled_model_is_deep_small_and_has_learned():
    folder = bundled_path("models/deep")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 2 * 2**20
    model, tokenizer = lm.load_model(folder), lm.load_tokenizer(folder)
    assert len(lm.decoder_layers(model)) >= 12
    text = "The value of the expression is the object that the name is bound to."
    assert perplexity(model, tokenizer, text) < len(tokenizer) / 10


def benchmark():
    "The module benchmarks/layer_merge.py."
    path = Path(__file__).resolve().parent.parent / "benchmarks/layer_merge.py"
    spec = importlib.util.spec_from_file_location("benchmark_layer_merge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bundled_model_was_measured_on_the_text_that_was_held_out():
    "By the hashes in the recipe: another Python has another documentation, the model does not."
    recipe = benchmark().TRAINED_ON
    measured = json.loads((bundled_path("benchmarks") / "layer_merge.json").read_text())
    assert measured["text"] == {k: recipe[k] for k in ("train", "validation", "test")}
    assert measured["paragraphs"]["test"] == 40


def test_no_test_question_is_in_the_questions_that_the_model_read():
    module = benchmark()
    sets = list(module.question_sets(1460, 1))
    assert text_hash(sets) == module.TRAINED_ON["questions"]
    asked = {
        q for text in sets for q in re.findall(r"^(.+)\nA\. ", text, flags=re.MULTILINE)
    }
    assert len(asked) > 20
    tests = load_mmlu(bundled_path("mmlu"), "test")
    read = "\n\n".join(sets)
    for row in [row for rows in tests.values() for row in rows]:
        assert format_choice(row) not in read


def test_the_recipe_refuses_text_that_it_does_not_know(monkeypatch):
    module = benchmark()
    words = [" ".join(f"{kind}{i}" for kind in "abcdefghijklmn") for i in range(400)]
    monkeypatch.setattr(module, "text_corpus", lambda kind, n: [*words, *words[:40]])
    prose, _ = module.training_text()
    split = calibration.split_text(module.text_corpus("prose", None))
    assert len(prose) > 300 and not {*prose} & {*split["test"], *split["validation"]}
    with pytest.raises(ValueError, match="another documentation"):
        module.held_out_text(bundled_path("models/deep"))
    assert module.held_out_text(Path("elsewhere"))["test"] == split["test"]
    monkeypatch.setattr(
        module, "split_text", lambda _: dict(train=words, validation=[], test=words[:1])
    )
    with pytest.raises(ValueError, match="held-out paragraph"):
        module.training_text()


def test_split_leaves_out_what_is_repeated():
    line = "one two three four five six seven eight nine ten eleven twelve"
    rest = [f"paragraph number {i} is here" for i in range(97)]
    paragraphs = [line.upper() + "!", *rest[:87], *rest[87:], line, f"more {line} more"]
    split = calibration.split_text(paragraphs, n_test=11, train_share=0.89)
    assert line.upper() + "!" not in split["train"]
    assert [len(part) for part in split.values()] == [88, 0, 11]
    assert calibration.apart_from(["a b c", "A, B; c d"], ["x A b C"], 3) == []
    assert calibration.apart_from(["a b c"], ["x A b C"], 12) == ["a b c"]


def test_every_option_has_a_control_and_three_faces(tmp_path):
    from merge_lab.cli import parse
    from merge_lab.config import config_from_yaml, config_to_yaml
    from merge_lab.widgets import ConfigPanel, controls_of

    names = [field.name for field in dataclasses.fields(lm.LayerMergeConfig)]
    assert list(controls_of(lm.LayerMergeConfig)) == names
    panel = ConfigPanel(lm.LayerMergeConfig, command="merge-lab layer-merge")
    panel.set("learning_rate", 0.01)
    panel.set("merge_pairs", ["3,4", "6,7,0.7"])
    assert not panel.errors
    words = panel.faces()["Command line"].split()[2:]
    assert parse("layer-merge", words) == panel.config
    (tmp_path / "config.yaml").write_text(config_to_yaml(panel.config))
    read = config_from_yaml(lm.LayerMergeConfig, tmp_path / "config.yaml")
    assert read == panel.config
    panel.set("n_pairs", 1000)
    assert "n_pairs" in panel.errors


def test_the_guides_hyperparameters_are_the_defaults():
    config = lm.LayerMergeConfig()
    assert (config.num_steps, config.learning_rate) == (5000, 1e-3)
    assert (config.batch_size, config.gradient_accumulation_steps) == (4, 1)
    assert config.num_samples == 100


def test_the_command_line_says_what_is_wrong(capsys, tmp_path, monkeypatch):
    from merge_lab.cli import main

    monkeypatch.chdir(tmp_path)
    cases = {
        "--merge_pairs 5,12": "pair (5, 12): expected layers 0 to 11",
        "--merge_pairs 3,4 4,5": "a layer can be in one pair only",
        "--strategy pairs --n_pairs 7": "n_pairs=7: expected 1 to 6",
        "--n_pairs 12": "n_pairs=12: expected 1 to 11 layers to take away, of 12",
        "--data_dir nowhere": "data_dir='nowhere': there is no such file",
        "--merge_pairs 3-4": "'3-4' is not a pair",
        "--pair_strategy best": "invalid choice: 'best'",
    }
    for words, said in cases.items():
        assert main(["layer-merge", *words.split()]) == 2
        shown = capsys.readouterr().err.strip()
        assert not (tmp_path / "runs").exists()
        assert said in shown and "\n" not in shown and "Traceback" not in shown


KILLED_RUNS = '''
import logging, os, random, signal, sys, time
from pathlib import Path

import torch

from merge_lab.systems import layer_merge as lm

torch.set_num_threads(1)


def start(folder, resume):
    "A run in a process of its own."
    child = os.fork()
    if child:
        return child
    options = dict(output_dir=str(folder), resume=resume, **eval(sys.argv[1]))
    lm.run(lm.LayerMergeConfig(**options), progress=False)
    os._exit(0)


def lines(file):
    return file.read_bytes().count(b"\\n") if file.exists() else 0


def kill_after(child, file, step):
    "Kill it, no sooner than with so many steps written."
    while lines(file) < step:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


assert os.waitpid(start("whole", False), 0)[1] == 0
cut = Path("cut")
for number, (file, first, last) in enumerate(eval(sys.argv[2])):
    step = random.randint(first, last)
    print(f"killed after step {step} of {file}", flush=True)
    kill_after(start(cut, number > 0), cut / file, step)
assert os.waitpid(start(cut, True), 0)[1] == 0
'''


def same_run(one: Path, other: Path):
    "All that a run writes, but for what the clock and the machine say."
    timed = {"tokens_per_second", "memory_bytes"}
    for name in ("history.jsonl", "healing.jsonl"):
        rows = [
            [
                {k: v for k, v in json.loads(line).items() if k not in timed}
                for line in (folder / name).read_text().splitlines()
            ]
            for folder in (one, other)
        ]
        assert rows[0] == rows[1]
    files = ("alphas.csv", "search.csv", "held_out.json", "merged/model.safetensors")
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


FOUR_KILLS = [("history.jsonl", 1, 6), ("history.jsonl", 4, 14), ("history.jsonl", 12, 22), ("healing.jsonl", 2, 7)]  # file, first step, last
TEN_KILLS = [*(("history.jsonl", 3 * k + 1, 3 * k + 4) for k in range(7)), *(("healing.jsonl", 2 * k + 1, 2 * k + 3) for k in range(3))]


@pytest.mark.parametrize("kills", [FOUR_KILLS, pytest.param(TEN_KILLS, marks=pytest.mark.slow)], ids=["4", "10"])
def test_a_run_that_is_killed_again_and_again_ends_the_same(tmp_path, kills, forked):
    "kill -9 while it learns, again while it learns further, and while it heals."
    options = dataclasses.asdict(run_config(tmp_path))
    options |= dict(max_steps=24, save_steps=3, eval_steps=4, learning_rate=0.05)
    options |= dict(per_device_train_batch_size=2, loss_func_name="kl", heal_steps=9, patience=None)
    for name in ("output_dir", "resume"):
        options.pop(name)
    words = [sys.executable, "-c", KILLED_RUNS, repr(options), repr(kills)]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    same_run(tmp_path / "whole", tmp_path / "cut")


class Killed(BaseException):
    "What a run dies of in the middle of a step."


def test_a_run_that_ran_out_of_patience_does_so_again(tmp_path):
    options = dict(num_steps=40, learning_rate=1e-6, patience=6, eval_steps=2)
    options |= dict(save_steps=1, batch_size=2)
    whole = lm.run(run_config(tmp_path, **options), progress=False)
    steps = len(whole.history)
    assert steps == 6 and whole.history["held_out_loss"].notna().sum() == 4
    options |= dict(output_dir=str(tmp_path / "cut"))

    def die(step, loss):
        if step == steps - 1:
            raise Killed

    with pytest.raises(Killed):
        lm.run(run_config(tmp_path, **options), on_step=die, progress=False)
    config = run_config(tmp_path, resume=True, **options)
    again = lm.run(config, progress=False)
    assert list(again.history["loss"]) == list(whole.history["loss"])
    merged = [f / "merged/model.safetensors" for f in (whole.folder, again.folder)]
    assert merged[0].read_bytes() == merged[1].read_bytes()
    with pytest.raises(ValueError, match="resume: learning_rate=0.5"):
        lm.run(dataclasses.replace(config, learning_rate=0.5), progress=False)


def test_a_run_that_goes_on_for_longer_ends_as_one_that_was_asked_for_all(tmp_path):
    "Also what was healed is healed anew, from the shares that there are in the end; fewer steps than were made are refused."
    options = dict(learning_rate=0.05, eval_steps=2, save_steps=1, batch_size=2, heal_steps=3, patience=2)
    whole = lm.run(run_config(tmp_path, num_steps=6, **options | {"patience": None}), progress=False)
    options |= dict(output_dir=str(tmp_path / "cut"))
    lm.run(run_config(tmp_path, num_steps=2, **options), progress=False)
    before = (tmp_path / "cut/config.yaml").read_text()
    for fewer in (0, 1):
        with pytest.raises(ValueError, match=f"max_steps={fewer}: the run in .* has made 2 steps"):
            lm.run(run_config(tmp_path, num_steps=fewer, resume=True, **options), progress=False)
    assert (tmp_path / "cut/config.yaml").read_text() == before
    again = lm.run(run_config(tmp_path, num_steps=6, resume=True, **options | {"patience": None}), progress=False)
    same_run(whole.folder, again.folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_learns_shares_that_it_writes(tmp_path, dtype):
    options = dict(num_steps=4, learning_rate=0.1, batch_size=2, dtype=dtype, heal_steps=1)
    result = lm.run(run_config(tmp_path, **options), progress=False)
    assert result.history["loss"].notna().all() and result.alphas["change"].abs().max() > 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(result.folder / "merged")
    assert merged.dtype == getattr(torch, dtype) and all(p.isfinite().all() for p in merged.parameters())


def test_no_run_ends_worse_on_held_out_rows_than_it_began(tmp_path):
    "Even with a rate that throws the shares about."
    options = dict(num_steps=6, learning_rate=1.0, eval_steps=1, batch_size=2)
    options |= dict(data_dir=str(bundled_path("tasks/rewrite")), max_length=48)
    folder = bundled_path("models/deep")
    config = run_config(tmp_path, model_path=str(folder), num_samples=8, **options)
    result = lm.run(config, progress=False)
    found = json.loads((result.folder / "held_out.json").read_text())
    tokenizer = lm.load_tokenizer(folder)
    held = lm.read_data(config, tokenizer)[1]
    starts = lm.start_from, result.search
    model = lm.load_model(folder, dtype=config.dtype)
    pairs = [(into, removed, 0.5) for into, removed in unique_pairs(result.alphas)]
    lm.replace_layers_with_mergeable(model, pairs, per_module=True)
    starts[0](model, starts[1])
    assert lm.mean_loss(model, held.batches) == pytest.approx(found["start"], abs=1e-4)
    lm.only_alphas(model)
    for name, logit in lm.alpha_parameters(model).items():
        learned = result.alphas.set_index("layer")["after"]
        share = learned[name.removesuffix(".alpha_logit")]
        logit.data.copy_(lm.logit_of(share))
    assert lm.mean_loss(model, held.batches) == pytest.approx(found["loss"], abs=1e-4)
    assert found["loss"] <= found["start"]


def unique_pairs(alphas: pd.DataFrame) -> list[tuple[int, int]]:
    return list(dict.fromkeys(zip(alphas["into"], alphas["removed"])))


def test_a_stop_by_signal_loses_nothing(tmp_path):
    options = dict(num_steps=8, save_steps=0, batch_size=2, eval_steps=2)
    whole = lm.run(run_config(tmp_path, **options), progress=False)
    options |= dict(output_dir=str(tmp_path / "cut"))

    def ask(step, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted, match="after step 3 of 8.*--resume"):
        lm.run(run_config(tmp_path, **options), on_step=ask, progress=False)
    again = lm.run(run_config(tmp_path, resume=True, **options), progress=False)
    pd.testing.assert_frame_equal(again.alphas, whole.alphas, check_exact=True)


def test_a_loss_that_is_no_number_stops_training_and_says_so():
    model, seen = mergeable(), []

    def spoil(step, loss):
        seen.append(lm.alpha_values(model))
        lm.decoder_layers(model)[0].mlp.up_proj.weight.data[0, 0] = float("inf")

    options = {"num_steps": 3, "progress": False, "on_step": spoil}
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        lm.train_alpha_parameters(model, [batch_of()], learning_rate=0.1, **options)
    assert len(seen) == 1 and lm.alpha_values(model) == mergeable_start()


@pytest.mark.parametrize("held_out", [None, [0]])
def test_a_model_is_given_back_as_it_was(held_out):
    "Head, ties and modes; the config is left alone, and only the alphas have moved."
    model = tiny_model("llama", num_hidden_layers=6, tie_word_embeddings=True).train()
    model = lm.replace_layers_with_mergeable(model, PAIRS, "given")
    head, config, said = model.get_output_embeddings(), model.config.to_dict(), []
    held_out = held_out and [batch_of(seed) for seed in held_out]
    lm.train_alpha_parameters(
        model, [batch_of()], num_steps=2, progress=False, held_out=held_out,
        on_step=lambda step, loss: said.append(model.config.to_dict()),
    )  # fmt: skip
    assert said == [config] * 2 and model.config.to_dict() == config
    assert model.get_output_embeddings() is head and model.training
    assert head.weight is model.get_input_embeddings().weight
    assert len(model.merge_record.history) == 2
    assert ("held_out_loss" in model.merge_record.history) == bool(held_out)


@pytest.mark.parametrize("data", ["mmlu", "tasks/rewrite", "text"])
def test_what_is_held_out_is_not_learned_from(data, tmp_path):
    tokenizer = lm.load_tokenizer(bundled_path("models/deep"))
    if data == "text":
        place = tmp_path / "text.txt"
        place.write_text("\n\n".join(f"This is paragraph {i % 60}." for i in range(80)))
    else:
        place = bundled_path(data)
    rows, held = calibration.calibration_split(tokenizer, place, 50, 16)
    seen = {tuple(row["input_ids"]) for row in rows}
    assert len(rows) == 50 and 4 <= len(held) <= 16
    assert not seen & {tuple(row["input_ids"]) for row in held}
    plain = lm.prepare_calibration_data(tokenizer, place, 50).dataset
    assert data == "mmlu" or {tuple(row["input_ids"]) for row in plain} == seen
    if data == "mmlu":
        for row in held:
            scored = [label for label in row["labels"] if label != -100]
            question = tokenizer.decode(scored, skip_special_tokens=True)
            question = question.split("\nAnswer")[0].strip()
            assert question and not any(
                question in tokenizer.decode(row["input_ids"]) for row in rows
            )


def test_too_few_rows_are_lent(tmp_path, caplog):
    tokenizer = lm.load_tokenizer(bundled_path("models/deep"))
    (tmp_path / "text.txt").write_text("One.\n\nTwo.\n\nThree.")
    rows, held = calibration.calibration_split(tokenizer, tmp_path / "text.txt")
    assert held == rows and "3 samples are too few to hold any out" in caplog.text


def test_healing_learns_from_the_teachers_own_head():
    "A teacher is another model, and its head need not be the patient's."
    short, teacher = (tiny_model("llama", num_hidden_layers=n) for n in (2, 3))
    head, known = (m.get_output_embeddings().weight for m in (short, teacher))
    assert not torch.equal(head, known)
    batch = batch_of()

    @torch.no_grad()
    def apart(model):
        logits = (m(batch["input_ids"]).logits for m in (model, teacher))
        student, wanted = (z.log_softmax(-1) for z in logits)
        return (wanted.exp() * (wanted - student)).sum(-1).mean().item()

    before = apart(short)
    healed = lm.heal(short, [batch], 20, 1e-2, teacher=teacher, progress=False)
    assert apart(healed) < 0.5 * before
    assert healed.get_output_embeddings().weight is head


def test_slow_and_steady_is_no_end():
    "A fall of a ten-thousandth of the loss in a hundred steps goes on; one that has become a fiftieth of itself ends."
    steady = [dict(step=step, loss=3 - 3e-6 * step) for step in range(0, 4001, 50)]
    assert not any(
        student.has_levelled(steady[:n], 250) for n in range(1, len(steady) + 1)
    )
    level = [dict(step=4000 + k, loss=steady[-1]["loss"]) for k in range(50, 301, 50)]
    ends = [student.has_levelled(steady + level[:n], 250) for n in range(1, 7)]
    assert ends == [False] * 3 + [True] * 3
    assert not student.has_levelled(steady + level, None)
    assert student.has_levelled([dict(step=step, loss=2.0) for step in (0, 250)], 250)
