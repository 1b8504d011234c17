"""Evaluation: numbers against brute force, over architectures, batches and paddings."""

import math
import warnings

import pandas as pd
import pytest
import torch

from merge_lab import evaluation as ev
from merge_lab.merger import Merger, MergerConfig
from merge_lab.tasks import ChatCollator, chat_row, encode_chat, make_mmlu
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model, tiny_tokenizer

architectures = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]
tokenizer = tiny_tokenizer()
rows = [
    chat_row("who saw it?", "the cat."),
    chat_row("when?", "one night, the cat saw it."),
    chat_row("who saw the cat one night? when?", "it."),
]


@pytest.fixture(autouse=True)
def no_deprecations():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield


def reference_nats(model, row):
    "One row, one loop over its tokens."
    encoded = encode_chat(tokenizer, row["messages"])
    ids, labels = encoded["input_ids"], encoded["labels"]
    with torch.no_grad():
        said = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    scored = [t for t in range(1, len(ids)) if labels[t] != -100]
    return -sum(said[t - 1, ids[t]].item() for t in scored), len(scored)


def reference_answer(model, row, room):
    "Greedy decoding without padding, batch or cache."
    prompt = ev.template_ids(tokenizer, row["messages"][:1], add_generation_prompt=True)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(room):
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", architectures)
def test_loss_and_answers_equal_brute_force(architecture):
    model = tiny_model(architecture, seed=3)
    scores = ev.evaluate_tasks(model, tokenizer, {"a": rows}, progress=False)
    nats, counts = zip(*(reference_nats(model, row) for row in rows))
    assert scores.loc["a", "loss"] == pytest.approx(sum(nats) / sum(counts), rel=1e-5)
    assert scores.loc["a", "perplexity"] == pytest.approx(
        math.exp(scores.loc["a", "loss"])
    )
    answers = ev.generate_answers(model, tokenizer, rows, max_new_tokens=6)
    assert answers == [reference_answer(model, row, 6) for row in rows]


def test_batch_size_and_order_change_nothing():
    model = tiny_model(seed=1)
    one, many = (
        ev.evaluate_tasks(
            model, tokenizer, {"a": order}, batch_size=size, progress=False
        )
        for order, size in ((rows, 1), (rows[::-1], 8))
    )
    pd.testing.assert_frame_equal(one, many, rtol=1e-5)


