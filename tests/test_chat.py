"""One reader: every shape of row, in every format of file, by every system that reads rows; and what is refused, with file and line."""

import csv
import datetime
import decimal
import json
import logging

import pandas as pd
import pyarrow
import pytest
from datasets import Dataset

from merge_lab import chat
from merge_lab.calibration import calibration_split, text_paragraphs
from merge_lab.chat import ChatCollator, build_dataset, encode_chat, has_split, hold_out, load_mmlu, load_task, template_ids
from merge_lab.chat_templates import chat_tokenizer
from merge_lab.conversations import answer_of, chat_row, prompt_row, question_of
from merge_lab.rollouts import answer_ends
from merge_lab.evaluation import end_tokens, generate_answers, load_tests, prompt_ids
from merge_lab.sft_data import add_task_prefix, encode_rows, longest_row, mix_tasks, prepare_dataset
from merge_lab.systems.layer_merge import LayerMergeConfig, prepare
from merge_lab.systems.mask_merge import parse_datasets
from merge_lab.teacher_dataset import DAMTopkConfig, encoded_rows, row_stamps
from merge_lab.text_windows import read_documents
from merge_lab.tinylm import tiny_model, tiny_tokenizer

ASKED, SAID = "who saw it?", "the cat."
TURNS = chat_row(ASKED, SAID)["messages"]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
LATE = {"type": "function", "function": {"name": "find", "arguments": {"in": "house", "deep": [1]}}}
SHAPES = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "alpaca hub": {"instruction": ASKED, "input": "", "output": SAID, "text": f"### {ASKED}\n### {SAID}"},
    "prompt and completion": {"prompt": ASKED, "completion": SAID},
    "messages of both": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "preference": {"prompt": ASKED, "chosen": SAID, "rejected": "no."},
    "whole preference": {"prompt": ASKED, "chosen": TURNS, "rejected": TURNS[:1]},
    "parts": {"messages": [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in TURNS]},
    "with an id": {"id": 7, "source": "here", "question": ASKED, "answer": SAID, "day": "2024-05-01"},
}
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ m.content or '' }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path, records, encoding="utf-8"):
    "A file of records in the format that its ending says; what a table cannot hold is JSON in it."
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix
    if kind == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    elif kind in (".csv", ".tsv"):
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()} for record in records]
        with open(path, "w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, list(cells[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(cells)
    else:
        text = json.dumps(records) if kind == ".json" else "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(text, encoding=encoding)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def read_by_every_system(path, tokenizer):
    "Ids of the first row as each system learns them."
    dam = DAMTopkConfig(dataset_names=[str(path)], split="train")
    windows, _ = calibration_split(tokenizer, path, 1, 0)
    return {
        "mask-merge and lora-merge": build_dataset({str(path): None}, tokenizer)[0]["input_ids"],
        "dam": encoded_rows(dam, 0, tokenizer)[0]["input_ids"],
        "lora": encode_rows(prepare_dataset(str(path)), tokenizer)[0]["input_ids"],
        "layer-merge": windows[0]["input_ids"],
        "evaluation": encode_chat(tokenizer, load_tests([path], "train")[path.stem if path.suffix else path.name][0])["input_ids"]
        if path.is_dir() else encode_chat(tokenizer, next(iter(load_tests([path], "train").values()))[0])["input_ids"],
        "router": tokenizer(read_documents(str(path), "train", tokenizer)[0], add_special_tokens=False)["input_ids"],
    }


def test_rows_are_encoded_and_numbered_by_one_function():
    "Whoever encodes them: a run of merges, or one of fine-tuning."
    tokenizer = tiny_tokenizer()
    rows = [{"messages": [{"role": "user", "content": "who saw it?"}, {"role": "assistant", "content": "the cat."}]}] * 2
    merged, tuned = chat.encode_rows(tokenizer, rows, 1), encode_rows(Dataset.from_list(rows), tokenizer)
    assert [{**row, "source": 1} for row in tuned] == merged
    rows[1] = {"messages": [{"role": "user", "content": "who saw it?" * 4}, rows[0]["messages"][1]]}
    for encode in (lambda: chat.encode_rows(tokenizer, rows, 1, 9), lambda: encode_rows(Dataset.from_list(rows), tokenizer, 9)):
        with pytest.raises(ValueError, match="^row 2: conversation"):
            encode()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_format_is_the_same_row_to_every_system(tmp_path, tokenizer, shape, kind):
    wanted = encode_chat(tokenizer, TURNS)["input_ids"]
    for path in (write(tmp_path / f"rows.{kind}", [SHAPES[shape]] * 2), write(tmp_path / "task" / f"train.{kind}", [SHAPES[shape]] * 2).parent):
        assert load_task(path) == [{"messages": TURNS}] * 2
        for system, found in read_by_every_system(path, tokenizer).items():
            assert found == wanted, system


@pytest.mark.parametrize("kind", FORMATS)
def test_plain_text_is_text_to_those_who_learn_text_and_refused_by_the_others(tmp_path, tokenizer, kind):
    said = ["NA", "None", "2024-05-01", "the cat."]
    path = write(tmp_path / f"rows.{kind}", [{"text": text} for text in said])
    assert prepare_dataset(path)["text"] == said
    assert read_documents(str(path), "train", tokenizer) == said
    assert len(calibration_split(tokenizer, path, 9, 0)[0]) == 4
    with pytest.raises(ValueError, match=r"rows\.\w+(:\d|, row 1): .*lora, layer-merge and the router"):
        load_task(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_system_input_and_tools_are_learned(tmp_path, tokenizer, kind):
    record = {"system": "be brief.", "instruction": "who saw it?", "input": "the old house", "output": SAID}
    rows = load_task(write(tmp_path / f"a.{kind}", [record]))
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert "who saw it?" in rows[0]["messages"][1]["content"] and "the old house" in rows[0]["messages"][1]["content"]
    talk = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "one cat."}, TURNS[1]]
    path, tools = tmp_path / f"t.{kind}", [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    if kind == "parquet":
        tools = json.dumps(tools)  # an object without keys is nothing that Parquet can hold
    write(path, [{"messages": talk, "tools": tools}] * 2)
    knows = tiny_tokenizer(chat_template=TOOL_TEMPLATE)
    tools = json.loads(tools) if isinstance(tools, str) else tools
    wanted = knows.apply_chat_template(talk, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert build_dataset({str(path): None}, knows)[0]["input_ids"] == wanted
    assert encode_rows(prepare_dataset(path), knows)[0]["input_ids"] == wanted
    asked = knows.apply_chat_template(talk[:3], tools=tools, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert prompt_ids(knows, load_task(path)[0], "") == asked["input_ids"]
    with pytest.raises(ValueError, match=r"t\.\w+.*no place for 'tools', 'tool_calls'"):
        build_dataset({str(path): None}, tokenizer)


def test_calls_that_come_late_and_differ_stay_what_they_were(tmp_path):
    calls = [{"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in (CALL, LATE)]
    rows = [{"messages": TURNS}] * 300 + calls
    path = write(tmp_path / "late.jsonl", rows)
    for rows in (load_task(path, None), [json.loads(row) for row in prepare_dataset(path)["conversation"]]):
        assert [row["messages"][1]["tool_calls"] for row in rows[-2:]] == [[CALL], [LATE]]
    mixed = mix_tasks({"a": prepare_dataset(path), "b": add_task_prefix(prepare_dataset(path), "x")}, prefix=False)
    again = prepare_dataset(mixed)
    assert len(again) == 604 and sum(LATE in row["messages"][1].get("tool_calls", []) for row in map(json.loads, again["conversation"])) == 2
    assert str(path) in again[0]["where"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_encodings_of_files(tmp_path, encoding, kind):
    assert load_task(write(tmp_path / f"a.{kind}", [SHAPES["alpaca"]], encoding)) == [{"messages": TURNS}]


REFUSED = {
    "an empty answer": ({"prompt": "q", "completion": " "}, "not empty"),
    "an empty turn": ({"messages": [*TURNS, {"role": "user", "content": "and?"}, {"role": "assistant", "content": ""}]}, "assistant turn is empty"),
    "an empty question": ({"messages": [*TURNS, {"role": "user", "content": " "}, TURNS[1]]}, "user turn is empty"),
    "an empty question of ShareGPT": ({"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": SAID}]}, "user turn is empty"),
    "an empty question before": ({"history": [["", SAID]], "prompt": "q", "completion": "a"}, "user turn is empty"),
    "null": ({"messages": [{"role": "user", "content": None}, TURNS[1]]}, "null"),
    "a number": ({"messages": [TURNS[0], {"role": "assistant", "content": 7}]}, "int 7"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"}]}, TURNS[1]]}, "type 'image'"),
    "no answer": ({"messages": TURNS[:1]}, "no assistant turn"),
    "a speaker": ({"conversations": [{"from": "narrator", "value": "once."}, {"from": "gpt", "value": SAID}]}, "narrator"),
    "system twice": ({"system": "a", "messages": [{"role": "system", "content": "b"}, *TURNS]}, "two system prompts"),
    "another column": ({"messages": TURNS, "context": "the old house"}, "'context' would be lost"),
    "images": ({"prompt": "q", "completion": "a", "images": ["cat.png"]}, "'images' would be lost"),
    "a bad answer": ({"prompt": "q", "completion": "a", "label": False}, "label=false"),
    "unlearned": ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "weight=0"),
    "python": ({"messages": str(TURNS)}, "no JSON"),
    "chosen alone": ({"chosen": "H: q A: a", "rejected": "no"}, "no 'prompt'"),
    "no columns": ({"a": "b"}, r"got keys \['a'\]|expected one of 'messages', 'a'|'text'"),
    "half a pair": ({"prompt": "\ud83d", "completion": "a"}, "surrogate"),
    "half a pair in a call": ({"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "\ud83d"}]}]}, "surrogate"),
    "half a pair in a tool": ({"messages": TURNS, "tools": [{"name": "\ud83d"}]}, "surrogate"),
    "a bad answer in a table": ({"prompt": "q", "completion": "a", "label": "False"}, "label=false"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("reader", [load_task, prepare_dataset], ids=["tasks", "lora"])
def test_bad_rows_are_refused_with_file_and_line(tmp_path, what, reader):
    record, message = REFUSED[what]
    path = write(tmp_path / "bad.jsonl", [SHAPES["messages"], SHAPES["messages"], record])
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: .*({message}|among conversations)"):
        reader(path)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"messages": [}\n', "a.jsonl", r"a\.jsonl:1: not JSON"),
        ("question,answer\nq,a,b\n", "a.csv", r"a\.csv:2: 3 cells"),
        ('question,answer\nq,"a\n', "a.csv", r"a\.csv:2: not CSV"),
        ("question;answer\nq;a\n", "a.csv", r"a\.csv:2: .*question;answer"),
        ("PAR1", "a.parquet", r"a\.parquet: not a Parquet file"),
        ("", "a.json", r"a\.json: no rows"),
        ("q", "a.xlsx", r"file type='\.xlsx'"),
        ("question,answer\n", "a.csv", r"a\.csv: no rows"),
        ("\ufeff\n", "a.jsonl", r"a\.jsonl: no rows"),
        ('{"question": "q", "answer": "a"}\n{"question": "q", "question": "p", "answer": "a"}', "a.jsonl", r"a\.jsonl:2: not JSON \(key 'question' stands twice"),
        ('[{"messages":\n[{"role": "user", "role": "user"}]}]', "a.json", r"a\.json:1: not JSON \(key 'role' stands twice"),
        ('messages\n"[{""role"": ""user"", ""role"": ""user""}]"', "a.csv", r"a\.csv:2: 'messages' .*key 'role' stands twice"),
        ('[{"question": "q", "answer": "a"},\n{"question": "p", "answer": "b"}', "a.json", r"a\.json:2: not JSON \(the array does not end"),
        ("[" * 100_000, "a.jsonl", r"a\.jsonl:1: not JSON \(maximum recursion"),
        ('{"question": "q", "answer": "a", "n": ' + "1" * 5000 + "}", "a.jsonl", r"a\.jsonl:1: not JSON \(Exceeds the limit"),
        ("\x1f\u008b", "a.jsonl", r"a\.jsonl: packed \(gzip\), and not whole"),
        ("PK\x03\x04", "a.jsonl", r"a\.jsonl: the file is packed \(zip\)"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, name, message):
    (tmp_path / name).write_text(text, encoding="latin-1" if "\x1f" in text else "utf-8")
    for read in (load_task, prepare_dataset):
        with pytest.raises(ValueError, match=rf"{message}|text_field='text'" if "question;answer" in text else message):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": who, "value": t["content"], "role": None, "content": None, "tool_calls": "null"} for who, t in zip(("human", "gpt"), TURNS)],
        [{**t, "from": None, "value": None, "tool_calls": "[]"} for t in TURNS],
        [{"role": t["role"], "content": [{"type": None, "text": t["content"], "image_url": None}]} for t in TURNS],
        [{"role": t["role"], "content": [{"type": "text", "text": word} for word in t["content"].partition(" ")]} for t in TURNS],
    ],
    ids=["both layouts", "the other one empty", "a part without a type", "parts of a text"],
)
def test_what_is_null_is_not_there(tmp_path, tokenizer, turns):
    path = write(tmp_path / "a.jsonl", [{"conversations": turns, "tools": "null", "system": None, "context": " "}] * 2)
    assert load_task(path) == [{"messages": TURNS}] * 2
    wanted = encode_chat(tokenizer, TURNS)["input_ids"]
    assert all(found == wanted for found in read_by_every_system(path, tokenizer).values())


def test_what_typed_tables_hold_beside_the_text_is_json_or_refused(tmp_path, tokenizer):
    noon = datetime.datetime(2024, 5, 1, 12)
    call = {"type": "function", "function": {"name": "look", "arguments": {"on": noon, "deep": [noon.date()]}}}
    dated = write(tmp_path / "a.parquet", [{"messages": [{**t, "sent": noon} for t in TURNS]}] * 2)
    assert load_task(dated)[0]["messages"][1] == {**TURNS[1], "sent": "2024-05-01T12:00:00"}
    wanted = encode_chat(tokenizer, TURNS)["input_ids"]
    assert all(found == wanted for found in read_by_every_system(dated, tokenizer).values())
    called = write(tmp_path / "b.parquet", [{"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}] * 2)
    assert '"on": "2024-05-01T12:00:00", "deep": ["2024-05-01"]' in read_documents(str(called), "train", tiny_tokenizer(chat_template=TOOL_TEMPLATE))[0].replace("\\", "")
    for name, odd in (("c", b"PNG"), ("d", decimal.Decimal("1.5"))):
        path = write(tmp_path / f"{name}.parquet", [{"messages": [{**t, "extra": odd} for t in TURNS]}])
        for read in (load_task, prepare_dataset):
            with pytest.raises(ValueError, match=rf"{name}\.parquet, row 1: a message or a tool holds"):
                read(path)


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_rows_are_held_out_by_any_usual_name(tmp_path, tokenizer, name):
    write(tmp_path / "train.jsonl", [chat_row(f"q {i}", "a") for i in range(20)])
    held = write(tmp_path / f"{name}.jsonl", [SHAPES["messages"]] * 3)
    write(tmp_path / "eval.jsonl", [chat_row("and this?", "a")])
    assert has_split(tmp_path) and len(load_task(tmp_path, "validation")) == len(load_task(tmp_path, name)) == 3
    train = build_dataset({str(tmp_path): None}, tokenizer)
    left, rows = hold_out(train, {str(tmp_path): None}, tokenizer)
    assert len(left) == 20 and [row["input_ids"] for row in rows] == [encode_chat(tokenizer, TURNS)["input_ids"]] * 3
    assert len(calibration_split(tokenizer, tmp_path, 30, 8)[1]) == 3 and len(load_tests([tmp_path], "test")[tmp_path.name]) == 1
    assert set(row_stamps(str(tmp_path), "validation")) == {held.name}


def test_of_two_names_of_a_split_the_usual_one_is_read_and_the_other_is_named(tmp_path, caplog):
    for name in ("train", "dev", "val", "validation"):  # each wins over the ones before
        write(tmp_path / f"{name}.jsonl", [chat_row("whose rows?", name)])
        assert has_split(tmp_path) == (name != "train")
        assert load_task(tmp_path, "train" if name == "train" else "validation")[0]["messages"][1]["content"] == name
        assert [f"'{name}' and '{other}' are two names of the validation split" in caplog.text for other in ("val", "dev")] == [
            name == "validation", name in ("val", "validation"),
        ]  # fmt: skip
        assert load_task(tmp_path, name)[0]["messages"][1]["content"] == name
    caplog.clear()
    for name in ("dev", "val"):
        (tmp_path / f"{name}.jsonl").write_bytes((tmp_path / "validation.jsonl").read_bytes())
    assert load_task(tmp_path, "validation") and not caplog.records


def pack(path, packing):
    data, target = path.read_bytes(), path.with_name(f"{path.name}.{packing}")
    with pyarrow.output_stream(target, compression={"gz": "gzip", "zst": "zstd"}[packing]) as stream:
        stream.write(data)
    path.unlink()
    return target


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_packed_files_are_read_as_they_are(tmp_path, tokenizer, kind, packing):
    wanted = encode_chat(tokenizer, TURNS)["input_ids"]
    for part in ("train-00000-of-00002", "train-00001-of-00002"):
        path = pack(write(tmp_path / f"{part}.{kind}", [SHAPES["alpaca"]] * 2), packing)
    for source, n in ((path, 2), (tmp_path, 4)):
        assert len(load_task(source)) == n
        assert all(found == wanted for found in read_by_every_system(source, tokenizer).values())
    path.write_bytes(path.read_bytes()[:-12])
    for read in (load_task, prepare_dataset):
        with pytest.raises(ValueError, match=rf"{path.name}: packed .*not whole"):
            read(path)


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_bad_row_of_a_packed_file_has_its_line(tmp_path, packing):
    bad = pack(write(tmp_path / "bad.jsonl", [SHAPES["messages"], {"messages": TURNS[:1]}]), packing)
    text = tmp_path / "bad.csv"
    text.write_text("question,answer\nq,a\nq,a,b\n")
    for path, line in ((bad, 2), (pack(text, packing), 3)):
        for read in (load_task, prepare_dataset):
            with pytest.raises(ValueError, match=rf"{path.name}:{line}: "):
                read(path)


def test_an_empty_system_turn_is_the_templates_to_read(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "system", "content": ""}, *TURNS]}])
    assert load_task(path)[0]["messages"] == [{"role": "system", "content": ""}, *TURNS]
    usual = "{% if messages[0].role != 'system' %}<system>the template's own{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert "own" not in tiny_tokenizer(chat_template=usual).apply_chat_template(load_task(path)[0]["messages"], tokenize=False)


def test_a_folder_is_the_same_to_every_system(tmp_path, tokenizer):
    for kind in ("csv", "json", "parquet"):
        folder = write(tmp_path / kind / f"train.{kind}", [SHAPES["alpaca"]] * 2).parent
        (folder / "README.txt").write_text("what this is.")
        (folder / "._train.jsonl").write_bytes(b"\0\5\x16\7")
        wanted = encode_chat(tokenizer, TURNS)["input_ids"]
        assert all(found == wanted for found in read_by_every_system(folder, tokenizer).values())
    (tmp_path / "csv" / "test.jsonl.xz").write_bytes(b"\xfd7zXZ")
    for read in (load_task, prepare_dataset, lambda path: calibration_split(tokenizer, path, 1, 0), lambda path: read_documents(str(path), "train", tokenizer)):
        with pytest.raises(ValueError, match=r"test\.jsonl\.xz: the file is packed"):
            read(tmp_path / "csv")
    for folder in (tmp_path / "saved", tmp_path / "saved" / "train"):
        folder.mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"saved/{split}: what save_to_disk wrote is not whole"):
            load_task(tmp_path / "saved", split)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_files_are_the_same_to_every_system(tmp_path, tokenizer, encoding):
    path = tmp_path / "a.txt"
    path.write_text("the cat.\n \nthe old house.\n", encoding=encoding, newline="\r\n")
    assert text_paragraphs(path) == ["the cat.", "the old house."]
    assert read_documents(str(path), "train", tokenizer) == ["the cat.", "the old house."]
    assert prepare_dataset(path)["text"] == ["the cat. the old house."]
    path.write_bytes("the cat.\nun \xe9t\xe9".encode("latin-1"))
    for read in (text_paragraphs, prepare_dataset, lambda path: read_documents(str(path), "train", tokenizer)):
        with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8 text"):
            read(path)


def test_a_folder_of_text_files_is_documents_in_the_order_of_their_names(tmp_path, tokenizer):
    for number in (*range(3, 12), 0, 1, 2):
        path = tmp_path / "books" / f"part{number % 2}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"\ufeffnumber {number}.\r\n\r\nthe end.\r\n", encoding="utf-8")
    (path.parent / "._00.txt").write_bytes(b"\0\5\x16\7")
    read = {split: read_documents(str(tmp_path / "books"), split, tokenizer) for split in ("train", "validation", "test")}
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    assert read["validation"] == [f"number {order[8]}.\n\nthe end."] and read["test"] == [f"number {order[9]}.\n\nthe end."]
    assert read["train"] == [f"number {n}.\n\nthe end." for n in (*order[:8], *order[10:])]
    few = tmp_path / "few"
    few.mkdir()
    for number in range(2):
        (few / f"{number}.txt").write_text("\n\n".join(f"{number} {k}." for k in range(5)))
    assert read_documents(str(few), "validation", tokenizer) == ["1 3."] and read_documents(str(few), "test", tokenizer) == ["1 4."]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: no \.txt"):
        read_documents(str(tmp_path / "none"), "train", tokenizer)


def test_rows_without_anything_to_learn_are_told(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [SHAPES["messages"], chat_row("the cat " * 20, "a")])
    assert len(calibration_split(tokenizer, path, 9, 0, max_length=12)[0]) == 1
    assert "1 of 2 rows have nothing to learn within max_length=12 tokens" in caplog.text


def test_tools_without_a_template_are_not_lost(tmp_path):
    plain = tiny_tokenizer(chat_template=None)
    path = write(tmp_path / "a.jsonl", [{**SHAPES["messages"], "tools": [CALL]}] * 2)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the tokenizer has no chat template"):
        read_documents(str(path), "train", plain)


def test_a_named_column_that_is_not_there_is_refused_with_its_file(tmp_path):
    for record in (SHAPES["messages"], {"content": "the cat."}):
        path = write(tmp_path / "a.jsonl", [record])
        with pytest.raises(ValueError, match=r"a\.jsonl: text_field='body': expected one of"):
            prepare_dataset(path, text_field="body")


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, "no system role here"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError"),
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_refuses_is_one_sentence_with_file_and_line(tmp_path, template, message):
    path = write(tmp_path / "a.jsonl", [{"system": "be brief.", "question": ASKED, "answer": SAID}])
    refuses = tiny_tokenizer(chat_template=template)
    for encode in (
        lambda: build_dataset({str(path): None}, refuses), lambda: encode_rows(prepare_dataset(path), refuses),
        lambda: encode_rows(prepare_dataset(prepare_dataset(path)), refuses), lambda: calibration_split(refuses, path, 1, 0),
        lambda: prompt_ids(refuses, load_task(path)[0], ""),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
            encode()


def test_the_first_row_that_is_refused_is_named_though_others_are_longer(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"system": "be brief.", "question": ASKED, "answer": SAID * (1 + i)} for i in range(20)])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: "):
        longest_row(prepare_dataset(path), tiny_tokenizer(chat_template=STRICT))


def test_a_tokenizer_without_end_or_pad(tmp_path):
    path = write(tmp_path / "a.jsonl", [SHAPES["messages"]])
    endless = tiny_tokenizer(chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    endless.pad_token = None
    assert encode_chat(endless, TURNS)["input_ids"][-1] == endless.eos_token_id == ChatCollator(endless).pad_id
    endless.eos_token = None
    assert ChatCollator(endless).pad_id == 0
    for encode in (lambda: build_dataset({str(path): None}, endless), lambda: encode_rows(prepare_dataset(path), endless)):
        with pytest.raises(ValueError, match=r"a\.jsonl:1: .*Set eos_token"):
            encode()


def test_what_a_template_leaves_out_is_told(tmp_path, tokenizer, caplog):
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content | trim }}{% endif %}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    deaf = tiny_tokenizer(chat_template=template)
    path = write(tmp_path / "a.jsonl", [SHAPES["alpaca"], {"system": "be brief.", **SHAPES["alpaca"]}])
    for encode in (lambda: build_dataset({str(path): None}, deaf), lambda: encode_rows(prepare_dataset(path), deaf)):
        caplog.clear()
        encode()
        assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [f"{path}:2: the chat template leaves out what is said by: system"]
    caplog.clear()
    build_dataset({str(path): None}, tokenizer)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_questions_without_enough_examples_are_refused_before_a_run(tmp_path):
    for split, n in (("dev", 4), ("test", 2)):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"cats_{split}.csv").write_text("q,a,b,c,d,A\n" * n)
    config = LayerMergeConfig(mmlu_dir=str(tmp_path), data_dir=str(tmp_path), output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="4 examples in dev for 'cats', n_shot=5"):
        prepare(config)
    (tmp_path / "dev" / "cats_dev.csv").write_text("q,a,b,c,d,A\n" * 5 + "q,a,b,c,d,\n")
    with pytest.raises(ValueError, match=r"cats_dev\.csv:6: expected question"):
        prepare(LayerMergeConfig(mmlu_dir=str(tmp_path), output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("roles", [["system"], ["assistant"], ["system", "assistant"]])
def test_a_conversation_that_asks_nothing_is_refused(roles):
    with pytest.raises(ValueError, match="nothing is asked"):
        question_of({"messages": [{"role": role, "content": "x"} for role in roles]})


def test_answers_end_where_their_template_ends_them(tokenizer):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<system>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    other, model, row = tiny_tokenizer(chat_template=template), tiny_model("llama"), SHAPES["messages"]
    model.generation_config.eos_token_id = None
    turn_end = other.convert_tokens_to_ids("<system>")
    assert end_tokens(model, other, row) == [other.eos_token_id, turn_end] and end_tokens(model, tokenizer, row) == [tokenizer.eos_token_id]
    assert answer_ends(model, other) == [other.eos_token_id, turn_end]  # of whom no conversation is known yet
    other.eos_token = None
    assert end_tokens(model, other, row) == [turn_end] == encode_chat(other, TURNS)["labels"][-1:]
    assert len(generate_answers(model, other, [row] * 2, max_new_tokens=3)) == 2
    with pytest.raises(ValueError, match="neither the model nor the tokenizer"):
        end_tokens(model, other)


def test_a_template_is_lent_or_taken_by_name(tmp_path):
    for name, template in (("plain", None), ("chat", tiny_tokenizer().chat_template)):
        tiny_tokenizer(chat_template=template).save_pretrained(tmp_path / name)
    lent = chat_tokenizer(tmp_path / "plain", [tmp_path / "nothing", tmp_path / "chat"])
    assert encode_chat(lent, TURNS) == encode_chat(tiny_tokenizer(), TURNS)
    by_name = chat_tokenizer(tmp_path / "plain", template="qwen3")
    assert "<|im_start|>" in by_name.chat_template and template_ids(by_name, TURNS)
    with pytest.raises(ValueError, match="chat_template='qwen33'"):
        chat_tokenizer(tmp_path / "plain", template="qwen33")


def test_columns_that_mean_nothing_are_named_once(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [SHAPES["with an id"]] * 3)
    with caplog.at_level(logging.INFO):
        load_task(path)
    assert [record.message for record in caplog.records] == [f"{path}: not read: 'day', 'id', 'source'"]


def test_rows_that_are_cut_are_told(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [SHAPES["messages"], chat_row(ASKED, "the cat " * 9)])
    build_dataset({str(path): None}, tokenizer, max_length=12)
    assert "1 of 2 rows are longer than max_length=12 tokens and lose their end" in caplog.text


def test_equals_signs_and_homes_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "lr=0.1" / "a.jsonl", [SHAPES["messages"]])
    write(tmp_path / "run=3" / "train.csv", [SHAPES["alpaca"]])
    assert parse_datasets([str(path), f"{path}=all"][:1]) == {str(path): None} and parse_datasets([f"{path}=1"]) == {str(path): 1}
    assert parse_datasets([str(tmp_path / "run=3")]) == {str(tmp_path / "run=3"): None}
    assert parse_datasets(["~/lr=0.1/a.jsonl"]) == {str(path): None}
    for read in (load_task, prepare_dataset):
        assert len(read("~/lr=0.1/a.jsonl")) == 1 and len(read("~/run=3")) == 1


def test_a_dataset_is_known_by_its_files_in_any_format(tmp_path):
    path = write(tmp_path / "t" / "train.parquet", [SHAPES["alpaca"]])
    before = row_stamps(str(path.parent), "train")
    write(path, [SHAPES["alpaca"]] * 2)
    assert set(before) == {"train.parquet"} and row_stamps(str(path.parent), "train") != before


@pytest.mark.parametrize("cells", ["q,a,b,c,d,", "q,a,b,c,d,BC", "q,a,b,c,d,4", "q,a,b,c,B", "q,a,,c,d,B", ",a,b,c,d,B"])
def test_bad_questions_are_refused_with_file_and_line(tmp_path, cells):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "odd_test.csv").write_text(f'"two\nlines",a,b,c,d,A\n{cells}\n')
    with pytest.raises(ValueError, match=r"odd_test\.csv:3: expected question"):
        load_mmlu(tmp_path)


def test_the_last_answer_is_what_is_asked_for():
    row = {"messages": [*TURNS, *chat_row("when?", "one night.")["messages"]], "tools": [CALL]}
    assert answer_of(row) == "one night." and prompt_row(row) == {"messages": row["messages"][:3], "tools": [CALL]}
