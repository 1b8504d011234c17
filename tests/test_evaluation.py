"""Evaluation: numbers against brute force, over architectures, batches and paddings."""

import math
import warnings

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from merge_lab import evaluation as ev
from merge_lab import scoring
from merge_lab.chat import (
    ChatCollator,
    chat_row,
    encode_chat,
    load_task,
    write_jsonl,
)
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model, tiny_tokenizer
from merge_lab.toy_corpus import make_mmlu

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
    settings = dict(
        do_sample=True,
        temperature=9.0,
        top_k=3,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=5,
        begin_suppress_tokens=list(range(100)),
        sequence_bias=[[[7], 50.0]],
        num_return_sequences=2,
        return_dict_in_generate=True,
        max_time=0.0,
    )
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert ev.generate_answers(model, tokenizer, rows, max_new_tokens=5) == plain
    assert model.generation_config.temperature == 9.0


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


def scaled_model(kind):
    "An architecture that multiplies or divides its logits."
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=0.1)).eval()
    return CohereForCausalLM(CohereConfig(**sizes, logit_scale=9.0)).eval()


def merger_of(folder, **options):
    paths = []
    for i, expert in enumerate(tiny_experts("qwen2", n=2)):
        save_tiny(expert, folder / str(i), tokenizer)
        paths.append(str(folder / str(i)))
    return Merger.from_config(MergerConfig(model_paths=paths, **options))


def peft_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():  # of PEFT's own
        warnings.simplefilter("ignore")
        return get_peft_model(tiny_model("llama", seed=3), config).eval()


models = {
    "llama": lambda folder: tiny_model("llama", seed=3),
    "gemma2": lambda folder: tiny_model("gemma2", seed=3, final_logit_softcapping=0.5),
    "gemma3": lambda folder: tiny_model("gemma3", seed=3),
    "gpt2": lambda folder: tiny_model("gpt2", seed=3),
    "granite": lambda folder: scaled_model("granite"),
    "cohere": lambda folder: scaled_model("cohere"),
    "merger": lambda folder: merger_of(folder, mode="vector_input"),
    "accurate merger": lambda folder: merger_of(folder, impl="accurate"),
    "peft": lambda folder: peft_model(),
}


@pytest.mark.parametrize("name", models)
def test_head_in_chunks_equals_plain_logits(name, tmp_path):
    model = models[name](tmp_path)
    encoded = [encode_chat(tokenizer, row["messages"]) for row in rows]
    with ev.scoring(model, encoded[0]["input_ids"]) as parts:
        assert not isinstance(parts.head, torch.nn.Identity), "the model ran whole"
    plain, said = zip(*(reference_nats(model, row) for row in rows))
    for options in ({}, dict(chunk_size=2), dict(max_tokens_per_batch=40)):
        nats, counts = ev.row_nats(model, encoded, ChatCollator(tokenizer), **options)
        assert counts.tolist() == list(said)
        assert nats.tolist() == pytest.approx(list(plain), rel=1e-5)
    if name == "merger":  # nothing of the blend is kept
        assert not model.state.keep_merged
        assert not any(leaf._merged for leaf in model.leaves().values())
        with model.as_component(1):
            nats, _ = ev.row_nats(model, encoded, ChatCollator(tokenizer))
            plain, _ = zip(*(reference_nats(model, row) for row in rows))
        assert nats.tolist() == pytest.approx(list(plain), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "merger", "granite"])
def test_bfloat16_models_are_cut_too(name, tmp_path):
    model = models[name](tmp_path).to(torch.bfloat16)
    encoded = [encode_chat(tokenizer, row["messages"]) for row in rows]
    with ev.scoring(model, encoded[0]["input_ids"]) as parts:
        assert not isinstance(parts.head, torch.nn.Identity)
    plain, _ = zip(*(reference_nats(model, row) for row in rows))
    nats, _ = ev.row_nats(model, encoded, ChatCollator(tokenizer))
    assert nats.tolist() == pytest.approx(list(plain), rel=2e-2)


class Largest(TorchDispatchMode):
    "The most numbers that any tensor holds."

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


@pytest.mark.parametrize("what", ["loss", "perplexity", "choice"])
def test_logits_of_a_batch_never_exist(what):
    vocabulary, length = 4000, 200
    model = tiny_model(vocab_size=vocabulary, tie_word_embeddings=False)
    row = dict(input_ids=[5] * length, labels=[-100] * (length - 20) + [5] * 20)
    with Largest() as largest:
        if what == "choice":
            with ev.tqdm(disable=True) as bar:
                asked = [([5] * (length - 1), [[3], [4], [6], [7]])] * 4
                ev.option_scores(model, ChatCollator(tokenizer), asked, 4, bar)
        elif what == "loss":
            ev.row_nats(model, [row] * 6, ChatCollator(tokenizer), chunk_size=16)
        else:
            ev.perplexity(model, tokenizer, "the cat saw it. " * 4)
    weights = vocabulary * model.config.hidden_size
    assert largest.numbers <= max(weights, 64 * vocabulary)
    assert largest.numbers < length * vocabulary


