"""A quick look says what the plain computation says of the same rows, whatever was kept of the look before."""

import copy
import pickle

import pytest
import torch
from test_architectures import family

from merge_lab.evaluation import evaluate_tasks
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.quick_look import QuickLook
from merge_lab.tinylm import tiny_model, tiny_tokenizer

ROWS = {
    task: [
        {"messages": [{"role": "user", "content": f"{asked} {n}"}, {"role": "assistant", "content": f"{n} {said}"}]}
        for n in ("one", "two cats", "three dogs ran home", "four")
    ]
    for task, asked, said in (("a", "the cat saw", "dog ran"), ("b", "the dog saw", "cat"))
}
MOVES = [0.5, [0.5, 0.5, 0.9], [0.5, 0.5, 0.1], [0.5, 0.2, 0.1], 1.0, 0.0]


def check(merger: Merger, rows=ROWS) -> QuickLook:
    "Every move, and each of them twice; a component, too."

    def right():
        wanted = evaluate_tasks(merger, tiny_tokenizer(), rows, metrics=["loss"], progress=False)["loss"].tolist()
        assert list(look.take(merger)[0].values()) == pytest.approx(wanted, rel=1e-6, abs=1e-6)

    look = QuickLook(merger, tiny_tokenizer(), rows, [rows["a"][0]], operations=float("inf"))
    for share in MOVES:
        merger.init_masks({"strategy": "blend", "selected_idx": 1, "parameters": {"default": share}})
        right()
        right()  # nothing moved
    with merger.as_component(0):
        right()
    return look


