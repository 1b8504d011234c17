"DAM across modules: what comes from where, teachers from disk, the run, and the published command lines."

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from small_runs import sealed_checkpoint, SignalAt, stopping_at

from merge_lab import merger as merger_module
from merge_lab import objective, teacher_dataset
from merge_lab.chat import build_dataset, chat_row, ChatCollator, load_task, write_jsonl
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import main, parse
from merge_lab.commands import COMMANDS
from merge_lab.config import config_from_yaml, recipe_options, resumable_options
from merge_lab.evaluation import evaluate_tasks
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import alone_in, begin_run, bundled_path, is_run, last_checkpoint, read_history, RunInterrupted
from merge_lab.systems import dam
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model, tiny_tokenizer
from merge_lab.token_losses import shift_labels

torch.set_num_threads(1)
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "saw", "it"]
TOKENIZER = tiny_tokenizer()
INPUTS = TOKENIZER(["the cat sat on the mat"], return_tensors="pt")


def make_models(folder, architecture, n=2, twins=False, **options):
    "A base and n experts, or n copies of the base, on disk."
    experts = (
        [tiny_model(architecture, **options) for _ in range(n)]
        if twins
        else tiny_experts(architecture, n=n, **options)
    )
    names = ["base", *(f"expert{i}" for i in range(n))]
    for name, model in zip(names, [tiny_model(architecture, **options), *experts]):
        save_tiny(model, folder / name, TOKENIZER)
    return [str(folder / name) for name in names]


def make_data(folder, n=2, rows=8):
    paths = []
    for source in range(n):
        path = folder / f"data{source}.jsonl"
        start = [i % 6 for i in range(rows)]
        turns = [(WORDS[i : i + 3], WORDS[i + source : i + source + 4]) for i in start]
        write_jsonl(path, [chat_row(" ".join(a), " ".join(b)) for a, b in turns])
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Base, two experts, their data, an untrained model and a dataset with teachers."
    folder = tmp_path_factory.mktemp("dam")
    base, *experts = make_models(folder / "models", "llama")
    free = dam.DAMConfig(
        base, experts, str(folder / "untrained"), non_linearity="None"
    )
    dam.merge(free)  # every coefficient matters, whatever the models share
    topk = dam.DAMTopkConfig(
        k=8,
        dataset_names=make_data(folder),
        model_ids=experts,
        base_model_name=base,
        hf_disk_dataset_dir=str(folder / "dataset"),
        device="cpu",
        batch_size=3,
        part_size=5,
    )
    dataset = dam.create_dataset_topk_logits(topk)
    return dict(folder=folder, base=base, experts=experts, topk=topk, dataset=dataset)


def train_config(lab, output, **options):
    defaults = dict(
        untrained_merged_model_name=str(lab["folder"] / "untrained"),
        hf_disk_dataset_dir=str(lab["folder"] / "dataset"),
        output_dir=str(output),
        generate_logits_on_fly=False,
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=0,
        held_out_rows=0,  # what the last step gave is looked at
        warmup_steps=0,
        lr_scheduler_type="linear",
        device="cpu",
    )
    return dam.DAMTrainConfig(**{**defaults, **options})


@pytest.mark.parametrize("use_base_model", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "architecture, tied",
    [
        ("llama", False),
        ("llama", True),
        ("qwen2", False),
        ("gemma2", True),
        ("gpt2", True),
    ],
)
def test_export_is_what_the_merger_computes(
    tmp_path, architecture, tied, everything, use_base_model
):
    base, *experts = make_models(tmp_path, architecture, tie_word_embeddings=tied)
    config = dam.DAMConfig(
        base,
        experts,
        str(tmp_path / "out"),
        use_base_model=use_base_model,
        use_embedding_layers=everything,
        merge_layernorms=everything,
        random_init=["linear", "embedding", "norm"] if everything else ["linear"],
    )
    merger = dam.merge(config)
    again = dam.DAMMerger.from_pretrained(tmp_path / "out")
    again.save_merged(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    assert plain.config.tie_word_embeddings is tied
    assert_close(plain(**INPUTS).logits, merger(**INPUTS).logits, atol=1e-5, rtol=1e-5)
    own = dict(tiny_model(architecture, tie_word_embeddings=tied).named_parameters())
    masked = {name for name, _, _ in merger.masked_parameters()}
    merged = merger.merged_state_dict()
    assert masked <= set(merged)
    for name, tensor in merged.items():
        if name in own:
            assert torch.equal(tensor, own[name]) == (name not in masked), name
    if everything:
        assert masked == set(merged) & set(own)


def make_twins(folder, architecture, tied, use_base_model, **options):
    "An untrained merge of copies of one model, data for each, and that model."
    base, *twins = make_models(
        folder, architecture, twins=True, tie_word_embeddings=tied
    )
    config = dam.DAMConfig(
        base,
        twins,
        str(folder / "untrained"),
        use_base_model=use_base_model,
        use_embedding_layers=True,
        merge_layernorms=True,
        **{"non_linearity": "None", **options},
    )
    merger = dam.merge(config)
    topk = dam.DAMTopkConfig(
        k=8,
        dataset_names=make_data(folder),
        model_ids=twins,
        base_model_name=base,
        hf_disk_dataset_dir=str(folder / "dataset"),
        device="cpu",
        compute_logits=False,
    )
    dam.create_dataset_topk_logits(topk)
    return merger, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def moved(merger, start):
    "How far the masks are from where they started, at most."
    masks = merger.mask_state()
    return max((masks[name] - mask).abs().max().item() for name, mask in start.items())


TWINS = pytest.mark.parametrize(
    "architecture, tied, use_base_model",
    [("qwen2", False, False), ("llama", True, True)],
)


@TWINS
def test_identical_components_give_themselves_back(
    tmp_path, architecture, tied, use_base_model, caplog
):
    kinds = ["linear", "embedding", "norm"]
    merger, wanted = make_twins(
        tmp_path, architecture, tied, use_base_model, random_init=kinds
    )
    if architecture == "qwen2":
        bias = wanted.model.layers[0].self_attn.q_proj.bias
        assert bias is not None and bias.abs().min() > 0
    assert_close(merger(**INPUTS).logits, wanted(**INPUTS).logits, atol=1e-5, rtol=1e-5)
    lab, start = {"folder": tmp_path}, merger.mask_state()
    options = dict(generate_logits_on_fly=True, max_steps=3, learning_rate=0.02)
    run = dam.train(train_config(lab, tmp_path / "trained", **options))
    assert moved(run.merger, start) == 0
    assert "below noise_floor=1e-05 in 3 of 3 steps" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "trained" / "merged", dtype=torch.float32
    )
    for name, tensor in plain.state_dict().items():
        assert_close(tensor, wanted.state_dict()[name], atol=1e-6, rtol=1e-6)
    card = (tmp_path / "trained" / "merged" / "README.md").read_text(encoding="utf-8")
    assert "learning_rate: 0.02" in card and str(tmp_path) not in card
    # it is the gate that held them: the gradient is rounding noise, but it is there
    options |= dict(noise_floor=0.0, export=False)
    caplog.clear()
    ungated = dam.train(train_config(lab, tmp_path / "ungated", **options))
    assert moved(ungated.merger, start) > 0.01 and "noise_floor" not in caplog.text