def test_answers_are_greedy_whatever_the_model_prefers():
    model = tiny_model(seed=2)
    plain = ev.generate_answers(model, tokenizer, rows, max_new_tokens=5)
    settings = dict(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert ev.generate_answers(model, tokenizer, rows, max_new_tokens=5) == plain


def test_answers_stop_at_any_end_token():
    model = tiny_model(seed=2)
    free = ev.generate_answers(model, tokenizer, rows[:1], max_new_tokens=6)[0]
    stop = tokenizer(free, add_special_tokens=False)["input_ids"][2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    assert stop in ev.end_tokens(model, tokenizer)
    ended = ev.generate_answers(model, tokenizer, rows[:1], max_new_tokens=6)[0]
    assert len(ended) < len(free) and free.startswith(ended)


def test_exact_match_counts_stripped_answers():
    model = tiny_model(seed=4)
    said = ev.generate_answers(model, tokenizer, rows, max_new_tokens=5)
    mine = [
        chat_row(row["messages"][0]["content"], f" {a} \n")
        for row, a in zip(rows, said)
    ]
    scores = ev.evaluate_tasks(
        model,
        tokenizer,
        {"mine": mine, "mixed": [mine[0], *rows[1:]]},
        max_new_tokens=5,
        metrics=["exact_match"],
        progress=False,
    )
    assert scores["exact_match"].tolist() == [1.0, 1 / 3]
    assert list(scores.columns) == ["n", "exact_match"] and scores["n"].tolist() == [
        3,
        3,
    ]


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_come_back(training):
    model = tiny_model().train(training)
    ev.evaluate_tasks(model, tokenizer, {"a": rows}, progress=False)
    assert model.training is training and torch.is_grad_enabled()


def test_not_a_number_is_an_error_that_names_the_task():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="task 'broken': the loss is nan"):
        ev.evaluate_tasks(model, tokenizer, {"broken": rows}, progress=False)


def test_a_merger_scores_as_the_component_it_is(tmp_path):
    paths = []
    experts = tiny_experts("llama", n=2)
    for i, expert in enumerate(experts):
        save_tiny(expert, tmp_path / str(i), tokenizer)
        paths.append(str(tmp_path / str(i)))
    init = {"strategy": "odd_one_out", "selected_idx": 1}
    config = MergerConfig(model_paths=paths, mask_init=init, constrain_mode="identity")
    merger = Merger.from_config(config)
    tasks = {"a": rows}
    table = ev.evaluate_models(
        {"merger": merger, "expert": experts[1]}, tokenizer, tasks
    )
    merged, expert = (
        table[table["model"] == name].drop(columns="model")
        for name in ("merger", "expert")
    )
    pd.testing.assert_frame_equal(merged, expert.set_index(merged.index), rtol=1e-5)
    assert ev.end_tokens(merger, tokenizer) == ev.end_tokens(experts[1], tokenizer)


def test_models_are_loaded_one_by_one():
    log = []

    def loader(name):
        def load():
            log.append(name)
            return tiny_model(seed=len(log))

        return load

    tasks = {"a": rows, "b": rows[:1]}
    models = {
        "first": loader("first"),
        "second": loader("second"),
        "held": tiny_model(),
    }
    table = ev.evaluate_models(
        models, tokenizer, tasks, metrics=["loss"], progress=False
    )
    assert log == ["first", "second"]
    assert list(table.columns) == ["model", "task", "n", "loss", "perplexity"]
    assert list(zip(table["model"], table["task"])) == [
        (model, task) for model in models for task in tasks
    ]


def test_bad_tasks_are_named():
    model = tiny_model()
    for tasks, error, text in [
        ({}, ValueError, "at least one task"),
        ([rows], TypeError, "expected a dict"),
        ({"empty": []}, ValueError, "'empty' has no rows"),
        (
            {"mute": [{"messages": rows[0]["messages"][:1]}]},
            ValueError,
            "'mute', row 1",
        ),
    ]:
        with pytest.raises(error, match=text):
            ev.evaluate_tasks(model, tokenizer, tasks, progress=False)
    with pytest.raises(ValueError, match="at least one model"):
        ev.evaluate_models({}, tokenizer, {"a": rows})


def test_confusion_counts_manners_and_splits_ties():
    model = tiny_model(seed=5)
    tasks = {"a": rows[:2], "b": rows[2:]}
    said = ev.generate_answers(model, tokenizer, rows, max_new_tokens=6)
    nothing = ["zzz zzz zzz"] * 3
    options = dict(max_new_tokens=6, progress=False)
    table = ev.confusion(
        model, tokenizer, tasks, {"own": model, "strange": nothing}, **options
    )
    assert table["own"].tolist() == [1.0, 1.0] and list(table.index) == ["a", "b"]
    table = ev.confusion(model, tokenizer, tasks, {"one": said, "two": said}, **options)
    assert table.to_numpy().tolist() == [[0.5, 0.5, 0.0]] * 2
    half = {"one": [said[0], "zzz", "zzz"], "two": ["zzz", said[1], "zzz"]}
    table = ev.confusion(model, tokenizer, tasks, half, **options)
    assert table.to_numpy().tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match="none called 'other'"):
        ev.confusion(model, tokenizer, tasks, {"other": said}, **options)


@pytest.mark.parametrize("names", [("a", "b"), ("own", "strange")])
def test_confusion_when_tasks_and_manners_share_names(names):
    model = tiny_model(seed=5)
    said = ev.generate_answers(model, tokenizer, rows, max_new_tokens=6)
    references = {names[0]: said, names[1]: ["zzz"] * 3}
    tasks = {"a": rows[:2], "b": rows[2:]}
    table = ev.confusion(
        model, tokenizer, tasks, references, max_new_tokens=6, progress=False
    )
    assert table.to_numpy().tolist() == [[1.0, 0.0, 0.0]] * 2