def test_logits_that_are_changed_on_the_way_are_seen(caplog):
    model = tiny_model(seed=3)

    def halve(module, args, output):
        output.logits = output.logits / 2
        return output

    model.register_forward_hook(halve)
    ev.warn_whole.cache_clear()
    encoded = [encode_chat(tokenizer, row["messages"]) for row in rows]
    for _ in range(2):
        nats, _ = ev.row_nats(model, encoded, ChatCollator(tokenizer))
    plain, _ = zip(*(reference_nats(model, row) for row in rows))
    assert nats.tolist() == pytest.approx(list(plain), rel=1e-5)
    said = [record.message for record in caplog.records if record.name == scoring.__name__]
    assert len(said) == 1 and "LlamaForCausalLM" in said[0]


@pytest.mark.parametrize("budget", [1, 37, 100, 10**6])
def test_batches_keep_to_the_budget(budget):
    lengths = [3, 40, 17, 17, 1, 99, 20] * 3
    batches = ev.length_batches(lengths, 5, budget)
    assert sorted(p for batch in batches for p in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= budget
        assert len(batch) <= 5
    assert budget != 10**6 or batches == ev.length_batches(lengths, 5)


def test_scores_and_answers_keep_to_the_budget():
    model, shapes = tiny_model(seed=1), []
    table = ev.evaluate_tasks(model, tokenizer, {"a": rows * 4}, progress=False)
    model.base_model.register_forward_hook(
        lambda module, args, options, output: shapes.append(options["input_ids"].shape),
        with_kwargs=True,
    )
    options = dict(max_tokens_per_batch=60, max_new_tokens=5)
    ev.evaluate_tasks(
        model, tokenizer, {"a": rows * 4}, metrics=["loss"], progress=False, **options
    )
    assert max(rows_of * length for rows_of, length in shapes) <= 60
    shapes.clear()
    ev.evaluate_tasks(
        model,
        tokenizer,
        {"a": rows * 4},
        metrics=["exact_match"],
        progress=False,
        **options,
    )
    first = [shape for shape in shapes if shape[1] > 1]
    assert (
        max(rows_of * (length + 5) for rows_of, length in first) <= 60
        and len(first) > 1
    )
    again = ev.evaluate_tasks(
        model, tokenizer, {"a": rows * 4}, progress=False, max_tokens_per_batch=60
    )
    pd.testing.assert_frame_equal(table, again, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_row_longer_than_the_model_is_one_clear_error(architecture, tmp_path):
    model = tiny_model(architecture, max_position_embeddings=32)
    long = chat_row("who saw it? " * 12, "the cat.")
    for where in ("row 2", r"long\.jsonl:2"):
        task = [rows[0], long]
        if "jsonl" in where:
            write_jsonl(tmp_path / "long.jsonl", task)
            task = load_task(tmp_path / "long.jsonl")
        for metric in ev.METRICS:
            with pytest.raises(
                ValueError, match=rf"{where}: .* tokens, and the model has 32 positions"
            ):
                ev.evaluate_tasks(
                    model, tokenizer, {"a": task}, metrics=[metric], progress=False
                )
    encoded = [encode_chat(tokenizer, row["messages"]) for row in task]
    with pytest.raises(ValueError, match="row 2: the row has"):
        ev.row_nats(model, encoded, ChatCollator(tokenizer))


def test_a_row_that_cannot_be_encoded_is_named():
    bad = chat_row("when?", "")
    speller = tiny_tokenizer(
        chat_template="{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="task 'a', row 2: "):
        ev.evaluate_tasks(
            tiny_model(),
            speller,
            {"a": [rows[0], bad]},
            metrics=["loss"],
            progress=False,
        )


def test_answers_near_the_end_of_the_positions_do_not_change_others():
    model = tiny_model("gpt2", seed=2, max_position_embeddings=24)
    lengths = [
        len(ev.template_ids(tokenizer, row["messages"][:1], add_generation_prompt=True))
        for row in rows
    ]
    room = 24 - sorted(lengths)[1]  # the longest prompt has less
    assert max(lengths) + room > 24
    together = ev.generate_answers(model, tokenizer, rows, max_new_tokens=room)
    alone = [
        ev.generate_answers(model, tokenizer, [row], max_new_tokens=room)[0]
        for row in rows
    ]
    longest = lengths.index(max(lengths))
    expected = [
        reference_answer(model, row, 24 - max(lengths) if i == longest else room)
        for i, row in enumerate(rows)
    ]
    assert together == alone == expected


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
    windows = ev.strided_windows(ids, 5)
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
    whole = [shape[0] for shape in seen if shape[1] > ev.CHECKED_TOKENS]
    assert sum(whole) == 1, "equal contexts are run once"
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