@TWINS
def test_identical_components_pull_coefficients_back(
    tmp_path, architecture, tied, use_base_model
):
    """From coefficients a fifth off, the gradient is real, and it leads back to the component.

    Only its function is determined (a scaled query and a key scaled the other way cancel): after 60 steps
    the KL divergence on the data is under a fiftieth of what it was, and the error of the logits of another
    prompt under six tenths.
    """
    merger, wanted = make_twins(
        tmp_path, architecture, tied, use_base_model, non_linearity="tanh"
    )
    generator = torch.Generator().manual_seed(0)
    for mask in merger.parameters():
        if mask.requires_grad:
            mask.data *= 1 + 0.2 * torch.randn(mask.shape, generator=generator)
    merger.save_pretrained(tmp_path / "untrained")
    config = train_config(
        {"folder": tmp_path},
        tmp_path / "trained",
        generate_logits_on_fly=True,
        noise_floor=0.0,
        max_steps=60,
        learning_rate=0.02,
        per_device_train_batch_size=16,
    )
    run = dam.train(config)
    assert run.history.kl.iloc[0] > 5e-3
    assert run.history.kl.iloc[-1] < run.history.kl.iloc[0] / 50
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "trained" / "merged", dtype=torch.float32
    )
    logits = wanted(**INPUTS).logits
    before, after = (
        (model(**INPUTS).logits - logits).norm() for model in (merger, plain)
    )
    assert after < 0.6 * before


@pytest.mark.parametrize(
    "kind, switch",
    [("embedding", "use_embedding_layers"), ("norm", "merge_layernorms")],
)
def test_random_init_of_what_is_not_blended_is_refused(kind, switch):
    with pytest.raises(ValueError, match=f"no {kind} is blended. Set {switch}"):
        dam.DAMConfig(random_init=["linear", kind])
    dam.DAMConfig(random_init=[kind], **{switch: True})


def test_random_init_is_a_share_of_the_named_kinds(lab, tmp_path):
    config = dam.DAMConfig(
        lab["base"],
        lab["experts"],
        str(tmp_path / "out"),
        use_base_model=True,
        merge_layernorms=True,
        non_linearity="sigmoid",
        random_init=["norm"],
        seed=3,
    )
    merger = dam.merge(config)
    for name, leaf, key in merger.masked_parameters():
        alphas = torch.stack(leaf.alphas(key))
        assert_close(alphas.sum(0), torch.ones_like(alphas[0]))
        assert (alphas.std() > 0.1) == ("norm" in name), name


def test_saving_changes_no_config(lab, tmp_path, monkeypatch):
    "What is written has the base among its paths, and the merger has not, not for a moment."
    seen, save = [], merger_module.save_tensors
    made = dam.DAMConfig(lab["base"], lab["experts"], str(tmp_path / "untrained"))
    merger = dam.merge(made)
    before = dataclasses.asdict(merger.merger_config)

    def write(*args):
        seen.append(dataclasses.asdict(merger.merger_config))
        save(*args)

    monkeypatch.setattr(merger_module, "save_tensors", write)
    merger.save_pretrained(tmp_path / "again")
    written = [json.loads((tmp_path / name / "merger_config.json").read_text()) for name in ("untrained", "again")]
    assert seen == [before] and dataclasses.asdict(merger.merger_config) == before
    assert all(each["model_paths"] == [*lab["experts"], lab["base"]] for each in written)


