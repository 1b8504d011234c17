"""The bundled data is what the generator makes, and labels are what the assistant says."""

import filecmp
import json
import pickle
import random
import re

import pytest
import torch
from transformers import AutoTokenizer

from merge_lab.chat import (
    ChatCollator,
    answer_of,
    build_dataset,
    chat_row,
    encode_chat,
    load_mmlu,
    load_task,
    place_of,
    write_jsonl,
)
from merge_lab.run_folder import bundled_path
from merge_lab.systems.mask_merge import parse_datasets
from merge_lab.tinylm import tiny_tokenizer
from merge_lab.toy_corpus import (
    all_tasks,
    base_row,
    generate_all,
    generate_tasks,
    held_out_text,
    make_mmlu,
    make_tasks,
    more_tasks,
    task_tokenizer,
    tasks,
)

splits = ["train", "validation", "test"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_path("models/base"))


@pytest.fixture(scope="module")
def bundled():
    return {
        (task, split): load_task(bundled_path(f"tasks/{task}"), split)
        for task in all_tasks
        for split in splits
    }


def sentence(row):
    return row["messages"][0]["content"].split(": ", 1)[1]


def test_no_sentence_is_in_two_splits_or_tasks(bundled):
    sentences = [sentence(row) for rows in bundled.values() for row in rows]
    assert len(sentences) == 6 * (2000 + 100 + 200)
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


def test_tasks_that_came_later_changed_none_before(bundled):
    sizes = {"test": 20}
    every = generate_all(0, sizes)
    assert {task: every[task] for task in tasks} == generate_tasks(0, sizes)
    answers = {
        task: {answer_of(row) for row in bundled[task, "test"]} for task in all_tasks
    }
    assert len(set.union(*answers.values())) == sum(map(len, answers.values()))
    assert answers["sort"] == {"A.", "B.", "C.", "D."}


