"Learning from few rows, and from what the models say themselves."

import dataclasses
import json
import re

import pytest
import torch
from small_runs import SignalAt, small

from merge_lab.chat import chat_row, encode_questions, load_task, prompt_of
from merge_lab.checkpoints import load_tokenizer
from merge_lab.closed_form import solve_masks
from merge_lab.config import read_yaml
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Batch, importance, label_log_probs
from merge_lab.rollouts import asked_of, DRAFT, drawn_answers, ENOUGH_ROWS, read_rows_of, spread, WRITTEN
from merge_lab.run_folder import bundled_path, read_rows, RunInterrupted
from merge_lab.scoring import MAX_TOKENS
from merge_lab.systems.mask_merge import make_trainer, prepare, run, show_result
from merge_lab.tinylm import save_tiny, tiny_experts
from merge_lab.token_losses import shift_labels
from merge_lab.training import MergerTrainer


def same_after_interruption(folder, **options):
    "The history of a run, which one that is interrupted and resumed repeats to the number."
    options = dict(save_merged=False, eval_samples=0, held_out_rows=4, max_steps=4) | options
    whole = run(small(folder / "whole", **options), progress=False)
    config = small(folder / "cut", **options)
    with pytest.raises(RunInterrupted):
        run(config, callbacks=(SignalAt(2),), progress=False)
    again = run(dataclasses.replace(config, resume=True), progress=False)
    names = [name for name in whole.history if name not in ("tokens_per_second", "memory_bytes")]
    assert whole.history[names].equals(again.history[names])
    masks = whole.merger.mask_state(), again.merger.mask_state()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    return whole


@pytest.mark.parametrize("loss", ["hidden", "hidden_cosine"])
def test_hidden_states_are_learned_and_a_run_resumes(loss, tmp_path):
    found = same_after_interruption(tmp_path, loss_func_name=loss, hidden_layers=[0, 2], teacher_cache_gb=0.1)
    assert found.held_out["loss"] < found.held_out["start"]


def test_a_layer_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"hidden_layers=\[9\]: expected 0 to"):
        run(small(tmp_path, hidden_layers=[9]))


def prompts_alone(folder, n=12):
    "Files of questions from the bundled tasks, in two layouts, without an answer."
    files = {}
    for task, layout in (("rewrite", lambda text: {"prompt": text}), ("summarize", lambda text: {"messages": [{"role": "user", "content": text}]})):
        rows = load_task(bundled_path(f"tasks/{task}"), n=n)
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(layout(prompt_of(row)[0]["content"])) + "\n" for row in rows))
        files[str(file)] = None
    return files


OWN = dict(answers="components", answers_per_prompt=3, answer_tokens=24)


def gpt2_pair(folder):
    "Two models whose linears are stored as inputs x outputs."
    paths = [str(folder / f"gpt2-{n}") for n in range(2)]
    for path, model in zip(paths, tiny_experts("gpt2", n=2)):
        save_tiny(model, path)
    return paths


def test_prompts_alone_are_enough(tmp_path):
    "Components answer them; the run resumes with the very answers, also those that choose the masks."
    found = same_after_interruption(tmp_path, dataset_configs=prompts_alone(tmp_path), **OWN)
    assert found.held_out["loss"] < found.held_out["start"]
    assert found.scores is None
    rows, more = read_rows_of(tmp_path / "whole" / "run" / WRITTEN)
    learned = [bool(own[0]) for own in more["learned"]]
    sides = [{tuple(asked) for asked, own in zip(asked_of(rows), learned) if own is side} for side in (True, False)]
    assert sides[1] and not sides[0] & sides[1]  # a prompt that chooses the masks is not learned from
    assert len(rows) == 2 * 3 * 10 and {row["source"] for row in rows} == {0, 1}  # two of twelve are the file's validation and test rows


