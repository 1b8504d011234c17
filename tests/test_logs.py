"""What a command says: lines and no frames of bars, one log in the run's folder, one sentence at the end, no secrets."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from merge_lab import cli, logs
from merge_lab.cli import EXIT, main, usage
from merge_lab.run_folder import bundled_path
from merge_lab.systems.mask_merge import run
from small_runs import LORA, make_ground, MERGE, small, TRAIN


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return make_ground(tmp_path_factory.mktemp("ground"))


def test_no_frames_where_there_is_no_terminal_and_nothing_but_results_if_quiet(ground, monkeypatch, capfd):
    monkeypatch.chdir(ground)
    for more in ("", " --quiet", " -q"):
        assert main((MERGE + TRAIN + more + " --overwrite").split()) == 0
        out, err = capfd.readouterr()
        assert "\r" not in err and "it/s" not in err and "%|" not in err
        assert "learned masks" in out and "Next: merge-lab verify out" in out
    assert not logs.SILENT or main(["preflight", "a", "b"]) == 0 and not logs.SILENT


def test_no_frames_of_a_fine_tune_either(ground, monkeypatch, capfd):
    monkeypatch.chdir(ground)
    assert main(f"{LORA} --eval_dataset none".replace("_dir out", "_dir tuned").split()) == 0
    out, err = capfd.readouterr()
    assert "%|" not in out + err and "it/s" not in out + err


def test_a_run_has_one_log_that_goes_on_when_it_is_resumed(ground, monkeypatch):
    monkeypatch.chdir(ground)
    for more in ("", " --resume --max_steps 3"):
        assert main((MERGE + TRAIN + more).replace("_dir out", "_dir logged").split()) == 0
    text = Path("logged", logs.LOG_FILE).read_text()
    assert text.count("the run is in logged") == 2 and "\r" not in text


def test_what_ends_a_run_stands_in_its_log(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr("merge_lab.systems.mask_merge.score_learned", broken)
    config = small(tmp_path, max_steps=1, eval_samples=0, held_out_rows=0, save_merged=False)
    with pytest.raises(KeyError) as caught:
        run(config, progress=False)
    assert caught.value.log_file == tmp_path / "run" / logs.LOG_FILE
    assert "KeyError: 'nobody thought of this'" in caught.value.log_file.read_text()


def test_a_fault_is_a_sentence_that_says_where_its_log_is(monkeypatch, capsys):
    monkeypatch.setattr(cli, "call", lambda *_: [].pop())
    assert main(["preflight", "a"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" not in err and "IndexError: pop from empty list" in err
    assert "Traceback" in Path(re.search(r"stands in (\S+);", err)[1]).read_text()
    assert main(["preflight", "a", "--verbose"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_no_token_is_printed(monkeypatch, capsys):
    def refused(*_):
        raise OSError("401 for token hf_" + "a" * 34)

    monkeypatch.setattr(cli, "call", refused)
    assert main(["push", "a"]) == 2
    assert "hf_..." in (err := capsys.readouterr().err) and "hf_a" not in err


@pytest.mark.parametrize("words", [["mask-merge", "--help"], ["memory", str(bundled_path("models/rewrite"))]], ids=["help", "a table"])
def test_a_reader_that_leaves_early_is_no_fault(words):
    "As `merge-lab ... | head -1` leaves: what was asked for is done, and there is nothing to say."
    process = subprocess.Popen([sys.executable, "-c", f"import sys; from merge_lab.cli import main; sys.exit(main({words!r}))"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 141 and "Broken pipe" not in told and "Traceback" not in told, told


def test_a_pipe_of_something_else_that_breaks_is_told(monkeypatch):
    def broken():
        raise BrokenPipeError("a worker has gone")

    with pytest.raises(BrokenPipeError, match="a worker"):
        cli.printed(broken)


def test_statuses_are_told():
    text = usage()
    assert all(f"{status}: " in text for status in EXIT) and "--quiet" in text
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{status}`" in readme for status in EXIT) and "--quiet" in readme


@pytest.mark.parametrize("mode", ["end_to_end", "layerwise"])
def test_swapped_data_are_noticed_before_training(mode, tmp_path, caplog):
    data = {str(bundled_path(f"tasks/{task}")): 24 for task in ("summarize", "rewrite")}
    with caplog.at_level(logging.WARNING):
        run(small(tmp_path, dataset_configs=data, train_mode=mode, max_steps=1, layer_steps=1, eval_samples=0, held_out_rows=4, save_merged=False), progress=False)
    assert "models and data look swapped: summarize knows the rows of rewrite better" in caplog.text