def test_hub_is_only_used_when_asked(lab, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id))

        def upload_folder(self, repo_id, folder_path):
            files = sorted(path.name for path in Path(folder_path).iterdir())
            calls.append(("upload", repo_id, files))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    config = dam.DAMConfig(lab["base"], lab["experts"], str(tmp_path / "a"))
    dam.merge(config)
    assert calls == []
    dam.merge(
        dataclasses.replace(config, output_dir=str(tmp_path / "b"), repo_id="me/it")
    )
    assert calls[0] == ("create", "me/it")
    assert "masks.safetensors" in calls[1][2]

    def download(name, cache_dir, **options):
        calls.append((name, cache_dir))
        return lab["base"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = dataclasses.replace(
        config,
        base_model_id="who/base",
        cache_dir="kept",
        output_path=str(tmp_path / "c"),
    )
    dam.merge(config)
    assert calls[-1] == ("who/base", "kept")


def test_hub_datasets_by_name_and_configuration(monkeypatch):
    seen = {}

    def load(path, part, split, cache_dir):
        seen.update(path=path, part=part, split=split, cache_dir=cache_dir)
        return datasets.Dataset.from_list(
            [{"question": f"{i}?", "answer": str(i)} for i in range(5)]
        )

    monkeypatch.setattr("datasets.load_dataset", load)
    rows = load_task("who/data:part-1", n=3, cache_dir="kept")
    assert seen == dict(path="who/data", part="part-1", split="train", cache_dir="kept")
    assert len(rows) == 3
    assert rows[0]["messages"][0]["content"] == rows[0]["messages"][1]["content"] + "?"
    with pytest.raises(ValueError, match="n=6: expected 1 to 5, the rows of who/data"):
        load_task("who/data", n=6)


def test_killed_dataset_goes_on_and_ends_the_same(lab, tmp_path, monkeypatch):
    config = dataclasses.replace(
        lab["topk"], hf_disk_dataset_dir=str(tmp_path / "again")
    )
    run = stopping_at(4, teacher_dataset.stored_teacher)
    monkeypatch.setattr(teacher_dataset, "stored_teacher", run)
    with pytest.raises(KeyboardInterrupt):
        dam.create_dataset_topk_logits(config)
    assert len(list((tmp_path / "again" / "parts").iterdir())) >= 1
    with pytest.raises(ValueError, match="not complete"):
        options = dict(hf_disk_dataset_dir=str(tmp_path / "again"))
        dam.train(train_config(lab, tmp_path / "run", **options))
    before = len(run.calls)
    again = dam.create_dataset_topk_logits(config)
    assert len(run.calls) - before < 6  # 8 + 8 rows are 4 + 4 batches of 3 in parts of 5
    assert again[:] == lab["dataset"][:]


def test_rows_hold_probabilities_in_half_precision(lab):
    dataset = lab["dataset"]
    assert dataset.features["topk_log_probs"].feature.dtype == "float16"
    assert sorted(set(dataset["source"])) == [0, 1]
    for row in dataset:
        top = torch.tensor(row["topk_log_probs"]).view(-1, 8)
        mass = top.exp().sum(1) + torch.tensor(row["topk_tail"]).exp()
        assert_close(mass, torch.ones_like(mass), atol=5e-3, rtol=0)
        assert (top.diff(dim=1) <= 0).all()


def test_training_from_disk_runs_no_teacher(lab, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a component was run")

    monkeypatch.setattr(objective, "_teacher_hidden", refuse)
    monkeypatch.setattr(objective, "_teacher_logits", refuse)
    run = dam.train(train_config(lab, tmp_path / "disk", use_mse=True))
    assert {"kl", "mse"} <= set(run.history)
    with pytest.raises(AssertionError, match="was run"):
        options = dict(generate_logits_on_fly=True)
        dam.train(train_config(lab, tmp_path / "fly", **options))


@pytest.fixture(scope="module")
def bundled():
    "The bundled experts as one merger, and a batch of each one's data."
    names = ["rewrite", "summarize", "extract"]
    tokenizer = load_tokenizer(bundled_path("models/base"))
    paths = [str(bundled_path(f"models/{name}")) for name in names]
    data = {bundled_path(f"tasks/{name}"): 8 for name in names}
    rows = list(build_dataset(data, tokenizer))
    config = MergerConfig(paths, dtype="float32")
    return Merger.from_config(config).eval(), rows, tokenizer


def loss_and_gradient(merger, batch, name, **options):
    options["losses"] = {name: 1.0}
    loss = merger(objective=objective.Objective(temperature=2.0, **options), **batch)[
        "loss"
    ]
    masks = [mask for mask in merger.parameters() if mask.requires_grad]
    gradients = torch.autograd.grad(loss, masks)
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def batch_from_disk(bundled, k):
    "The batch as training reads it: through float16 and the collator."
    merger, rows, tokenizer = bundled
    stored = []
    for source in range(3):
        own = [row for row in rows if row["source"] == source]
        path = merger.merger_config.model_paths[source]
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        teacher = Merger([model.eval()], MergerConfig())
        collate = ChatCollator(tokenizer)
        columns = teacher_dataset.stored_teacher(teacher, own, collate, k, 2.0)
        stored += [row | column for row, column in zip(own, columns)]
    return dam.TopkCollator(tokenizer, k)(stored)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["kl", "mse"])
def test_stored_teachers_give_the_gradient_of_the_components(bundled, name, fused):
    """At k = vocabulary the loss to 1e-5, absolute and relative, and the gradient, with a merger that
    is wrong about most and with one that is nearer to its teacher."""
    merger, rows, tokenizer = bundled
    live, everything = ChatCollator(tokenizer)(rows), merger.config.vocab_size
    stored = batch_from_disk(bundled, everything)
    third, most = torch.full((3,), 1 / 3), torch.tensor([0.8, 0.1, 0.1])
    for shares, n in ((most, 1), (third, 3)):
        for _, leaf, key in merger.masked_parameters():
            mask = leaf.masks[key]
            mask.data[:] = shares.view(3, *[1] * (mask.dim() - 1))
        own = {k: v[live["source"] < n] for k, v in live.items()}
        same = {k: v[live["source"] < n] for k, v in stored.items()}
        loss, gradient = loss_and_gradient(merger, own, name, fused=fused)
        for batch, k in ((same, None), (own, everything)):
            whole, found = loss_and_gradient(merger, batch, name, k=k, fused=fused)
            assert whole == pytest.approx(loss, rel=1e-5, abs=0)
            assert whole == pytest.approx(loss, rel=0, abs=1e-5)
            assert torch.cosine_similarity(gradient, found, dim=0) > 1 - 1e-5
            assert_close(found, gradient, atol=1e-5, rtol=1e-3)


def test_fifty_stored_tokens_lead_the_way_of_all(bundled):
    merger, rows, tokenizer = bundled
    loss, gradient = loss_and_gradient(merger, ChatCollator(tokenizer)(rows), "kl")
    cut, found = loss_and_gradient(merger, batch_from_disk(bundled, 50), "kl")
    assert torch.cosine_similarity(gradient, found, dim=0) >= 0.99
    assert cut <= loss


def test_squared_error_of_fifty_tokens_is_their_part_of_the_whole(bundled):
    "Nothing else of the logits counts, and float16 costs less than a thousandth."
    merger, rows, tokenizer = bundled
    batch = batch_from_disk(bundled, 50)
    found, _ = loss_and_gradient(merger, batch, "mse")
    labels = shift_labels(batch["labels"], batch["attention_mask"])
    wanted = []
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for i in range(3):
        at = (labels != -100) & (batch["source"] == i)[:, None]
        with torch.no_grad():
            z, u = merger(**inputs).logits[at], merger.component_forward(i, **inputs)
        top, tokens = u.logits[at].topk(50)
        wanted.append((z.gather(-1, tokens) - top).square().sum(-1) / z.shape[-1])
    assert found == pytest.approx(torch.cat(wanted).mean().item(), rel=1e-3)
    whole, _ = loss_and_gradient(merger, ChatCollator(tokenizer)(rows), "mse")
    assert 0.2 * whole < found < whole


def test_collator_makes_probabilities_of_what_was_rounded(bundled):
    batch = batch_from_disk(bundled, 5)
    scored = shift_labels(batch["labels"], batch["attention_mask"]) != -100
    mass = batch["topk_log_probs"].exp().sum(-1) + batch["topk_tail"].exp()
    assert_close(mass[scored], torch.ones_like(mass[scored]), atol=1e-6, rtol=0)


def test_dataset_of_an_older_version_is_refused(lab, tmp_path):
    old, folder = tmp_path / "old", lab["folder"] / "dataset"
    lab["dataset"].remove_columns("topk_normaliser").save_to_disk(str(old))
    shutil.copy(folder / teacher_dataset.DATASET_FILE, old)
    with pytest.raises(ValueError, match="lacks topk_normaliser.*--overwrite"):
        dam.train(train_config(lab, tmp_path / "run", hf_disk_dataset_dir=str(old)))


def test_stored_teachers_stand_where_they_predict(bundled):
    batch = batch_from_disk(bundled, 5)
    labels = shift_labels(batch["labels"], batch["attention_mask"])
    scored = labels != -100
    likeliest = batch["topk_indices"][..., 0]
    assert (likeliest[scored] == labels[scored]).float().mean() > 0.8
    assert (batch["topk_log_probs"][~scored] == 0).all()


def test_resumed_run_equals_an_uninterrupted_one(lab, tmp_path):
    config = train_config(lab, tmp_path / "run", max_steps=6, save_steps=3)
    whole = dam.train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = dam.train(dataclasses.replace(config, resume=True))
    for name, mask in whole.merger.mask_state().items():
        assert torch.equal(mask, again.merger.mask_state()[name]), name
    assert again.history.step.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_stopped_shows_no_older_merge(lab, tmp_path, monkeypatch):
    config = train_config(lab, tmp_path / "run", max_steps=2, save_steps=2)
    dam.train(config)
    (tmp_path / "run/scores.csv").write_text("model,task")
    assert (tmp_path / "run/merged").exists()
    config, make = (
        dataclasses.replace(config, max_steps=6, resume=True),
        dam.make_trainer,
    )

    def stopping(*arguments):
        made = make(*arguments)
        made[0].add_callback(SignalAt(2))
        return made

    with monkeypatch.context() as patched:
        patched.setattr(dam, "make_trainer", stopping)
        with pytest.raises(RunInterrupted, match="stopped after step 3 of 6.*--resume"):
            dam.train(config)
    assert not (tmp_path / "run/merged").exists()
    assert not (tmp_path / "run/scores.csv").exists()
    assert len(dam.train(config).history) == 6
    assert (tmp_path / "run/merged").exists()


def test_what_cannot_be_resumed_or_cleared_is_refused(lab, tmp_path):
    config = train_config(lab, tmp_path / "run", max_steps=1, export=False)
    dam.train(config)
    resumed = dataclasses.replace(config, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint to go on from"):
        dam.train(resumed)
    sealed_checkpoint(tmp_path / "run", 1, processes=2)
    with pytest.raises(ValueError, match="written by 2 processes, and there are 1"):
        dam.train(resumed)
    inside = {"untrained_merged_model_name": str(tmp_path / "run"), "overwrite": True}
    with pytest.raises(ValueError, match="overwrite would clear"):
        dam.train(dataclasses.replace(config, **inside))
    assert (tmp_path / "run/masks.safetensors").exists()


def test_all_test_rows_are_scored_if_none_is_asked_for_by_number(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(dam, "read_facts", lambda folder: {"datasets": [str(bundled_path("tasks/rewrite"))]})
    held = load_task(bundled_path("tasks/rewrite"), "test")
    for asked, n in ((None, len(held)), (3, 3)):
        assert dam.rows_to_score(train_config(lab, tmp_path, eval_samples=asked)) == {"rewrite": held[:n]}
    assert dam.rows_to_score(train_config(lab, tmp_path, eval_samples=0)) == {}
    with pytest.raises(ValueError, match="eval_samples=None, save_merged=False"):
        train_config(lab, tmp_path, eval_samples=None, save_merged=False)


@pytest.mark.parametrize("held", ["model", "base", "dataset"])
def test_training_never_clears_what_its_folders_name(lab, tmp_path, held):
    "Models and base are named inside the folder of dam-merge, datasets inside that of dam-topk."
    run = tmp_path / "run"
    begin_run(train_config(lab, run))
    paths = {"model": lab["experts"][1], "base": lab["base"], "dataset": lab["topk"].datasets[1]}
    kept = run / Path(paths[held]).name
    shutil.copytree(paths[held], kept) if held != "dataset" else shutil.copy(paths[held], kept)
    paths[held] = str(kept)
    models, data = [lab["experts"][0], paths["model"]], [lab["topk"].datasets[0], paths["dataset"]]
    dam.merge(dam.DAMConfig(paths["base"], models, str(tmp_path / "untrained")))
    topk = dict(datasets=data, model_paths=models, base_model=paths["base"], output_dir=str(tmp_path / "dataset"), compute_logits=False)
    dam.create_dataset_topk_logits(dataclasses.replace(lab["topk"], **topk))
    config = train_config({"folder": tmp_path}, run, overwrite=True, generate_logits_on_fly=True, max_steps=1)
    with pytest.raises(ValueError, match=f"overwrite would clear .* which holds .*{kept.name}"):
        dam.train(config)
    assert kept.exists()


def test_datasets_and_models_of_one_name_are_all_scored(lab, tmp_path):
    experts = [str(tmp_path / place / "merged") for place in "ab"]
    for expert, path in zip(lab["experts"], experts):
        shutil.copytree(expert, path)
    rows = [chat_row(" ".join(WORDS[:i]), "sat") for i in range(1, 11)]
    for place in "ab":
        write_jsonl(tmp_path / place / "rows.jsonl", rows)
    untrained, dataset = str(tmp_path / "untrained"), str(tmp_path / "dataset")
    dam.merge(dam.DAMConfig(lab["base"], experts, untrained))
    topk = dataclasses.replace(
        lab["topk"],
        dataset_names=[str(tmp_path / place / "rows.jsonl") for place in "ab"],
        model_ids=experts,
        split="all",
        hf_disk_dataset_dir=dataset,
        compute_logits=False,
    )
    dam.create_dataset_topk_logits(topk)
    config = dam.DAMTrainConfig(
        untrained_merged_model_name=untrained,
        hf_disk_dataset_dir=dataset,
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        score_rows=1,
        device="cpu",
    )
    scores = dam.train(config).scores
    assert sorted(set(scores.task)) == ["a/rows.jsonl", "b/rows.jsonl"]
    assert len(set(scores.model)) == 5 and len(scores) == 10  # with the average


def test_tensorboard_gets_the_loss(lab, tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    options = dict(report_to="tensorboard", logging_steps=1, export=False)
    run = dam.train(train_config(lab, tmp_path / "run", **options))
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    read = event_accumulator.EventAccumulator(str(events)).Reload()
    said = [scalar.value for scalar in read.Scalars("train/loss")]
    assert said == pytest.approx(run.history.loss.tolist(), abs=1e-4)


def test_mofo_moves_a_share_and_all_of_it_is_adamw(lab, tmp_path):
    start = dam.load_untrained(train_config(lab, tmp_path)).mask_state()
    options = dict(max_steps=1, optim="mofo", mofo_fraction=0.25)
    few = dam.train(train_config(lab, tmp_path / "few", **options)).merger.mask_state()
    for name, mask in few.items():
        moved = (mask != start[name]).float().mean().item()
        assert 0 < moved <= 0.25, name
    options = dict(optim="mofo", mofo_fraction=1.0)
    every = dam.train(train_config(lab, tmp_path / "every", **options))
    adamw = dam.train(train_config(lab, tmp_path / "adamw"))
    for name, mask in every.merger.mask_state().items():
        assert_close(mask, adamw.merger.mask_state()[name])


def test_momentum_filter_passes_the_largest():
    momentum = torch.tensor([[0.1, -0.9], [0.5, 0.0]])
    wanted = torch.tensor([[False, True], [True, False]])
    assert torch.equal(dam.momentum_filter(momentum, 0.5), wanted)
    assert dam.momentum_filter(momentum, 0.0).sum() == 1


def test_mofo_goes_by_momentum_not_by_the_gradient():
    "The second gradient cancels entry 1's momentum and is largest there, and small where the first was large."
    parameter, twin = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = dam.MoFOAdamW([parameter], fraction=0.25, lr=0.1, weight_decay=0.0)
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    for gradient in ([9.5, 10.0, 0.0, 0.0], [-0.5, -9.0, 5.0, 1.0]):
        before, twin_before = parameter.detach().clone(), twin.detach().clone()
        for each, steps in ((parameter, optimizer), (twin, adamw)):
            each.grad = torch.tensor(gradient)
            steps.step()
        moved_to = (parameter - before).detach()
        (entry,) = moved_to.nonzero().flatten().tolist()
        assert entry == (1 if gradient[0] > 0 else 0)
        # what did not move has gathered momentum all the same: the step is AdamW's
        assert_close(moved_to[entry], (twin - twin_before).detach()[entry])


REGULARISED = dict(max_steps=10, export=False, learning_rate=0.02)


@pytest.fixture(scope="module")
def unregularised(lab):
    "An untrained model with random coefficients, so that no regulariser starts at an extreme, and a run without any."
    start = str(lab["folder"] / "random")
    dam.merge(dam.DAMConfig(lab["base"], lab["experts"], start, random_init=["linear"]))
    options = REGULARISED | {"untrained_merged_model_name": start}
    return start, dam.train(train_config(lab, lab["folder"] / "without", **options))


def penalty_of(merger, name):
    weighing = objective.Objective(angles=dam.task_angles(merger))
    with torch.no_grad():
        return objective.coefficient_penalty(merger, name, weighing).item()


@pytest.mark.parametrize(
    "option, column",
    [
        ("lambda_coef", "similarity"),
        ("lambda_coef_l1", "l1"),
        ("lambda_coef_l2", "l2"),
        ("lambda_coef_overlap", "overlap"),
        ("lambda_coef_angle", "angle_overlap"),
    ],
)
def test_regularisers_lower_what_they_weigh(
    lab, unregularised, tmp_path, option, column
):
    start, without = unregularised
    options = REGULARISED | {"untrained_merged_model_name": start, option: 5.0}
    weighed = dam.train(train_config(lab, tmp_path / "on", **options))
    history = weighed.history
    total = history.kl + 5.0 * history[column]
    assert_close(torch.tensor(history.loss), torch.tensor(total), rtol=1e-4, atol=1e-6)
    begun = penalty_of(dam.DAMMerger.from_pretrained(start), column)
    assert history[column].iloc[0] == pytest.approx(begun, rel=1e-4)
    ended = penalty_of(weighed.merger, column)
    assert ended < 0.98 * min(begun, penalty_of(without.merger, column))


def test_angles_are_those_of_task_vectors(lab):
    merger = dam.DAMMerger.from_pretrained(lab["folder"] / "untrained")
    angles = dam.task_angles(merger)
    name = "model.layers.0.mlp.up_proj.weight"
    base, *experts = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (lab["base"], *lab["experts"])
    ]
    first, second = [
        (expert.get_parameter(name) - base.get_parameter(name)).flatten()
        for expert in experts
    ]
    cosine = first @ second / (first.norm() * second.norm())
    assert_close(angles[name][0, 1], cosine.acos().detach(), atol=1e-4, rtol=1e-4)
    assert set(angles) == {
        name for name, _, key in merger.masked_parameters() if key == "weight"
    }


def test_commands_of_the_readme(readme_commands, tmp_path, monkeypatch, capsys):
    "As printed there, from the root of a clone, on fewer rows and steps."
    few = {
        "dam-merge": [],
        "dam-topk": ["--num_samples", "8"],
        "dam-train": ["--max_steps", "3", "--eval_samples", "4"],
    }
    commands = readme_commands("dam-")
    assert [words[0] for words in commands] == list(few)
    (tmp_path / "data").symlink_to(bundled_path())
    monkeypatch.chdir(tmp_path)
    for words in commands:
        assert main([*words, *few[words[0]]]) == 0, words
    said = capsys.readouterr().out
    assert "24 rows of 3 components, with stored teachers" in said
    assert "plain transformers: runs/dam/trained/merged" in said
    scores = pd.read_csv("runs/dam/trained/scores.csv")
    assert scores.n.eq(4).all() and len(scores) == 6 * 3
    table = scores.set_index(["model", "task"]).exact_match.unstack()
    names = ["rewrite", "summarize", "extract"]
    assert list(pd.unique(scores.model)) == [*names, "base", "merged", "uniform average"]
    assert all(name in said.split("Exact match")[1] for name in (*names, "merged"))
    assert all(table.loc[name, name] == 1 for name in names)
    start = dam.DAMMerger.from_pretrained("runs/dam/untrained")
    trained = dam.DAMMerger.from_pretrained("runs/dam/trained")
    assert moved(trained, start.mask_state()) > 0.01
    assert len(read_history("runs/dam/trained/history.jsonl")) == 3
    plain = AutoModelForCausalLM.from_pretrained("runs/dam/trained/merged")
    ids = torch.arange(3, 9)[None]
    assert_close(plain(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)


PUBLISHED = {
    dam.DAMConfig: "--output_path out --device cpu --use_embedding_layers --use_base_model "
    "--non_linearity tanh --merge_layernorms --repo_id me/it",
    dam.DAMTopkConfig: "--k 50 --dataset_names a b c --model_ids x y z --base_model_name w "
    "--cache_dir cache --compute_logits True",
    dam.DAMTrainConfig: "--temperature 2.0 --weight_decay 0.0 --learning_rate 1e-2 "
    "--lr_scheduler_type linear --use_kl True --use_mse False --use_entropy False "
    "--lambda_coef 0.01 --lambda_coef_l1 0.0 --lambda_coef_l2 1e-5 "
    "--generate_logits_on_fly True --use_all_logits True "
    "--untrained_merged_model_name m --hf_disk_dataset_dir d --cache_dir c "
    "--base_model_name b",
}


@pytest.mark.parametrize("config", PUBLISHED)
def test_published_options_word_for_word(config):
    words = PUBLISHED[config].split()
    (name,) = [name for name, command in COMMANDS.items() if command.config == config.__name__]
    made = parse(name, words)
    for word in words:
        if word.startswith("--"):
            assert hasattr(made, word[2:]), word
    if config is dam.DAMConfig:
        assert made.use_base_model and made.non_linearity == "tanh"
    if config is dam.DAMTopkConfig:
        assert made.dataset_names == ["a", "b", "c"] and made.compute_logits is True
    if config is dam.DAMTrainConfig:
        assert made.use_mse is False and made.lambda_coef_l2 == 1e-5


PLACES = {"output_dir", "hf_disk_dataset_dir", "cache_dir", "repo_id", "overwrite"}


@pytest.mark.parametrize("config", PUBLISHED)
def test_a_model_card_tells_no_places(config):
    told = set(recipe_options(config()))
    assert not told & PLACES and "device" not in told
    assert told & {"non_linearity", "k", "lambda_coef"}


def test_a_dataset_depends_on_all_options_that_may_not_change(lab):
    "It goes on under another device or batch size, and is another one with another seed."
    config = lab["topk"]
    facts = teacher_dataset.dataset_facts(config)
    how = resumable_options(dam.DAMTopkConfig)
    assert how == {"output_dir", "cache_dir", "batch_size", "part_size", "device", "resume", "overwrite"}
    assert set(facts) == {field.name for field in dataclasses.fields(config)} - how | {"files"}
    other = teacher_dataset.dataset_facts(dataclasses.replace(config, seed=1))
    assert teacher_dataset.changes(facts, other) == "other seed"


def test_mofo_takes_the_steps_of_the_default_rate(lab, tmp_path):
    "In units of deltas where none is given; these coefficients multiply whole weights."
    config = train_config(lab, tmp_path / "run", optim="mofo")
    trainer, *_ = dam.make_trainer(config, dam.loop_arguments(config, tmp_path / "run"))
    (group,) = trainer.optimizer.param_groups
    assert group["lr"] == trainer.args.learning_rate < 0.1
    given = dataclasses.replace(config, learning_rate=0.02)
    assert dam.dam_optimizer(given, trainer.model).param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=1.0), "stored at 2.0"),
        (dict(hf_disk_dataset_dir="nowhere"), "dam-topk"),
        (dict(untrained_merged_model_name="nowhere"), "nowhere"),
        (dict(use_kl=False), "nothing is left to learn"),
        (dict(score_rows=2), "needs 10 different"),
        (dict(score_rows=2, export=False), "Set save_merged"),
        (
            dict(generate_logits_on_fly=True, use_all_logits=False, k=65),
            "k=65: expected at most 64",
        ),
        (dict(optim="unheard"), "unheard"),
    ],
)
def test_errors_say_what_to_do_and_leave_no_run(lab, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dam.train(train_config(lab, tmp_path / "run", **options))
    dam.train(train_config(lab, tmp_path / "run", max_steps=1))  # nothing in the way


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=65), "k=65: expected at most 64"),
        (dict(dataset_names=["first.jsonl", "nowhere/data"]), "nowhere/data"),
        (dict(model_ids=["nowhere/a", "nowhere/b"]), "no such folder"),
        (dict(device="cuda:77"), "device='cuda:77'"),
        (dict(example_count=9), "9"),
    ],
)
def test_what_cannot_be_stored_is_said_before_teachers_run(
    lab, tmp_path, monkeypatch, options, message
):
    def refuse(*arguments):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(teacher_dataset, "load_teacher", refuse)
    if "dataset_names" in options:
        options["dataset_names"] = [lab["topk"].dataset_names[0], "nowhere/data"]
    folder = tmp_path / "dataset"
    config = dataclasses.replace(
        lab["topk"], hf_disk_dataset_dir=str(folder), **options
    )
    with pytest.raises((ValueError, OSError), match=message):
        dam.create_dataset_topk_logits(config)
    assert not folder.exists()


