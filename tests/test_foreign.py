"""Components that other tools made: what is repaired, aligned, dequantised, told or refused."""

import json
import logging

import pytest
import torch
from transformers import GenerationConfig

from merge_lab import components
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import main
from merge_lab.components import align_vocabulary, load_components, load_model, preflight, untie_embeddings
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.writer import mended_generation, save_plain
from test_components import edit_json, errors, notes, row, save_component, save_tokenizer, WORDS


@pytest.fixture
def pair(tmp_path):
    return [save_component(tmp_path / name, seed=i) for i, name in enumerate("ab")]


@pytest.fixture
def told(caplog):
    "What was logged of this package, as one text."
    caplog.set_level(logging.INFO, logger="merge_lab")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


# Generation configs that transformers loads and refuses to save

REFUSED = [
    dict(temperature=0.6, top_p=0.9),
    dict(top_k=20, do_sample=False),
    dict(min_p=0.1),
    dict(epsilon_cutoff=0.5, num_beams=4),
    dict(temperature=0.0),
    dict(length_penalty=0.5, early_stopping=True),
    dict(pad_token_id=-1),
    dict(num_return_sequences=3),
]


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_refused_generation_config_is_mended_and_told(settings, told, tmp_path):
    config = GenerationConfig(eos_token_id=[2, 5])
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError):
        config.save_pretrained(tmp_path)
    mended = mended_generation(config)
    mended.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]
    sampling = {"temperature", "top_p", "top_k", "min_p"} & {name for name, value in settings.items() if value}
    assert bool(mended.do_sample) == bool(sampling)
    assert ("do_sample" if sampling else next(iter(settings))) in told()
    assert all(getattr(mended, name) == settings[name] for name in sampling)