def test_perplexity_scores_every_token_but_the_first_once():
    model = tiny_model(seed=6)
    text = "the cat saw it one night . who saw the cat ?"
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        said = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = [-said[t - 1, ids[t]].item() for t in range(1, len(ids))]
    expected = math.exp(sum(nats) / len(nats))
    assert ev.perplexity(model, tokenizer, text) == pytest.approx(expected, rel=1e-5)
    twice = ev.perplexity(model, tokenizer, [text, text, ""], batch_size=1)
    assert twice == pytest.approx(expected, rel=1e-5)
    windows = ev.text_windows(ids, 5)
    context = [
        model(input_ids=torch.tensor([w["input_ids"]]))
        .logits[0]
        .double()
        .log_softmax(-1)
        for w in windows
    ]
    nats = [
        -said[t - 1, w["input_ids"][t]].item()
        for w, said in zip(windows, context)
        for t in range(1, len(w["input_ids"]))
    ]
    assert len(nats) == len(ids) - 1
    expected = math.exp(sum(nats) / len(nats))
    assert ev.perplexity(model, tokenizer, text, 5) == pytest.approx(expected, rel=1e-5)


class Joining:
    "A tokenizer of characters in which ': A' is one token and ' B' two."

    eos_token_id = 0
    pad_token_id = 0

    def __call__(self, text, **options):
        text = text.replace(": A", "\x01")
        return {"input_ids": [ord(c) % 61 + 2 if c != "\x01" else 1 for c in text]}


@pytest.mark.parametrize(
    "words", [["who", "when"], ["the", "the cat", "the cat saw it"]]
)
def test_options_are_ranked_by_the_likelihood_of_the_whole_text(words):
    model = tiny_model("gpt2", seed=7)
    for kind in (tokenizer, Joining()):
        options = [f" {word}" for word in (words if kind is tokenizer else "ABCD")]
        question = ev.option_tails(kind, "the cat saw it. Answer:", options)
        with ev.tqdm(disable=True) as bar:
            (scores,) = ev.option_scores(model, ChatCollator(kind), [question], 2, bar)
        whole = []
        for option in options:
            ids = kind("the cat saw it. Answer:" + option)["input_ids"]
            with torch.no_grad():
                said = (
                    model(input_ids=torch.tensor([ids]))
                    .logits[0]
                    .double()
                    .log_softmax(-1)
                )
            whole.append(sum(said[t - 1, ids[t]].item() for t in range(1, len(ids))))
        gaps = [score - total for score, total in zip(scores, whole)]
        assert max(gaps) - min(gaps) < 1e-4


def test_multiple_choice_is_perfect_for_a_model_that_knows(tmp_path):
    words = [*"ABCD", "Answer", "Which"]
    speller = tiny_tokenizer(words)
    ids = speller.convert_tokens_to_ids(list("ABCD"))
    for split, answers in (("dev", "AB"), ("test", "CCDC")):
        (tmp_path / split).mkdir()
        lines = [f"Which?,one,two,three,four,{letter}\n" for letter in answers]
        (tmp_path / split / f"law_{split}.csv").write_text("".join(lines))
    model = tiny_model(vocab_size=len(speller), tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    seen = []

    def always_c(module, args, output):
        output.logits[..., ids[2]] = 9.0
        seen.append(output.logits.shape[:2])
        return output

    model.register_forward_hook(always_c)
    table = ev.multiple_choice(model, speller, tmp_path, n_shot=2, progress=False)
    assert table.loc["law"].tolist() == [4, 0.75]
    assert sum(shape[0] for shape in seen) == 1, "equal contexts are run once"
    with pytest.raises(ValueError, match="n_shot=5 asked for"):
        ev.multiple_choice(model, speller, tmp_path, progress=False)


def test_examples_are_dropped_until_the_question_fits(tmp_path):
    make_mmlu(tmp_path)
    row, *examples = ev.load_mmlu(tmp_path, "dev")["calendar"]
    length = {
        count: len(
            tokenizer(
                ev.choice_prompt("calendar", row, examples[:count], "letter", ev.INTRO)
            )["input_ids"]
        )
        for count in range(5)
    }
    speller = tiny_tokenizer([*"ABCD"])
    shared, _ = ev.fit_question(
        speller, "calendar", row, examples, "letter", ev.INTRO, length[2] + 1
    )
    assert len(shared) == length[2]
    with pytest.raises(ValueError, match="does not fit"):
        ev.fit_question(speller, "calendar", row, examples, "letter", ev.INTRO, 5)