def test_a_row_that_cannot_be_learned_is_named_before_teachers_run(
    lab, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_dataset, "load_teacher", lambda *_: pytest.fail("it was loaded"))
    rows = [chat_row("the cat", "sat"), chat_row(" ".join(WORDS * 4), "sat")]
    write_jsonl(tmp_path / "long.jsonl", rows)
    config = dataclasses.replace(
        lab["topk"],
        dataset_names=[lab["topk"].dataset_names[0], str(tmp_path / "long.jsonl")],
        hf_disk_dataset_dir=str(tmp_path / "dataset"),
        max_length=30,
    )
    with pytest.raises(ValueError, match="long.jsonl:2: .* cut to max_length=30"):
        dam.create_dataset_topk_logits(config)
    assert not (tmp_path / "dataset").exists()


def test_dataset_of_rows_or_models_that_changed_is_refused(lab, tmp_path):
    data = make_data(tmp_path)
    (tmp_path / "folder").mkdir()
    shutil.move(data[0], tmp_path / "folder/train.jsonl")
    model = tmp_path / "expert1"
    shutil.copytree(lab["experts"][1], model)
    config = dataclasses.replace(
        lab["topk"],
        dataset_names=[str(tmp_path / "folder"), data[1]],
        model_ids=[lab["experts"][0], str(model)],
        hf_disk_dataset_dir=str(tmp_path / "dataset"),
    )
    whole = dam.create_dataset_topk_logits(config)
    shutil.copy(data[1], tmp_path / "folder/test.jsonl")  # another split
    assert dam.create_dataset_topk_logits(config)[:] == whole[:]
    for changed, file in ((data[1], data[1]), (model, model / "model.safetensors")):
        time_before = Path(file).stat().st_mtime_ns
        os.utime(file, ns=(time_before, time_before + 1))
        with pytest.raises(FileExistsError, match=f"with an older {changed}. Choose"):
            dam.create_dataset_topk_logits(config)
        os.utime(file, ns=(time_before, time_before))
    facts = teacher_dataset.dataset_facts(config)
    shutil.rmtree(tmp_path / "folder")
    assert not teacher_dataset.changes(facts, teacher_dataset.dataset_facts(config))
    assert teacher_dataset.changes(facts, teacher_dataset.dataset_facts(dataclasses.replace(config, k=7)))


