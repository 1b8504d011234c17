"""The bundled data is what the generator makes, and labels are what the assistant says."""

import filecmp
import json

import pytest
import torch
from transformers import AutoTokenizer

from merge_lab.core import bundled_path
from merge_lab.tasks import (
    ChatCollator,
    answer_of,
    build_dataset,
    encode_chat,
    generate_tasks,
    load_mmlu,
    load_task,
    make_mmlu,
    make_tasks,
    task_tokenizer,
    tasks,
)
from merge_lab.tinylm import tiny_tokenizer

splits = ["train", "validation", "test"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_path("models/base"))


@pytest.fixture(scope="module")
def bundled():
    return {
        (task, split): load_task(bundled_path(f"tasks/{task}"), split)
        for task in tasks
        for split in splits
    }


def sentence(row):
    return row["messages"][0]["content"].split(": ", 1)[1]


def test_no_sentence_is_in_two_splits_or_tasks(bundled):
    sentences = [sentence(row) for rows in bundled.values() for row in rows]
    assert len(sentences) == 3 * (2000 + 100 + 200)
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize(("make", "name"), [(make_tasks, "tasks"), (make_mmlu, "mmlu")])
def test_generator_repeats_the_bundled_files_byte_for_byte(tmp_path, make, name):
    make(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    kept = sorted(
        path.relative_to(bundled_path(name)) for path in bundled_path(name).rglob("*.*")
    )
    assert made == kept
    for path in made:
        assert filecmp.cmp(tmp_path / path, bundled_path(name) / path, shallow=False), (
            path
        )


def test_another_seed_gives_other_sentences():
    sizes = {"test": 20}
    assert (
        generate_tasks(0, sizes) == generate_tasks(0, sizes) != generate_tasks(1, sizes)
    )


def test_bundled_tokenizer_is_the_one_the_recipe_makes(tokenizer):
    assert tokenizer.get_vocab() == task_tokenizer().get_vocab()
    assert tokenizer.chat_template == task_tokenizer().chat_template


def test_every_bundled_text_comes_back_from_the_tokenizer(bundled, tokenizer):
    for rows in bundled.values():
        for row in rows[:200]:
            for message in row["messages"]:
                ids = tokenizer(message["content"]).input_ids
                assert tokenizer.unk_token_id not in ids
                assert (
                    tokenizer.decode(ids, skip_special_tokens=True)
                    == message["content"]
                )


@pytest.mark.parametrize("template", ["marked", "prefixes"])
@pytest.mark.parametrize("pad", ["own", "end"])
def test_labels_decode_to_the_answer_and_its_end(bundled, template, pad):
    tokenizer = task_tokenizer()
    if template == "prefixes":
        for mark in ("{% generation %}", "{% endgeneration %}"):
            tokenizer.chat_template = tokenizer.chat_template.replace(mark, "")
    if pad == "end":
        tokenizer.pad_token = tokenizer.eos_token
    for (_, split), rows in bundled.items():
        for row in rows[:20]:
            encoded = encode_chat(tokenizer, row["messages"])
            learned = [label for label in encoded["labels"] if label != -100]
            assert learned[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(learned[:-1]) == answer_of(row)
            assert (
                encoded["labels"][-len(learned) :]
                == encoded["input_ids"][-len(learned) :]
            ), split


def test_end_is_learned_when_the_template_forgets_it():
    tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoded = encode_chat(
        tokenizer,
        [
            {"role": "user", "content": "who"},
            {"role": "assistant", "content": "the cat"},
        ],
    )
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"])[-3:] == [
        "the",
        "cat",
        "<eos>",
    ]
    assert [label != -100 for label in encoded["labels"]] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]


def test_template_that_rewrites_history_is_refused():
    tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}<{{ m.role }}>{% if loop.last %}the {% endif %}{{ m.content }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": role, "content": "cat"} for role in ("user", "assistant") * 2]
    with pytest.raises(ValueError, match="turn 1: the chat template renders"):
        encode_chat(tokenizer, turns)


def test_collator_pads_on_the_right_and_masks_by_length(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    try:
        rows = [
            {"input_ids": [1, 5, 2], "labels": [-100, 5, 2], "source": 1},
            {"input_ids": [1, 5, 9, 9, 2], "labels": [-100, -100, 9, 9, 2]},
        ]
        batch = ChatCollator(tokenizer, pad_to_multiple_of=4)(rows)
    finally:
        tokenizer.pad_token = "<pad>"
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3]
    assert batch["labels"][0].tolist() == [-100, 5, 2] + [-100] * 5
    assert batch["source"].tolist() == [1, 0]
    assert batch["source"].dtype == torch.long


def test_sources_are_positions_unless_given(tokenizer):
    paths = {str(bundled_path(f"tasks/{task}")): 4 for task in ("rewrite", "extract")}
    assert build_dataset(paths, tokenizer, "test")["source"] == [0] * 4 + [1] * 4
    assert (
        build_dataset(paths, tokenizer, "test", source_keys=[2, 0])["source"]
        == [2] * 4 + [0] * 4
    )
    with pytest.raises(ValueError, match="source_keys"):
        build_dataset(paths, tokenizer, "test", source_keys=[1])


def test_too_short_max_length_names_dataset_and_row(tokenizer):
    path = str(bundled_path("tasks/summarize"))
    with pytest.raises(
        ValueError, match=r"tasks/summarize \(test\), row 1: .*max_length=8"
    ):
        build_dataset({path: None}, tokenizer, "test", max_length=8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "got list"),
        ('{"text": "a"}', r"got keys \['text'\]"),
        ('{"messages": [{"role": "user"}]}', "'content'"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "empty"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    good = json.dumps({"messages": [{"role": "assistant", "content": "a"}]})
    (tmp_path / "x.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:3: .*{message}"):
        load_task(tmp_path / "x.jsonl")


def test_missing_dataset_says_what_to_check(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Check the path, or the name and the network"):
        load_task("no/such-dataset")


def test_multiple_choice_answers_are_right():
    from merge_lab.tasks import days, kinds, other_word

    same = {frozenset(pair) for pair in other_word.items()}
    loaded = load_mmlu(bundled_path("mmlu"))
    assert {subject: len(rows) for subject, rows in loaded.items()} == dict.fromkeys(
        loaded, 40
    )
    for row in loaded["synonyms"]:
        asked = row["question"].rstrip("?").split()[-1]
        right = [
            choice for choice in row["choices"] if frozenset((asked, choice)) in same
        ]
        assert right == [row["choices"][row["answer"]]]
    for row in loaded["calendar"]:
        *_, step, asked = row["question"].rstrip("?").split()
        expected = days[(days.index(asked) + (1 if step == "after" else -1)) % 7]
        assert (
            row["choices"].count(expected) == 1
            and row["choices"][row["answer"]] == expected
        )
    for row in loaded["odd_one_out"]:
        kind = [
            next(k for k, words in kinds.items() if choice in words)
            for choice in row["choices"]
        ]
        assert kind.count(kind[row["answer"]]) == 1 and len(set(kind)) == 2
    for row in loaded["word_kinds"]:
        kind = row["question"].rstrip("?").split()[-1]
        assert [choice in kinds[kind] for choice in row["choices"]].index(True) == row[
            "answer"
        ]
        assert sum(choice in kinds[kind] for choice in row["choices"]) == 1
