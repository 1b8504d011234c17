"A study of masks says what its rows are, and one that was stopped is the study it would have been."

import dataclasses

import pytest
from merge_lab import ablations
from merge_lab.ablations import AblationConfig, run, show_result
from merge_lab.config import config_from_yaml
from merge_lab.run_folder import read_rows, RunInterrupted
from small_runs import stopping_at

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


def test_a_study_that_is_stopped_goes_on_to_the_same_table(tmp_path, monkeypatch):
    "Stopped before the third of its rows; what was there is not made again."
    whole = run(AblationConfig(**SMALL, max_steps=2, output_dir=str(tmp_path / "whole")))
    config = AblationConfig(**SMALL, max_steps=2, output_dir=str(tmp_path / "cut"))
    usual = ablations.merge_masks
    monkeypatch.setattr(ablations, "merge_masks", stopping_at(3, usual))
    with pytest.raises(RunInterrupted, match="merge-lab ablate .*config.yaml --resume"):
        run(config)
    made = read_rows(tmp_path / "cut" / "rows.jsonl")
    assert [row["model"] for row in made][-2:] == ["default", "mode: output rows"]
    monkeypatch.setattr(ablations, "merge_masks", counted := stopping_at(0, usual))
    again = run(dataclasses.replace(config, resume=True))
    assert len(counted.calls) == 1 and read_rows(tmp_path / "cut" / "rows.jsonl")[: len(made)] == made
    assert again.table.drop(columns="seconds").equals(whole.table.drop(columns="seconds"))


def test_a_study_that_is_done_goes_on_with_another_axis(tmp_path, monkeypatch):
    config = AblationConfig(**SMALL, max_steps=2, output_dir=str(tmp_path / "run"))
    first = run(config)
    monkeypatch.setattr(ablations, "merge_masks", counted := stopping_at(0, ablations.merge_masks))
    more = run(dataclasses.replace(config, axes=["data"], resume=True))
    assert len(counted.calls) == 3 and more.table.loc[["mode"]].equals(first.table)
    assert list(more.table.loc["data"].index) == ["all rows", "8 rows", "32 rows", "128 rows"]
    begun, now = (config_from_yaml(AblationConfig, first.folder / "config.yaml"), config)
    assert begun.axes == ["mode", "data"] and begun.minutes / 6 == pytest.approx(now.minutes / 3)  # as much for each merge