def test_device_that_is_not_there(lab, tmp_path):
    config = dam.DAMConfig(
        lab["base"], lab["experts"], str(tmp_path / "out"), device="cuda:77"
    )
    with pytest.raises(ValueError, match="device='cuda:77'.*Use 'cpu' or 'auto'"):
        dam.merge(config)
    assert not (tmp_path / "out").exists()


def test_data_in_another_order_than_the_models(lab, tmp_path):
    turned = lab["experts"][::-1]
    dam.merge(dam.DAMConfig(lab["base"], turned, str(tmp_path / "turned")))
    options = dict(untrained_merged_model_name=str(tmp_path / "turned"))
    with pytest.raises(ValueError, match="expert0, expert1: expected .* expert1, e"):
        dam.train(train_config(lab, tmp_path / "run", **options))


@pytest.mark.parametrize("turned", [False, True])
def test_the_order_of_models_from_the_hub(lab, tmp_path, monkeypatch, turned):
    "They lie in folders whose names say nothing of them."
    names = {"who/base": lab["base"], "who/x": lab["experts"][0]}
    names["who/y"] = lab["experts"][1]
    for number, (name, path) in enumerate(names.items()):
        shutil.copytree(path, tmp_path / f"hub/{number}f")
        names[name] = str(tmp_path / f"hub/{number}f")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: names[name]
    )
    models = ["who/y", "who/x"] if turned else ["who/x", "who/y"]
    options = {"cache_dir": "kept", "output_path": str(tmp_path / "untrained")}
    dam.merge(dam.DAMConfig("who/base", models, **options))
    topk = dataclasses.replace(
        lab["topk"],
        model_ids=["who/x", "who/y"],
        base_model_name="who/base",
        cache_dir="kept",
        hf_disk_dataset_dir=str(tmp_path / "dataset"),
        compute_logits=False,
    )
    dam.create_dataset_topk_logits(topk)
    options = {"generate_logits_on_fly": True, "export": False, "max_steps": 1}
    config = train_config({"folder": tmp_path}, tmp_path / "run", **options)
    if turned:
        with pytest.raises(ValueError, match="data of x, y: expected .* y, x, in this"):
            dam.train(config)
    else:
        dam.train(config)
        assert dam.DAMMerger.from_pretrained(tmp_path / "run").model_ids == models


