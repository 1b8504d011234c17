"""A quick look says what the plain computation says of the same rows, whatever was kept of the look before."""

import pytest
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


def test_rows_longer_than_a_window_are_padded():
    models = [tiny_model("mistral", num_hidden_layers=4, seed=seed, sliding_window=4) for seed in range(2)]
    assert not check(Merger(models, MergerConfig(dtype="float32"))).as_tree


@pytest.mark.parametrize("kind", ["mamba2", "gemma3n_text", "qwen3_next", "gpt_oss", "jetmoe"])
def test_a_decoder_that_cannot_be_asked_as_a_tree_is_asked_plainly(kind):
    check(Merger(family(kind, vocab_size=64), MergerConfig(dtype="float32")))