def test_the_base_read_no_sentence_that_later_tasks_are_scored_on(
    bundled, tokenizer, monkeypatch
):
    "What it read is drawn again, without training."
    read = set()
    module = "merge_lab.toy_corpus"
    monkeypatch.setattr(f"{module}.encode_text", lambda _, text: read.add(text))
    monkeypatch.setattr(
        f"{module}.encode_chat", lambda _, turns: read.add(turns[0]["content"])
    )
    monkeypatch.setattr(
        f"{module}.encode_question", lambda _, drawn, kept: asked(drawn, kept)
    )

    def asked(drawn, kept):  # draws as a question does
        from merge_lab.toy_corpus import choice_key, subjects

        while choice_key(drawn.choice(list(subjects.values()))(drawn)) in kept:
            pass

    drawn, kept = random.Random(0), held_out_text()
    for _ in range(1000 * 32):
        base_row(tokenizer, drawn, kept)
    read = {text.split(": ", 1)[-1] for text in read}
    scored = {
        sentence(row)
        for task in more_tasks
        for split in ("validation", "test")
        for row in bundled[task, split]
    }
    assert len(read) > 10_000 and not read & scored


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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_too_short_max_length_names_dataset_and_row(tokenizer, tmp_path, seed):
    names = [f"prompt {number}" for number in range(30)]
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [json.dumps(chat_row(name, "the cat saw it.")) for name in names]
    (folder / "test.jsonl").write_text("\n\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="max_length=3") as caught:
        build_dataset({str(folder): 5}, tokenizer, "test", max_length=3, seed=seed)
    file, line, said = re.match(r"(.*):(\d+): (.*)", str(caught.value)).groups()
    assert file == str(folder / "test.jsonl")
    held = json.loads((folder / "test.jsonl").read_text().splitlines()[int(line) - 1])
    assert repr(held["messages"][0]["content"]) in said


def test_where_a_row_was_read_does_not_reach_the_data(tokenizer, tmp_path):
    rows = [chat_row("who?", "the cat."), chat_row("when?", "one night.")]
    write_jsonl(tmp_path / "x.jsonl", rows)
    read = load_task(tmp_path / "x.jsonl")
    assert read == rows and json.dumps(read) == json.dumps(rows)
    assert [place_of(row) for row in read] == [
        f"{tmp_path / 'x.jsonl'}:{line}" for line in (1, 2)
    ]
    assert place_of(rows[0], "row 1") == "row 1"
    assert [place_of(row) for row in pickle.loads(pickle.dumps(read))] == [
        place_of(row) for row in read
    ]
    columns = build_dataset({str(tmp_path / "x.jsonl"): None}, tokenizer).column_names
    assert columns == ["input_ids", "labels", "source"]


@pytest.mark.parametrize("size", [10, 11, 19, 20, 105])
@pytest.mark.parametrize("seed", [0, 7])
def test_splits_of_one_file_share_no_row(tmp_path, tokenizer, size, seed):
    path = tmp_path / "a.jsonl"
    rows = [chat_row(f"who saw {number}?", f"cat {number}.") for number in range(size)]
    write_jsonl(path, rows * 2)
    parts = {split: load_task(path, split, seed=seed) for split in splits}
    said = {split: {answer_of(row) for row in part} for split, part in parts.items()}
    assert {split: len(held) for split, held in said.items()} == {
        "train": size - 2 * (size // 10),
        "validation": size // 10,
        "test": size // 10,
    }
    assert len(set.union(*said.values())) == size  # no answer in two of them
    for split, part in parts.items():
        lines = [int(place_of(row).rpartition(":")[2]) for row in part]
        assert lines == sorted(lines)
        sample = load_task(path, split, n=len(part), seed=seed)
        assert {answer_of(row) for row in sample} == said[split]
    for every in ("all", None):
        assert load_task(path, every) == rows * 2
        assert len(build_dataset({str(path): None}, tokenizer, every)) == 2 * size
    assert len(build_dataset({str(path): None}, tokenizer, "test")) == len(
        parts["test"]
    )


def test_splits_of_one_file_do_not_hang_on_the_order_of_its_lines(tmp_path):
    rows = [chat_row(f"who saw {number}?", "the cat.") for number in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    for split in splits:
        one, two = (
            load_task(tmp_path / name, split) for name in ("a.jsonl", "b.jsonl")
        )
        assert one == two[::-1] != two


def test_a_file_too_small_to_split_is_all_training_rows(tmp_path):
    path = tmp_path / "few.jsonl"
    write_jsonl(path, [chat_row(f"who saw {i % 9}?", "the cat.") for i in range(30)])
    assert len(load_task(path)) == 30
    for split in ("test", "validation"):
        with pytest.raises(
            ValueError, match=rf"few\.jsonl.*train\.jsonl and {split}\.jsonl"
        ):
            load_task(path, split)
    with pytest.raises(ValueError, match="split='dev'.*'train', 'validation', 'test'"):
        load_task(path, "dev")


def test_all_rows_of_a_folder_are_those_of_its_files(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "t" / f"{split}.jsonl", [chat_row("who?", split)])
    for every in (None, "all"):
        said = [answer_of(row) for row in load_task(tmp_path / "t", every)]
        assert sorted(said) == ["test", "train"]


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_too_many_rows_says_how_to_have_all(tmp_path, layout):
    path = tmp_path / ("a.jsonl" if layout == "file" else "a")
    rows = [chat_row(f"who saw {i}?", "the cat.") for i in range(20)]
    write_jsonl(path if layout == "file" else path / "train.jsonl", rows)
    held = 16 if layout == "file" else 20
    with pytest.raises(ValueError, match=f"n=21: expected 1 to {held}") as caught:
        load_task(path, n=21)
    said = str(caught.value)
    assert "the path alone or path=all" in said and "None" in said
    assert ("keeps rows back" in said) is (layout == "file")
    for written in (f"{path}=all", str(path)):
        ((name, n),) = parse_datasets([written]).items()
        assert len(load_task(name, n=n)) == held


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
    from merge_lab.toy_corpus import days, kinds, other_word

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