def test_resuming_passes_over_a_checkpoint_that_was_cut_off(lab, tmp_path):
    config = train_config(lab, tmp_path / "run", max_steps=4, save_steps=2)
    whole = dam.train(config)
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    again = dam.train(dataclasses.replace(config, resume=True))
    for name, mask in whole.merger.mask_state().items():
        assert torch.equal(mask, again.merger.mask_state()[name]), name


def test_a_killed_process_goes_on(lab, tmp_path, forked):
    "dam-topk as a command, killed without warning after its first part, and gone on with by another process."
    folder = tmp_path / "dataset"
    words = ["--k", "8", "--dataset_names", *lab["topk"].dataset_names]
    words += ["--model_ids", *lab["experts"], "--base_model_name", lab["base"]]
    words += ["--hf_disk_dataset_dir", str(folder), "--device", "cpu"]
    words += ["--batch_size", "1", "--part_size", "1"]
    code = "import sys; from merge_lab.cli import main; sys.exit(main())"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MERGE_LAB_BARS": "1"}
    environment.pop("TQDM_DISABLE", None)
    command = [sys.executable, "-c", code, "dam-topk", *words]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        first = folder / "parts" / "000-000000000-000000001"
        deadline = time.monotonic() + 120
        while not first.exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, said
    assert "1/2" in said and "row" in said  # progress
    assert main(["dam-topk", *words]) == 0
    assert datasets.load_from_disk(str(folder))[:] == lab["dataset"][:]