@pytest.mark.parametrize("settings", REFUSED[:5], ids=str)
def test_generation_config_never_stops_an_export(settings, pair, tmp_path, told):
    for path in pair:
        edit_json(path / "generation_config.json", **settings)
    merger = Merger.from_config(MergerConfig([str(path) for path in pair]))
    merger.model.generation_config.eos_token_id = [2, 3]  # a change makes transformers strict
    merger.save_merged(tmp_path / "merged")
    model = load_model(pair[0])
    model.generation_config.eos_token_id = [2, 3]
    save_plain(model, tmp_path / "plain")
    for folder in ("merged", "plain"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert "is mended" in told()


# One vocabulary


def test_alignment_writes_all_or_nothing(pair, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    calls, save = [], components.save_plain

    def fails_late(model, folder, tokenizer=None):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("the disk is full")
        save(model, folder, tokenizer)

    monkeypatch.setattr(components, "save_plain", fails_late)
    with pytest.raises(OSError, match="disk is full"):
        align_vocabulary(pair, tmp_path / "out", policy="pad")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    calls[:] = [None]
    with pytest.raises(OSError, match="disk is full"):
        untie_embeddings(pair[0], tmp_path / "untied")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]
    monkeypatch.undo()
    copies = align_vocabulary(pair, tmp_path / "out", policy="pad")
    assert preflight(copies).ok.all() and (tmp_path / "out" / "mine.txt").exists()


def chat_pair(tmp_path, architecture="llama", **settings):
    "Two fine-tunes that gave the same new ids to other tokens."
    own = {"a": [*WORDS, "user", "end"], "b": [*WORDS, "tool", "user", "call"]}
    return [
        save_component(tmp_path / name, architecture, words=words, vocab_size=16, seed=i, **settings)
        for i, (name, words) in enumerate(own.items())
    ], own


@pytest.mark.parametrize("architecture, tied", [("llama", False), ("llama", True), ("qwen2", False), ("gpt2", True)])
def test_union_follows_tokens_and_takes_rows_from_whoever_has_them(tmp_path, architecture, tied):
    paths, own = chat_pair(tmp_path, architecture, tie_word_embeddings=tied)
    assert errors(preflight(paths)) == ["tokenizer vocabulary"]
    copies = align_vocabulary(paths, tmp_path / "out", policy="union")
    report = preflight(copies)
    assert report.ok.all() and notes(report) == []
    union = [*own["a"], "tool", "call"]
    tokenizer = load_tokenizer(copies[1])
    assert tokenizer.convert_ids_to_tokens(range(len(union))) == union
    assert tokenizer("the call cat")["input_ids"] == [3, union.index("call"), 4]
    before = [load_model(path).get_input_embeddings().weight for path in paths]
    after = [load_model(path).get_input_embeddings().weight for path in copies]
    for i, token in enumerate(union):
        for component, words in enumerate(own.values()):
            giver = component if token in words else 1 - component
            row_of = list(own.values())[giver].index(token)
            assert torch.equal(after[component][i], before[giver][row_of]), token
    shared = [words.index(token) for words in (own["b"],) for token in WORDS]
    model, aligned = load_model(paths[1]), load_model(copies[1])
    ids = torch.arange(8)[None]
    torch.testing.assert_close(aligned(ids).logits[..., : len(WORDS)], model(ids).logits[..., shared])


def test_union_keeps_the_flags_of_added_tokens(tmp_path):
    paths = [save_component(tmp_path / name, vocab_size=20) for name in "ab"]
    for path, added in zip(paths, (["<|x|>"], ["<|y|>", "<|x|>"])):
        tokenizer = load_tokenizer(path)
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        tokenizer.chat_template = f"{{{{ messages }}}} {path.name}"
        tokenizer.save_pretrained(path)
    tokenizer = load_tokenizer(align_vocabulary(paths, tmp_path / "out", policy="union")[1])
    ids = tokenizer("the<|y|>cat<|x|>")["input_ids"]
    assert ids == [3, len(WORDS) + 1, 4, len(WORDS)] and tokenizer.chat_template.endswith("a")
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["the", "cat"]


def test_union_refuses_other_rules_and_writes_nothing(tmp_path):
    from tokenizers.normalizers import Lowercase

    paths, own = chat_pair(tmp_path)
    save_tokenizer(paths[1], own["b"], normalizer=Lowercase())
    with pytest.raises(ValueError, match="another normalizer"):
        align_vocabulary(paths, tmp_path / "out", policy="union")
    assert not (tmp_path / "out").exists()


def test_align_command(tmp_path, capsys):
    paths, _ = chat_pair(tmp_path)
    assert main(["preflight", *map(str, paths)]) == 1 and "merge-lab align" in capsys.readouterr().out
    assert main(["align", *map(str, paths), "--output_dir", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert main(["preflight", *written]) == 0
    assert main(["align", *map(str, paths), "--policy", "cut", "--output_dir", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("architecture, tied", [("llama", False), ("llama", True), ("gpt2", True)])
@pytest.mark.parametrize("order", [(11, 16), (16, 11), (13, 16)])
def test_equal_up_to_padding_just_works(tmp_path, architecture, tied, order):
    paths = [
        save_component(tmp_path / str(size), architecture, vocab_size=size, tie_word_embeddings=tied, seed=size) for size in order
    ]
    report = preflight(paths)
    assert report.ok.all() and notes(report) == ["vocabulary size"]
    assert "rows of padding" in row(report, "vocabulary size").remedy
    plain, models = [load_model(path) for path in paths], list(load_components(paths))
    large = plain[order.index(16)].get_output_embeddings().weight
    ids = torch.arange(11)[None]
    for before, after in zip(plain, models):
        rows = before.config.vocab_size
        assert after.config.vocab_size == 16
        torch.testing.assert_close(after(ids).logits[..., :rows], before(ids).logits)
        assert torch.equal(after.get_output_embeddings().weight[rows:], large[rows:])
    merger = Merger.from_config(MergerConfig([str(path) for path in paths]))
    merger.save_merged(tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    assert again.config.vocab_size == 16
    torch.testing.assert_close(again(ids).logits, merger(ids).logits)


def test_other_tokens_are_no_padding(tmp_path):
    paths = [save_component(tmp_path / "a"), save_component(tmp_path / "b", words=[*WORDS, "new"], vocab_size=16)]
    assert errors(preflight(paths)) == ["vocabulary size", "tokenizer vocabulary"]
    short = [save_component(tmp_path / "c", vocab_size=10), save_component(tmp_path / "d", vocab_size=16)]
    assert "vocabulary size" in errors(preflight(short))  # a token has no row