@pytest.mark.parametrize("mode", ["scalar", "vector_input", "vector_output"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_every_move_gives_the_plain_loss(kind, mode):
    models = [tiny_model(kind, num_hidden_layers=4, seed=seed) for seed in range(3)]
    look = check(Merger(models, MergerConfig(mode=mode, dtype="float32")))
    assert look.as_tree and look.replays and look.tokens < sum(len(row["input_ids"]) for row in look.rows)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_correction_counts_once_and_its_moves_are_noticed(kind):
    merger = Merger([tiny_model(kind, num_hidden_layers=3, seed=seed) for seed in range(2)], MergerConfig(dtype="float32", residual_rank=2))
    look = QuickLook(merger, tiny_tokenizer(), ROWS, operations=float("inf"))
    for _ in range(3):
        with torch.no_grad():
            for name, tensor in merger.trained().items():
                tensor.add_(torch.randn_like(tensor) if name.endswith((".left", ".right")) else 0)
        wanted = evaluate_tasks(merger, tiny_tokenizer(), ROWS, metrics=["loss"], progress=False)["loss"].tolist()
        assert list(look.take(merger)[0].values()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_rows_longer_than_a_window_are_padded():
    models = [tiny_model("mistral", num_hidden_layers=4, seed=seed, sliding_window=4) for seed in range(2)]
    assert not check(Merger(models, MergerConfig(dtype="float32"))).as_tree


@pytest.mark.parametrize("kind", ["mamba2", "gemma3n_text", "qwen3_next", "gpt_oss", "jetmoe"])
def test_a_decoder_that_cannot_be_asked_as_a_tree_is_asked_plainly(kind):
    check(Merger(family(kind, vocab_size=64), MergerConfig(dtype="float32")))


@pytest.mark.parametrize("mode", ["scalar", "vector_output"])
def test_a_merger_that_is_converted_is_looked_at_anew(mode):
    "What was held is of another dtype; the first look after the change failed."
    merger = Merger([tiny_model("llama", num_hidden_layers=4, seed=seed) for seed in range(2)], MergerConfig(mode=mode, dtype="float32"))
    look = check(merger)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        merger.to(dtype)
        held, plain = look.take(merger)[0], QuickLook(merger, tiny_tokenizer(), ROWS, operations=float("inf")).take(merger)[0]
        assert held == pytest.approx(plain, rel=1e-6)
        assert {tensor.dtype for tensor in look.blend._held.values()} == {dtype} and look.bytes > 0
        assert all(output.dtype == dtype for asked in look.asked for output in asked.kept.values())


@pytest.mark.parametrize("layer", [0, 3])
def test_weights_that_change_in_place_are_noticed(layer):
    merger = Merger([tiny_model("llama", num_hidden_layers=4, seed=seed) for seed in range(2)], MergerConfig(dtype="float32"))
    look = check(merger)
    with torch.no_grad():
        merger.leaves()[f"model.layers.{layer}.mlp.up_proj"].weights["weight"][1].mul_(2)
    check_once(look, merger)
    merger.leaves()["model.norm"].weights["weight"][1].data.mul_(2)  # which leaves no trace
    look.forget()
    check_once(look, merger)


def check_once(look: QuickLook, merger: Merger):
    wanted = evaluate_tasks(merger, tiny_tokenizer(), ROWS, metrics=["loss"], progress=False)["loss"].tolist()
    assert list(look.take(merger)[0].values()) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_a_first_look_where_only_later_layers_have_masks():
    models = [tiny_model("llama", num_hidden_layers=4, seed=0) for _ in range(2)]
    with torch.no_grad():
        models[1].model.layers[3].mlp.up_proj.weight.mul_(2)
    check(Merger(models, MergerConfig(dtype="float32", target_modules=["layers.3.mlp"])))


def test_an_explorer_sees_that_weights_have_changed():
    from merge_lab.explorer import MergeExplorer

    merger = Merger([tiny_model("llama", seed=seed) for seed in range(2)], MergerConfig(dtype="float32"))
    explorer = MergeExplorer(lambda: merger, tiny_tokenizer(), ROWS, prompts=0)
    first = explorer.evaluate({"strategy": "uniform"}).scores["loss"].tolist()
    copies = copy.deepcopy(merger), pickle.loads(pickle.dumps(merger))  # what is held of it goes with none of them
    with torch.no_grad():
        merger.leaves()["model.layers.0.mlp.up_proj"].weights["weight"][1].mul_(3)
    second = explorer.evaluate({"strategy": "uniform"}).scores["loss"].tolist()
    assert first[:2] == second[:2] and all(a != b for a, b in zip(first[2:], second[2:]))  # one component has changed, and the merge
    for other in copies:
        assert MergeExplorer(lambda other=other: other, tiny_tokenizer(), ROWS, prompts=0).evaluate({"strategy": "uniform"}).scores["loss"].tolist() == first


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_attention_by_groups_is_that_of_the_whole_tree(kind, monkeypatch):
    "Also where groups are of one row each, and where a decoder takes no notice of them."
    from merge_lab import quick_look as module

    merger = Merger([tiny_model(kind, num_hidden_layers=3, seed=seed) for seed in range(2)], MergerConfig(dtype="float32"))
    seen, whole, told = [], module.tree_groups, []
    monkeypatch.setattr(module, "tree_groups", lambda tree, width=96: seen.append(found := whole(tree, width)) or found)
    config = module.decoder_of(merger.model).config
    assert module.takes_groups(config)
    for width in (1, 160):
        monkeypatch.setattr(module.TokenTree, "groups", property(lambda tree, width=width: module.tree_groups(tree, width)))
        told.append(QuickLook(merger, tiny_tokenizer(), ROWS, operations=float("inf")).take(merger)[0])
    assert max(map(len, seen)) > 3 and config._attn_implementation == "sdpa"
    monkeypatch.setattr(module, "takes_groups", lambda config: False)
    told.append(QuickLook(merger, tiny_tokenizer(), ROWS, operations=float("inf")).take(merger)[0])
    assert told[0] == pytest.approx(told[2], rel=1e-6) and told[1] == pytest.approx(told[2], rel=1e-6)