def test_a_dataset_is_a_run_like_any_other(lab, tmp_path):
    "Its options stand beside it, one process works in it, and what was begun before runs had options goes on."
    folder = tmp_path / "again"
    config = dataclasses.replace(lab["topk"], output_dir=str(folder))
    facts = teacher_dataset.dataset_facts(config)
    assert config.hf_disk_dataset_dir == str(folder)
    with pytest.raises(FileNotFoundError, match="no dataset that could be resumed"):
        dam.create_dataset_topk_logits(dataclasses.replace(config, resume=True))
    assert not folder.exists()
    with alone_in(folder), pytest.raises(FileExistsError, match="another process is at work"):
        dam.create_dataset_topk_logits(config)
    teacher_dataset.open_dataset(folder, facts, False)  # as an older version began it
    assert not is_run(folder)
    dam.create_dataset_topk_logits(config)
    assert is_run(folder) and config_from_yaml(dam.DAMTopkConfig, folder / "config.yaml") == config
    assert main(["dam-topk", str(folder / "config.yaml"), "--resume"]) == 0
    (folder / "config.yaml").unlink()
    other = dataclasses.replace(config, k=7)
    with pytest.raises(FileExistsError, match=r"one with other k\. Choose another output_dir, or replace it"):
        dam.create_dataset_topk_logits(other)
    found = dam.create_dataset_topk_logits(dataclasses.replace(other, overwrite=True))
    assert len(found[0]["topk_log_probs"]) == 7 * len(found[0]["topk_tail"])


