"lm-evaluation-harness reads a checkpoint as anybody would: its scores of our test rows are our own."

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from merge_lab.chat import load_task, write_jsonl
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import main
from merge_lab.components import load_model
from merge_lab.evaluation import evaluate_tasks
from merge_lab.harness import EvalConfig, run
from merge_lab.run_folder import bundled_path
from merge_lab.runs import find_runs
from small_runs import small

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: pip install 'merge_lab[eval]', or make install-real")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def merged(tmp_path):
    "A run whose checkpoint answers half of its rows rightly, and rows of two turns with a system prompt."
    from merge_lab.systems.mask_merge import run as merge

    config = small(tmp_path, mask_init={"strategy": "odd_one_out", "selected_idx": 1}, max_steps=1, learning_rate=1e-9, held_out_rows=0)
    merge(config)
    return tmp_path / "run"


@needs_harness
def test_the_harness_finds_what_we_find(merged, monkeypatch, caplog):
    found = run(EvalConfig(str(merged), eval_samples=12, device="cpu", dtype="float32")).set_index(["task", "metric"]).value
    tests = {task: load_task(bundled_path(f"tasks/{task}"), "test")[:12] for task in ("rewrite", "summarize")}
    ours = evaluate_tasks(load_model(merged / "merged"), load_tokenizer(merged / "merged"), tests, metrics=("exact_match", "chrf"), progress=False)
    for task in tests:
        assert found[task, "exact_match, stripped"] == pytest.approx(ours.exact_match[task])
        assert found[task, "chrf, stripped"] == pytest.approx(ours.chrf[task], abs=1e-6)
    assert ours.exact_match.to_dict() == {"rewrite": 0.0, "summarize": 1.0}
    assert find_runs(merged.parent).loc["run", "lm_eval"] == "rewrite 0, summarize 1"


@needs_harness
def test_rows_of_several_turns_and_long_answers_are_asked_as_they_are(tmp_path):
    "The harness by itself makes one user's turn of a text, and ends an answer at the first blank line."
    shutil.copytree(bundled_path("models/summarize"), "model")
    rows = load_task(bundled_path("tasks/summarize"), "test")[:6]
    for row in rows:
        row["messages"] = [{"role": "system", "content": "the gist"}, *row["messages"][:1], {"role": "assistant", "content": "the farmer."}, *row["messages"]]
    write_jsonl(Path("turns/test.jsonl"), rows)
    found = run(EvalConfig("model", datasets=["turns"], device="cpu", dtype="float32")).set_index("metric").value
    ours = evaluate_tasks(load_model("model"), load_tokenizer("model"), {"turns": rows}, metrics=("exact_match", "chrf"), progress=False)
    assert found["exact_match, stripped"] == pytest.approx(ours.exact_match.turns)
    assert found["chrf, stripped"] == pytest.approx(ours.chrf.turns, abs=1e-6)


@needs_harness
@pytest.mark.parametrize("template", [True, False])
def test_a_task_of_the_harness_is_asked_with_the_chat_template(template, tmp_path):
    "A YAML task, which says what is asked in plain words: without the template the expert knows nothing."
    shutil.copytree(bundled_path("models/summarize"), "model")
    rows = load_task(bundled_path("tasks/summarize"), "test")[:6]
    Path("lines.jsonl").write_text("".join(json.dumps({"asked": row["messages"][0]["content"], "said": row["messages"][1]["content"]}) + "\n" for row in rows))
    Path("gist.yaml").write_text(
        f"task: gist\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'lines.jsonl'}}}}}\ntest_split: test\ndoc_to_text: '{{{{asked}}}}'\ndoc_to_target: '{{{{said}}}}'\n"
        "output_type: generate_until\ngeneration_kwargs: {max_gen_toks: 16, until: []}\nmetric_list: [{metric: exact_match}]\n"
    )
    found = run(EvalConfig("model", tasks=["gist.yaml"], limit=4, chat_template=template, device="cpu", dtype="float32"))
    assert found.set_index("metric").value["exact_match"] == (1.0 if template else 0.0) and found.n.tolist() == [4]
    (kept,) = json.loads(Path("model/lm_eval.json").read_text())["results"]
    assert kept["task"] == "gist" and kept["chat_template"] is template


@needs_harness
@pytest.mark.parametrize(
    "words, said",
    [
        (["model", "--tasks", "arc_esy"], "the harness has no such task. Did you mean 'arc_easy'"),
        (["model", "--tasks", "none.yaml"], "none.yaml: no such file"),
        (["model"], "no test rows are known of it"),
        (["nowhere", "--tasks", "arc_easy"], "nowhere"),
        (["bare", "--datasets", str(bundled_path("tasks/summarize"))], "no chat template"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(words, said, capsys):
    shutil.copytree(bundled_path("models/summarize"), "model")
    shutil.copytree(bundled_path("models/summarize"), "bare", ignore=shutil.ignore_patterns("chat_template*"))
    assert main(["eval", *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("merge-lab eval:") and said in told


def test_without_the_harness_the_command_says_what_to_install(monkeypatch, capsys):
    usual = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "lm_eval" else usual(name, *rest))
    assert main(["eval", str(bundled_path("models/base"))]) == 2
    assert "pip install 'merge_lab[eval]'" in capsys.readouterr().err