@pytest.mark.parametrize("data, at", [(True, 4), (False, 4), (True, 1)])
def test_what_components_had_written_when_a_run_was_stopped_is_not_written_again(data, at, tmp_path, monkeypatch):
    options = dict(dataset_configs=prompts_alone(tmp_path) if data else {}, written_prompts=0 if data else 6, save_merged=False, eval_samples=0, max_steps=1, **OWN)
    few_at_once = tuple(200 if value == MAX_TOKENS else value for value in drawn_answers.__defaults__)
    monkeypatch.setattr(drawn_answers, "__defaults__", few_at_once)
    calls, generate = [], Merger.generate

    def counted(self, *arguments, **given):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return generate(self, *arguments, **given)

    monkeypatch.setattr(Merger, "generate", counted)
    config = small(tmp_path / "cut", **options)
    with pytest.raises(RunInterrupted, match="stopped while components write; what components have written is in .*--resume"):
        run(config, progress=False)
    assert len(read_rows(tmp_path / "cut" / "run" / DRAFT)) == at - 1
    monkeypatch.setattr(MergerTrainer, "training_step", lambda *_, **__: pytest.fail("cut off in the first step"))
    with pytest.raises(pytest.fail.Exception):  # all is written, and there is no checkpoint
        run(dataclasses.replace(config, resume=True), progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(Merger, "generate", counted)
    again = run(dataclasses.replace(config, resume=True), progress=False)
    stopped_and_resumed = len(calls) - 1
    assert not (tmp_path / "cut" / "run" / DRAFT).exists()
    calls[:] = [None] * 10
    monkeypatch.setattr(drawn_answers, "__defaults__", few_at_once)
    whole = run(small(tmp_path / "whole", **options), progress=False)
    assert len(calls) - 10 == stopped_and_resumed > 4  # no batch was drawn twice
    assert all(torch.equal(mask, again.merger.mask_state()[name]) for name, mask in whole.merger.mask_state().items())
    found = [read_rows_of(tmp_path / name / "run" / WRITTEN)[0] for name in ("cut", "whole")]
    assert found[0] == found[1]


@pytest.mark.parametrize("harm", ["line out", "answer out", "no rows", "of another"])
def test_a_draft_never_gives_an_answer_to_another_prompt(harm, tmp_path, monkeypatch, caplog):
    options = dict(dataset_configs=prompts_alone(tmp_path), save_merged=False, eval_samples=0, max_steps=1, **OWN)
    monkeypatch.setattr(drawn_answers, "__defaults__", tuple(200 if value == MAX_TOKENS else value for value in drawn_answers.__defaults__))
    config = small(tmp_path / "cut", **options)
    monkeypatch.setattr("merge_lab.rollouts.save_divided", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(drawn_answers, "__defaults__", tuple(200 if value == MAX_TOKENS else value for value in drawn_answers.__defaults__))
    file = tmp_path / "cut" / "run" / DRAFT
    lines = file.read_text().splitlines()
    whole = [json.loads(line) for line in lines]
    harmed = {
        "line out": lines[:1] + lines[2:],
        "answer out": [lines[0], json.dumps(whole[1] | {"answers": whole[1]["answers"][:1]}), *lines[2:]],
        "no rows": [lines[0], "{]", json.dumps({"foo": 1}), *lines[2:]],
        "of another": [lines[0], json.dumps(whole[2]), json.dumps(whole[1])],
    }
    file.write_text("\n".join(harmed[harm]) + "\n")
    run(dataclasses.replace(config, resume=True), progress=False)
    run(small(tmp_path / "whole", **options), progress=False)
    found = [read_rows_of(tmp_path / name / "run" / WRITTEN)[0] for name in ("cut", "whole")]
    assert found[0] == found[1] and not file.exists()
    assert ("is written again" in caplog.text) == (harm != "no rows")


def test_what_was_written_and_is_not_whole_is_told(tmp_path):
    config = small(tmp_path, dataset_configs=prompts_alone(tmp_path), save_merged=False, eval_samples=0, max_steps=1, **OWN)
    run(config, progress=False)
    file = tmp_path / "run" / WRITTEN
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{WRITTEN}: not whole"):
        run(dataclasses.replace(config, resume=True, max_steps=2), progress=False)


@pytest.mark.parametrize("kind", ["a template that prints no user", "weights the other way round"])
def test_what_is_refused_before_components_write_clears_nothing(kind, tmp_path, monkeypatch):
    "A run that is there stays, and a folder that was free stays free."
    for place in ("old", "new"):
        folder = tmp_path / place / "run"
        if place == "old":
            run(small(tmp_path / place, max_steps=1, save_merged=False, eval_samples=0), progress=False)
            kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        options = dict(dataset_configs={}, written_prompts=4, overwrite=place == "old", save_merged=False, **OWN)
        if kind == "weights the other way round":
            options |= dict(model_paths=gpt2_pair(tmp_path), base_model="mean", mask_init={"strategy": "least_squares"})
        else:
            (tmp_path / "deaf.jinja").write_text("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}")
            options["chat_template"] = str(tmp_path / "deaf.jinja")
        with pytest.raises(ValueError, match="does not print what a user says|lies as outputs x inputs"):
            run(small(tmp_path / place, **options), progress=False)
        assert not folder.exists() if place == "new" else all(file.read_bytes() == data for file, data in kept.items())


def test_held_out_rows_of_prompts_that_are_learned_from_are_told(tmp_path, caplog):
    run(small(tmp_path, dataset_configs=prompts_alone(tmp_path, 6), max_steps=1, held_out_rows=4, save_merged=False, eval_samples=0, **OWN | dict(answers_per_prompt=6)), progress=False)
    assert "fewer than ten prompts of a component" in caplog.text


def test_many_prompts_are_answered_once_and_few_more_often(tmp_path):
    "Writing costs about the same however many prompts there are."
    assert [small(tmp_path, answers="components").answers_to_each(prompts) for prompts in (2, 8, 16, 64, 5000)] == [8, 8, 4, 1, 1]
    assert small(tmp_path, answers="components", answers_per_prompt=5).answers_to_each(5000) == 5
    assert small(tmp_path, answers="components", answer_temperature=0.0).answers_to_each(8) == 1  # they would all be the same
    options = dict(dataset_configs=prompts_alone(tmp_path), answers="components", answer_tokens=8, max_steps=1, save_merged=False, eval_samples=0)
    run(small(tmp_path / "run", **options), progress=False)
    assert len(read_rows_of(tmp_path / "run" / "run" / WRITTEN)[0]) == 2 * 10 * 7


@pytest.mark.parametrize("setting", [dict(min_p=0.5), dict(typical_p=0.2), dict(min_new_tokens=20), dict(suppress_tokens=list(range(5, 60))), dict(num_return_sequences=2)], ids=lambda setting: next(iter(setting)))
def test_what_a_model_writes_is_its_own_whatever_its_settings_prefer(setting):
    """Neither cut nor stretched: how likely an answer is, is told of the whole distribution."""
    merger = Merger.from_config(MergerConfig([str(bundled_path(f"models/{task}")) for task in ("rewrite", "summarize")], base_model="mean", dtype="float32"))
    tokenizer = load_tokenizer(bundled_path("models/rewrite"))
    asked = encode_questions(tokenizer, [chat_row("Summarize: the cat sleeps in the garden.", "")] * 8, 0)
    asked = [row["input_ids"] for row in asked], 16, [2], 2.0
    plain = drawn_answers(merger, *asked)
    assert min(map(len, plain)) > 4
    for name, value in setting.items():
        setattr(merger.model.generation_config, name, value)
    assert drawn_answers(merger, *asked) == plain


@pytest.mark.parametrize("train_mode", ["end_to_end", "layerwise"])
def test_prompts_that_training_does_not_come_to_are_not_answered(tmp_path, train_mode):
    options = dict(dataset_configs=prompts_alone(tmp_path, n=200), answers="components", answer_tokens=4, max_steps=1, layer_steps=1, save_merged=False, eval_samples=0, held_out_rows=4)
    found = run(small(tmp_path / "run", train_mode=train_mode, **options), progress=False)
    rows = read_rows_of(tmp_path / "run" / "run" / WRITTEN)[0]
    assert len(rows) == len(set(asked_of(rows))) == 2 * (ENOUGH_ROWS + 4)
    assert len(found.held_out["looks"]) > 1


def test_a_run_that_goes_on_says_of_no_prompt_that_it_is_answered(tmp_path, caplog):
    options = dict(dataset_configs=prompts_alone(tmp_path, n=200), answers="components", answer_tokens=4, max_steps=1, save_merged=False, eval_samples=0)
    config = small(tmp_path / "run", **options)
    caplog.set_level("INFO")
    run(config, progress=False)
    rows = read_rows_of(tmp_path / "run" / "run" / WRITTEN)[0]
    assert "components answer 144 of" in caplog.text and len(rows) == 2 * (ENOUGH_ROWS + 8)  # of the 32 that may choose the masks a tenth
    caplog.clear()
    run(dataclasses.replace(config, max_steps=2, resume=True), progress=False)
    assert "components answer" not in caplog.text and read_rows_of(tmp_path / "run" / "run" / WRITTEN)[0] == rows


def test_whoever_has_prompts_written_has_them_answered(tmp_path):
    assert small(tmp_path, dataset_configs={}, written_prompts=4).answers == "components"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_rows_that_the_blend_answers_are_spread_over_a_step(share):
    for rows in (1, 3, 8, 32):
        chosen = spread(share, rows)
        assert len(chosen) == rows and sum(chosen) == max(round(share * rows), share > 0)
        assert rows < 8 or abs(sum(chosen[: rows // 2]) - share * rows / 2) <= 1


def test_a_step_that_is_cut_answers_the_same_rows(tmp_path):
    "The loss of a step is that of its rows, however many go through the model at once."
    found = []
    for n, size in enumerate((8, 4, 2, 1)):
        options = dict(on_policy=0.25, answer_tokens=8, loss_func_name="reverse_kl", per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=2, eval_samples=0)
        found.append(run(small(tmp_path / str(n), save_merged=False, held_out_rows=0, **options), progress=False).history)
    for one in found[1:]:
        assert list(one.rollout_tokens.dropna()) == list(found[0].rollout_tokens.dropna()) and one.rollout_tokens[0] > 0
        torch.testing.assert_close(torch.tensor(one.loss), torch.tensor(found[0].loss), rtol=1e-4, atol=0)


def test_no_data_are_needed(tmp_path):
    config = small(tmp_path, dataset_configs={}, written_prompts=6, save_merged=False, report=True, **OWN)
    found = run(config, progress=False)
    assert found.held_out["loss"] < found.held_out["start"]
    assert read_yaml(tmp_path / "run" / "config.yaml")["mask_init"]["factors"] == [0.8, 0.8]
    assert "One model for rewrite and summarize" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    by_layer = small(tmp_path / "layers", dataset_configs={}, written_prompts=6, save_merged=False, train_mode="layerwise", layer_steps=4, **OWN)
    assert run(by_layer, progress=False).history.groupby("layer").size().tolist() == [4] * 4


def test_a_merge_without_data_resumes_from_where_it_started(tmp_path):
    same_after_interruption(tmp_path, dataset_configs={}, written_prompts=6, save_merged=False, **OWN)
    for run_folder in ("whole", "cut"):
        assert read_yaml(next((tmp_path / run_folder).rglob("config.yaml")))["mask_init"]["factors"] == [0.8, 0.8]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_blend_learns_from_its_own_words_and_resumes(share, tmp_path):
    "It is stopped while answers are in use, which the checkpoint holds."
    options = dict(on_policy=share, rollout_steps=3, answer_tokens=16, loss_func_name="reverse_kl", gradient_accumulation_steps=2)
    found = same_after_interruption(tmp_path, max_steps=5, **options)
    wrote = found.history.rollout_tokens
    assert wrote.notna().tolist() == [True, False, False, True, False]
    assert (found.history.rollout_nats.dropna() > 0).all()


def test_answers_that_serve_one_step_weigh_one(tmp_path):
    "Their prefixes are as likely as when they were written."
    config = small(tmp_path, on_policy=1.0, rollout_steps=1, answer_tokens=12, max_steps=1, eval_samples=0, save_merged=False)
    merger = Merger.from_config(config)
    trainer, _, _ = make_trainer(merger, prepare(config), progress=False)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    batch = batches[0]
    labels = shift_labels(batch["labels"], batch["attention_mask"])
    aligned = Batch(batch["input_ids"], batch["attention_mask"], labels, batch["source"], 1, old_log_probs=batch["old_log_probs"])
    weights = importance(aligned, label_log_probs(merger, aligned, trainer.objective, taught=False))
    torch.testing.assert_close(weights, torch.ones_like(weights), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(on_policy=0.5, answer_temperature=0.5), "rollout_steps=4 with answer_temperature=0.5"),
        (dict(on_policy=0.5, loss_func_name="entropy"), "nobody scores what the blend writes"),
        (dict(on_policy=0.5, train_mode="layerwise"), "train_mode='layerwise' with on_policy=0.5"),
        (dict(on_policy=0.5, shard=True), "shard=True with on_policy=0.5"),
        (dict(on_policy=1.5), "on_policy=1.5"),
        (dict(on_policy=0.5, loss_func_name="ce"), "nobody scores what the blend writes"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options)


def test_prompts_alone_say_what_they_are_for(tmp_path):
    with pytest.raises(ValueError, match="answers='components'"):
        prepare(small(tmp_path, dataset_configs=prompts_alone(tmp_path)))


def test_a_dry_run_says_what_components_write(tmp_path, capsys):
    alone = small(tmp_path, dataset_configs={}, answers="components", written_prompts=4, eval_samples=0, dry_run=True)
    show_result(run(alone))
    assert capsys.readouterr().out.startswith("4 prompts that each component writes for ")
    show_result(run(dataclasses.replace(alone, dataset_configs=prompts_alone(tmp_path))))
    assert re.match(r"\d+ prompts and 4 prompts that each component writes for ", capsys.readouterr().out)


def test_a_start_in_closed_form_is_not_the_average_and_a_run_resumes(tmp_path):
    options = dict(mask_init={"strategy": "least_squares", "rows": 8}, mode="vector_output", learning_rate=0.05)
    solved = same_after_interruption(tmp_path, **options)
    average = run(small(tmp_path / "average", **options | dict(mask_init={"strategy": "uniform"}, max_steps=1, eval_samples=0, held_out_rows=4, save_merged=False)), progress=False)
    assert solved.held_out["start"] != average.held_out["start"]
    starts = {name: torch.full_like(mask, 0.5) for name, mask in average.merger.mask_state().items()}
    assert any((mask - starts[name]).abs().max() > 0.2 for name, mask in solved.merger.mask_state().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mask_init={"strategy": "least_squares"}, constrain_mode="01"), "mask_init 'least_squares' with constrain_mode='01'"),
        (dict(mask_init={"strategy": "least_squares", "rows": 0}), "expected rows of 1 or more"),
        (dict(mask_init={"strategy": "least_squares", "ridge": 0.0}), "a ridge above 0"),
    ],
)
def test_a_start_in_closed_form_says_what_it_needs(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options)


def test_a_start_in_closed_form_says_where_there_is_nothing_to_solve():
    "GPT-2 stores its weights inputs x outputs."
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "source": source} for source in range(2)]
    with pytest.raises(ValueError, match="least squares: no masked linear weight"):
        solve_masks(Merger(tiny_experts("gpt2", n=2), MergerConfig()), rows)