@pytest.mark.parametrize("held", ["datasets", "model_paths", "base_model", "cache_dir"])
def test_a_dataset_never_clears_what_it_is_made_of(lab, tmp_path, held):
    folder = tmp_path / "dataset"
    config = dataclasses.replace(lab["topk"], output_dir=str(folder), compute_logits=False)
    dam.create_dataset_topk_logits(config)
    inside = folder / "mine"
    for source in {"datasets": [config.datasets[0]], "model_paths": [config.model_paths[1]], "base_model": [config.base_model], "cache_dir": []}[held]:
        shutil.copytree(source, inside) if Path(source).is_dir() else shutil.copy(source, inside)
    inside.mkdir(exist_ok=True) if held == "cache_dir" else None
    given = {"datasets": [str(inside), config.datasets[1]], "model_paths": [config.model_paths[0], str(inside)]}.get(held, str(inside))
    with pytest.raises(ValueError, match="overwrite would clear .* which holds .*mine"):
        dam.create_dataset_topk_logits(dataclasses.replace(config, seed=1, overwrite=True, **{held: given}))
    assert inside.exists() and datasets.load_from_disk(str(folder))[:]


def test_parts_of_another_size_are_not_taken_for_these(lab, tmp_path):
    config = dataclasses.replace(
        lab["topk"], hf_disk_dataset_dir=str(tmp_path / "again"), part_size=7
    )
    begun = teacher_dataset.write_parts(config, 0, tmp_path / "again" / "parts")
    teacher_dataset.open_dataset(tmp_path / "again", teacher_dataset.dataset_facts(config), False)
    next(begun), begun.close()
    again = dam.create_dataset_topk_logits(dataclasses.replace(config, part_size=3))
    assert again[:] == lab["dataset"][:]


def test_a_short_run_wins_back_what_the_average_loses(tmp_path):
    """A sixth of the README's steps on a seventh of its data: two of three tasks are whole again.

    The third, rewriting, takes the whole run, which `benchmarks/dam.py` makes and scores.
    """
    names = ["rewrite", "summarize", "extract"]
    base, *models = [str(bundled_path(f"models/{name}")) for name in ("base", *names)]
    kinds = dict(use_embedding_layers=True, merge_layernorms=True)
    start, data = str(tmp_path / "untrained"), str(tmp_path / "dataset")
    average = dam.merge(dam.DAMConfig(base, models, start, dtype="float32", **kinds))
    stored = dam.DAMTopkConfig(
        dataset_names=[str(bundled_path(f"tasks/{name}")) for name in names],
        model_ids=models,
        base_model_name=base,
        hf_disk_dataset_dir=data,
        example_count=300,
        device="cpu",
        dtype="float32",
    )
    dam.create_dataset_topk_logits(stored)
    config = dam.DAMTrainConfig(
        untrained_merged_model_name=start,
        hf_disk_dataset_dir=data,
        output_dir=str(tmp_path / "trained"),
        generate_logits_on_fly=False,
        max_steps=100,
        save_steps=0,
        score_rows=40,
        device="cpu",
    )
    scores = dam.train(config).scores.set_index(["model", "task"]).exact_match
    tests = {
        name: load_task(bundled_path(f"tasks/{name}"), "test")[:40] for name in names
    }
    tokenizer = load_tokenizer(base)
    lost = evaluate_tasks(average.eval(), tokenizer, tests, metrics=["exact_match"])
    for name in ("summarize", "extract"):
        assert scores["merged", name] >= 0.9 * scores[name, name] > 0
        assert lost.exact_match[name] < 0.7 * scores[name, name]


def test_drawn_teachers_train_as_stored_ones_and_only_for_kl(lab, tmp_path):
    "Half of the k tokens are drawn from what the others leave; weights that are no logits are refused for the loss that wants logits."
    dataset = dam.create_dataset_topk_logits(dataclasses.replace(lab["topk"], output_dir=str(tmp_path / "drawn"), rest="drawn"))
    weights = torch.tensor(dataset[0]["topk_log_probs"]).view(-1, 8).exp()
    assert_close(weights.sum(-1), torch.ones(len(weights)), atol=2e-3, rtol=0)
    options = dict(hf_disk_dataset_dir=str(tmp_path / "drawn"), max_steps=2, save_merged=False)
    assert dam.train(train_config(lab, tmp_path / "run", **options)).history.loss.gt(0).all()
    with pytest.raises(ValueError, match="drawn, whose weights are no logits: mse cannot use them"):
        dam.train(train_config(lab, tmp_path / "mse", use_mse=True, **options))
