"""The token view's numbers, its widget and the conversation without a browser: what a front end is sent, and what is kept."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from merge_lab.asking import Answer, Asking, preference_rows, Voice, voices_of
from merge_lab.checkpoints import load_tokenizer
from merge_lab.disagreement import compare_logits, disagreement
from merge_lab.explorer import MergeExplorer
from merge_lab.influence import token_influence
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import begin_run, bundled_path, PREFERENCES
from merge_lab.systems.mask_merge import demo_config
from merge_lab.tinylm import tiny_experts, tiny_tokenizer
from merge_lab.token_board import TokenBoard

PATHS = [str(bundled_path(f"models/{name}")) for name in ("rewrite", "summarize")]
QUESTION = "Say it in other words: The angry farmer kept the damp box by the shop."


@pytest.fixture(scope="module")
def merger():
    return Merger.from_config(MergerConfig(model_paths=PATHS, dtype="float32"))


@pytest.fixture
def asking(merger, tmp_path):
    return Asking(lambda: merger, load_tokenizer(PATHS[0]), folder=tmp_path / "run", max_new_tokens=30)


# --- numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_numbers_are_those_of_full_logits_on_every_architecture(architecture, chunk):
    "Gemma 2 caps its logits, GPT-2 has a tied head."
    tokenizer = tiny_tokenizer()
    merger = Merger(tiny_experts(architecture, 3), MergerConfig(model_paths=[]))
    merger.init_masks({"strategy": "random", "seed": 3})
    row = {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the cat sat"}]}
    found = disagreement(merger, tokenizer, row, k=4, chunk=chunk)
    ids, places = torch.tensor([found.row]), torch.tensor(found.places)
    logits = [merger.component_forward(i, input_ids=ids).logits[0, places - 1] for i in (0, 1, 2, None)]
    expected = compare_logits(logits, 3, ids[0, places], 4)
    for own, other in zip((found.log_probs, found.kl, found.spread, found.top_log_probs), expected):
        torch.testing.assert_close(own, other, atol=2e-5, rtol=2e-4)
    assert found.kl[-1].abs().max() < 1e-6 and (found.kl >= -1e-6).all()


def test_a_large_vocabulary_is_taken_in_pieces(monkeypatch):
    "No tensor of all tokens by the vocabulary, for all models at once, is ever there."
    import merge_lab.disagreement as module

    tokenizer, seen = tiny_tokenizer(), []
    models = tiny_experts("llama", 2, vocab_size=49_152)
    merger = Merger(models, MergerConfig(model_paths=[], mode="scalar"))
    whole = module.compare_logits
    monkeypatch.setattr(module, "compare_logits", lambda logits, *rest: (seen.append(logits[0].shape), whole(logits, *rest))[1])
    monkeypatch.setattr(module, "BUDGET", 3 * 49_152 * 2)
    answer = "the cat sat on the mat the cat sat on the mat"
    row = {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": answer}]}
    disagreement(merger, tokenizer, row)
    assert len(seen) > 3 and max(shape[0] for shape in seen) == 2 and seen[0][1] == 49_152


@pytest.mark.parametrize("mode", ["scalar", "vector_input", "vector_output"])
def test_slopes_are_difference_quotients_of_the_brush(mode):
    from merge_lab.brush import Place, shifted_alphas

    merger = Merger([model.double() for model in tiny_experts("gpt2", 3)], MergerConfig(model_paths=[], mode=mode)).double()
    merger.init_masks({"strategy": "random", "seed": 2})
    ids, step = list(range(5, 11)), 1e-4
    found = token_influence(merger, ids, 4)
    for name, leaf, key in list(merger.masked_parameters())[3:9]:
        losses, before = [], merger.mask_state()
        for sign in (1, -1):
            leaf.set_alphas(key, shifted_alphas(leaf, key, 1, sign * step, Place(name)))
            losses.append(token_influence(merger, ids, 4).loss)
            merger.load_mask_state(before)
        slope = found.slopes(name, 1).sum().item()
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-3, abs=1e-6), name


def test_half_precision_gives_finite_numbers():
    merger = Merger.from_config(MergerConfig(model_paths=PATHS, dtype="bfloat16"))
    row = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The farmer kept the box."}]}
    found = disagreement(merger, load_tokenizer(PATHS[0]), row)
    table = token_influence(merger, found.row, found.places[0]).table()
    assert torch.isfinite(found.log_probs).all() and table["slope"].abs().max() > 0
    assert table[["slope", "influence"]].notna().all().all()


# --- the widget -----------------------------------------------------------------------


def make_canvas(done):
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    from merge_lab.canvas import Canvas

    return Canvas("chat", {"messages": [{"role": "user", "text": "<b>"}]}, done.append, lambda: "<p>still</p>")


def test_what_opens_the_widget_is_what_vs_code_needs(monkeypatch):
    "Its renderer looks the module up by name, among nbextensions of the kernel's environment first, and calls model and view of it."
    import ipywidgets.widgets.widget as base
    from jupyter_core.paths import jupyter_path

    sent, real = [], base.comm.create_comm
    monkeypatch.setattr(base.comm, "create_comm", lambda **keys: (sent.append(keys), real(**keys))[1])
    make_canvas([])
    mine = [each for each in sent if each["data"]["state"].get("_model_module") == "anywidget"]
    assert len(mine) == 1 and mine[0]["target_name"] == "jupyter.widget"
    assert mine[0]["metadata"]["version"].startswith("2.")  # of the widgets' protocol
    state = json.loads(json.dumps(mine[0]["data"]["state"]))  # plain data
    wanted = dict(_model_module="anywidget", _model_name="AnyModel", _view_module="anywidget", _view_name="AnyView")
    assert {name: state[name] for name in wanted} == wanted and state["_view_module_version"] == state["_model_module_version"]
    assert state["_anywidget_id"] == "merge_lab.canvas.Canvas" and "export default" in state["_esm"] and ".mlc" in state["_css"]
    assert state["kind"] == "chat" and state["shown"]["messages"][0]["text"] == "<b>"
    found = [Path(folder) / "anywidget/index.js" for folder in jupyter_path("nbextensions")]
    assert any(file.exists() for file in found), found  # no content delivery network is asked


def test_a_front_ends_message_comes_in_over_the_comm():
    done = []
    canvas = make_canvas(done)
    message = {"content": {"data": {"method": "custom", "content": {"action": "stop"}}}, "buffers": []}
    canvas._handle_msg(message)
    assert done == [{"action": "stop"}]
    bundle = canvas._repr_mimebundle_()[0]
    assert bundle["text/html"] == "<p>still</p>" and "application/vnd.jupyter.widget-view+json" in bundle


def test_the_script_is_a_module_that_reads_no_html(tmp_path):
    import shutil
    import subprocess

    from merge_lab.canvas import Canvas, open_doors

    assert open_doors(Canvas._esm) == open_doors(Canvas._css) == []
    if shutil.which("node"):
        file = tmp_path / "canvas.mjs"
        file.write_text(Canvas._esm)
        subprocess.run(["node", "--check", str(file)], check=True)


def test_hostile_text_is_escaped_where_there_is_no_front_end(asking):
    from merge_lab.asking_view import asking_html

    asking.messages, asking.answers = [{"role": "user", "content": "<script>1</script>"}], [Answer("<b>", "<i>", "done")]
    assert "<script>" not in asking_html(asking) and "<i>" not in asking_html(asking)


# --- the conversation -----------------------------------------------------------------


def test_a_pick_before_and_after_a_run_outlives_it(asking, tmp_path):
    "What was chosen neither keeps a run from its folder nor goes with a run that is overwritten."
    asking.ask(QUESTION)
    asking.wait()
    assert asking.pick("rewrite")
    config = demo_config(output_dir=str(tmp_path / "run"))
    begin_run(config)
    begin_run(demo_config(output_dir=str(tmp_path / "run"), overwrite=True))
    assert (tmp_path / "run" / PREFERENCES).read_text().count("\n") == len(asking.kept) > 0


def test_a_failure_is_told_and_leaves_the_merger_as_it_was(asking, merger):
    def broken(merger):
        merger.init_masks({"strategy": "odd_one_out", "selected_idx": 0})
        raise RuntimeError("no masks")

    asking.blends = lambda: {"broken": broken}
    before = merger.mask_state()
    asking.ask(QUESTION)
    answers = asking.wait()
    assert answers[-1].state == "failed" and "no masks" in answers[-1].error
    assert all(torch.equal(mask, before[name]) for name, mask in merger.mask_state().items())
    with pytest.raises(ValueError, match="has said nothing"):
        asking.pick("broken")


def test_nobody_is_asked_twice_at_once(asking):
    asking.ask(QUESTION)
    if asking.busy:
        with pytest.raises(RuntimeError, match="somebody speaks"):
            asking.ask(QUESTION)
    asking.stop()
    asking.wait()
    assert not asking.busy


def test_a_stop_ends_an_answer_within_a_token(asking, merger, monkeypatch):
    import merge_lab.asking as module

    steps, stop = [], threading.Event()
    whole = module.Halt.__call__

    def slow(self, *args, **kwargs):
        steps.append(1)
        time.sleep(0.05)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(module.Halt, "__call__", slow)
    answer = Answer("rewrite")
    for _ in asking.stream(voices_of(merger, {})[0], [{"role": "user", "content": QUESTION}], stop, answer):
        stop.set()
    assert answer.state == "stopped" and len(steps) <= 3


def test_a_long_answer_is_cut_and_makes_no_row(asking, merger):
    asking.max_new_tokens = 3
    asking.ask(QUESTION)
    answers = asking.wait()
    assert {answer.state for answer in answers} == {"cut"}
    assert asking.pick(0) == [] and asking.kept == [] and asking.messages[-1]["role"] == "assistant"


def test_a_pick_is_said_to_be_kept_only_where_it_is(asking, monkeypatch):
    import merge_lab.asking as module

    def full(*_):
        raise OSError("the disk is full")

    said = [Answer("a", "Yes.", "done"), Answer("b", "No.", "done")]
    asking.messages, asking.answers = [{"role": "user", "content": QUESTION}], list(said)
    monkeypatch.setattr(module, "add_rows", full)
    with pytest.raises(OSError, match="disk is full"):
        asking.pick("a")
    assert asking.note == "" and asking.answers == said and asking.kept == []
    monkeypatch.undo()
    assert len(asking.pick("a")) == 1 == len(asking.kept) and asking.note == "kept as 1 row"
    loose = Asking(asking.merger, asking.tokenizer)
    loose.messages, loose.answers = [{"role": "user", "content": QUESTION}], list(said)
    assert len(loose.pick("a")) == 1 and loose.note == "not kept: no folder was given"


def test_the_rows_of_a_pick_are_written_all_or_none(asking):
    "The disk takes the first row and not the second: nothing is kept, and the next try writes each once."
    import resource

    asking.messages = [{"role": "user", "content": QUESTION}]
    asking.answers = [Answer("a", "Yes.", "done"), Answer("b", "No.", "done"), Answer("c", "Perhaps. " * 400, "done")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            asking.pick("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert asking.kept == [] and len(asking.answers) == 3
    assert asking.pick("a") == asking.kept and [row["rejected_by"] for row in asking.kept] == ["b", "c"]


def test_instructions_and_turns_are_in_the_prompt_of_a_row(asking):
    asking.ask(QUESTION, system="Be short.")
    asking.wait()
    asking.pick(0)
    asking.ask("Say it in other words: The happy baker sold the small cake.")
    asking.wait()
    rows = asking.pick(1)
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user", "assistant", "user"]
    assert {row["chosen_by"] for row in rows} == {"summarize"}


def test_voices_of_a_merger_with_a_base():
    config = MergerConfig(model_paths=PATHS, base_model=str(bundled_path("models/base")), constrain_mode="delta", dtype="float32")
    merger = Merger.from_config(config)
    assert [voice.name for voice in voices_of(merger, {})] == ["base", "rewrite", "summarize"]
    asking = Asking(lambda: merger, load_tokenizer(PATHS[0]), max_new_tokens=20)
    said = "".join(asking.stream(Voice("base", 2), [{"role": "user", "content": QUESTION}]))
    assert said and said != "".join(asking.stream(Voice("rewrite", 0), [{"role": "user", "content": QUESTION}]))


def test_preference_training_takes_the_file_as_it_is(asking, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    asking.ask(QUESTION)
    asking.wait()
    asking.pick("rewrite")
    data = load_dataset("json", data_files=str(asking.file), split="train", cache_dir=str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(PATHS[1], dtype=torch.float32)
    options = DPOConfig(
        str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
        disable_tqdm=True, logging_steps=1,
    )
    trainer = DPOTrainer(model, args=options, train_dataset=data, processing_class=load_tokenizer(PATHS[1]))
    assert trainer.train().training_loss == pytest.approx(0.693, abs=0.01)  # log 2: nothing is learned yet


def test_rows_hold_whole_answers_only():
    answers = [Answer("a", "Yes.", "done"), Answer("b", "No.", "stopped"), Answer("c", "No.", "cut"), Answer("d", "Maybe.", "done")]
    rows = preference_rows([{"role": "user", "content": "?"}], answers, 0)
    assert [row["rejected_by"] for row in rows] == ["d"]
    assert preference_rows([], answers, 1) == []


def test_an_explorer_without_a_bench_has_a_lock(merger):
    "Else the board and the explorer would be two components at once on one merger."
    explorer = MergeExplorer(lambda: merger, load_tokenizer(PATHS[0]), {"task": [{"messages": [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The farmer kept the box."}]}]})
    taken = []
    with explorer.lock:
        board = TokenBoard(explorer)
        assert not board.worker.wait(0.5) and board.found is None
        taken.append(1)
    assert board.worker.wait() and board.error is None and board.found is not None
