"A study of masks says what its rows are, and one that was stopped is the study it would have been."

import pytest
from merge_lab import ablations
from merge_lab.ablations import AblationConfig, run, show_result
from merge_lab.run_folder import read_rows

SMALL = dict(suite="toy-pair", axes=["mode"], final_val_rows=4, eval_samples=4, metric="loss")


def test_training_that_time_ended_is_told(tmp_path, caplog, capsys):
    "In the log, the table, the picture's report, and what is printed."
    result = run(AblationConfig(**SMALL, minutes=0, max_steps=60, output_dir=str(tmp_path / "run")))
    trained = [row for row in read_rows(tmp_path / "run" / "rows.jsonl") if row["model"] in ("default", "mode: output rows", "mode: one number a tensor")]
    assert [(row["steps"], row["planned"]) for row in trained] == [(1, 60)] * 3
    assert set(result.table["steps"]) == {1} and set(result.table["planned steps"]) == {60}
    assert "mode: output rows: time was over after 1 of 60 steps" in caplog.text
    show_result(result)
    for told in (capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()):
        assert "mode: output rows after 1 of 60 steps" in told
