"""The table of runs: what it finds where runs were moved, what it refuses to delete, and what a kill leaves."""

import json
from pathlib import Path

import pytest

from merge_lab import run_table
from merge_lab.cli import main
from merge_lab.run_table import NOTES_FILE, delete_run, empty_trash, find_lineage, find_trash, read_notes, restore_run, RunTable, trash_of, write_notes
from merge_lab.run_folder import clear_run
from merge_lab.run_table_view import grid_frame, lineage_columns, lineage_svg, make_grid
from merge_lab.runs import find_runs

MARK = "# The options of a run, written by merge_lab.\n"


def make_run(place: Path, **options):
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(MARK + "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    (place / "history.jsonl").write_text('{"step": 1, "loss": 0.5}\n')


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/poet", lora_dropout=0, base_model="models/base", output_dir="runs/poet")
    make_run(tmp_path / "runs/both", dataset_configs={"tasks/a": 1}, model_paths=["runs/poet/final_merged", "models/lawyer"])
    return tmp_path / "runs"


def test_lineage_is_found_from_elsewhere_and_from_what_a_run_noted_itself(runs, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    make_run(runs / "third", n_pairs=1)
    (runs / "third/inputs.json").write_text(json.dumps({"inputs": [[str(runs / "both/merged"), "0" * 32], ["", None]]}))
    make_run(runs / "fourth", dataset_configs={})
    (runs / "fourth/masks").mkdir()
    (runs / "fourth/masks/merger_config.json").write_text(json.dumps({"model_paths": ["../../third/merged"], "base_model": None}))
    monkeypatch.chdir(elsewhere)
    found = {(row.run, row.part, row.of) for row in find_lineage(runs).itertuples()}
    wanted = {("both", "final_merged", "poet"), ("third", "merged", "both"), ("fourth", "merged", "third")}
    assert wanted <= found and ("both", "", "lawyer") in found and ("poet", "", "base") in found


def test_a_folder_that_a_run_names_as_its_own_or_holds_is_no_parent(runs):
    make_run(runs / "suite", model_paths=["runs/suite/part/merged"])
    make_run(runs / "suite/part", dataset_configs={}, base_model="runs/suite/base")
    lineage = find_lineage(runs)
    assert lineage.query("run == 'suite'").to_dict("records") == [{"run": "suite", "part": "merged", "of": "suite/part"}]
    assert "suite" not in set(lineage.query("run == 'suite/part'")["of"])
    with pytest.raises(ValueError, match="suite holds other runs: suite/part"):
        delete_run("suite", runs)


def test_only_runs_are_deleted(runs, tmp_path):
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/mine/config.yaml").write_text("n_pairs: 1\n")  # by hand
    for name, says in (("mine", "not a run that merge_lab began"), ("models", "run='models'"), ("../runs", "expected one of"), ("", "expected one of"), ("poet", "is a component of both")):
        with pytest.raises(ValueError, match=says):
            delete_run(name, runs)
    assert find_trash(runs).empty and len(find_runs(runs)) == 3 and not trash_of(runs).exists()


def test_a_kill_between_the_note_and_the_move_leaves_the_run(runs, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_table.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_run("both", runs)
    monkeypatch.undo()
    assert "both" in find_runs(runs).index and find_trash(runs).empty and not list(trash_of(runs).iterdir())


@pytest.fixture
def nested(runs):
    make_run(runs / "suite", dataset_configs={})
    make_run(runs / "suite/part", dataset_configs={})
    return runs


def files_of(folder: Path) -> dict:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def failing_at(monkeypatch, number: int, after: bool = False):
    "The move of this number fails, before or after it is made; others go on."
    moves, rename = [], run_table.os.rename

    def move(source, target):
        moves.append(target)
        if after or len(moves) != number:
            rename(source, target)
        if len(moves) == number:
            raise OSError("the disk is gone")

    monkeypatch.setattr(run_table.os, "rename", move)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("after", [False, True])
def test_runs_go_and_come_back_all_or_none_where_a_move_fails(nested, monkeypatch, number, after):
    names, before = ["both", "suite", "suite/part"], files_of(nested)
    failing_at(monkeypatch, number, after)
    with pytest.raises(OSError, match="disk is gone"):
        RunTable(nested).delete_all(names)
    monkeypatch.undo()
    assert files_of(nested) == before and find_trash(nested).empty and not list(trash_of(nested).iterdir())
    RunTable(nested).delete_all(names)
    failing_at(monkeypatch, number, after)
    with pytest.raises(OSError, match="disk is gone"):
        RunTable(nested).undo_all(names)
    monkeypatch.undo()
    assert set(find_trash(nested)["run"]) == set(names) and not (nested / "both").exists() and not (nested / "suite").exists()
    assert RunTable(nested).undo_all(["suite/part", "suite", "both"]) and files_of(nested) == before and find_trash(nested).empty


def test_a_place_that_another_run_brings_back_with_it_is_taken(nested):
    RunTable(nested).delete_all(["suite/part"])
    (nested / "suite/part").mkdir()
    RunTable(nested).delete_all(["suite"])
    with pytest.raises(FileExistsError, match="suite holds something at .*part"):
        RunTable(nested).undo_all(["suite/part", "suite"])
    assert set(find_trash(nested)["run"]) == {"suite", "suite/part"} and not (nested / "suite").exists()


def test_several_runs_are_noted_all_or_none_where_a_write_fails(runs, monkeypatch):
    write_notes(runs / "poet", "rhymes", ["paper"])
    written, write = [], run_table.write_json

    def fail(file, values):
        written.append(file)
        if len(written) == 2:
            raise OSError("the disk is full")
        write(file, values)

    monkeypatch.setattr(run_table, "write_json", fail)
    with pytest.raises(OSError, match="disk is full"):
        RunTable(runs).note_all(["poet", "both"], tags=["new"])
    assert read_notes(runs / "poet") == {"note": "rhymes", "tags": ["paper"]} and read_notes(runs / "both") == {"note": "", "tags": []}


def test_what_is_deleted_is_listed_nowhere_and_comes_back_whole(runs, tmp_path):
    write_notes(runs / "both", "kept", ["paper"])
    before = {file.relative_to(runs): file.read_bytes() for file in (runs / "both").rglob("*") if file.is_file()}
    delete_run("both", runs)
    assert list(find_runs(runs).index) == ["poet"] and list(find_runs(tmp_path).index) == ["runs/poet"]
    assert restore_run(folder=runs) == "both" and find_trash(runs).empty
    after = {file.relative_to(runs): file.read_bytes() for file in (runs / "both").rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == before


def test_a_trash_that_was_tampered_with_restores_nothing_elsewhere_and_empties_only_its_own(runs, tmp_path):
    entry = delete_run("both", runs).parent
    told = json.loads((entry / "deleted.json").read_text())
    (entry / "deleted.json").write_text(json.dumps(told | {"run": "../../stolen"}))
    with pytest.raises(ValueError, match="no place beside the runs"):
        restore_run(folder=runs)
    (trash_of(runs) / "mine").mkdir()
    (trash_of(runs) / "mine/letter.txt").write_text("keep")
    assert empty_trash(runs) == ["../../stolen"] and (trash_of(runs) / "mine/letter.txt").exists() and not entry.exists()


def test_damaged_notes_hide_no_run(runs):
    (runs / "both/notes.json").write_text('{"note": "cut o')
    assert read_notes(runs / "both") == {"note": "", "tags": []} and RunTable(runs).table().loc["both", "note"] == ""
    with pytest.raises(ValueError, match="these notes are damaged|notes.json"):
        write_notes(runs / "both", tags=["again"])
    (runs / "both/notes.json").unlink()
    RunTable(runs).note("both", tags=["again"])
    assert read_notes(runs / "both")["tags"] == ["again"]


def test_the_command(runs, capsys):
    assert main(["runs", "both", "--note", "it rhymes", "--tags", "paper"]) == 0
    assert main(["runs", "--tag", "paper", "--sort", "loss"]) == 0
    told = capsys.readouterr().out
    assert "it rhymes" in told and "poet " not in told.splitlines()[-1]
    assert main(["runs", "poet", "--delete"]) == 2 and "--used" in capsys.readouterr().err
    assert main(["runs", "poet", "--delete", "--used"]) == 0 and not (runs / "poet").exists()
    assert main(["runs", "--undo"]) == 0 and (runs / "poet").exists()
    assert main(["runs", "--lineage"]) == 0 and "both is made of poet (final_merged)" in capsys.readouterr().out
    assert main(["runs", "nowhere", "--note", "x"]) == 2
    assert main(["runs", "both", "--tags", "none"]) == 0 and read_notes(runs / "both") == {"note": "it rhymes", "tags": []}
    assert main(["runs", "both", "--note", "none"]) == 0 and read_notes(runs / "both") == {"note": "", "tags": []}


@pytest.mark.parametrize("words, says", [
    (["both", "nowhere", "--delete"], "run='nowhere'"), (["both", "nowhere", "--tags", "x"], "run='nowhere'"), (["both", "poet", "--tags", "a b"], "tag 'a b'"),
    (["nowhere"], "run='nowhere'"), (["--folder", "nowhere"], "nowhere: no such folder"), (["poet", "--delete"], "poet is a component of both"),
    (["nowhere", "--empty_trash"], "run='nowhere': the trash is empty"),
])  # fmt: skip
def test_the_command_does_all_or_nothing(runs, capsys, words, says):
    before = {file.relative_to(runs): file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    assert main(["runs", *words]) == 2
    told = capsys.readouterr().err
    assert says in told and "(--used)" not in told
    assert before == {file.relative_to(runs): file.read_bytes() for file in runs.rglob("*") if file.is_file() and file.name != ".lock"} and find_trash(runs).empty


def test_a_run_that_is_named_is_the_one_that_is_shown_and_goes_with_what_is_made_of_it(runs, capsys):
    assert main(["runs", "poet"]) == 0
    shown = capsys.readouterr().out
    assert "poet" in shown and "both" not in shown
    assert main(["runs", "poet", "both", "--delete"]) == 0 and set(find_trash(runs)["run"]) == {"poet", "both"}
    assert main(["runs", "poet", "nowhere", "--undo"]) == 2 and len(find_trash(runs)) == 2
    assert main(["runs", "poet", "--empty_trash"]) == 0 and find_trash(runs)["run"].tolist() == ["both"]
    assert main(["runs", "both", "--undo"]) == 0 and find_lineage(runs).query("run == 'both'")["of"].tolist() == ["poet", "lawyer"]


def test_notes_are_the_users_and_stay_when_a_run_is_overwritten(runs):
    write_notes(runs / "both", "the first try", ["paper"])
    (runs / "both/masks").mkdir()
    clear_run(runs / "both")
    assert [path.name for path in (runs / "both").iterdir()] == [NOTES_FILE] and read_notes(runs / "both")["note"] == "the first try"


def test_thirty_runs_are_drawn_apart_and_names_are_text(tmp_path):
    for i in range(30):
        make_run(tmp_path / f"runs/run-{i:02}-of-a-long-name", dataset_configs={}, model_paths=[f"runs/run-{j:02}-of-a-long-name/merged" for j in range(max(0, i - 2), i) if i % 6])
    make_run(tmp_path / "runs/<img src=x onerror=alert(1)>", n_pairs=1)
    runs = RunTable(tmp_path / "runs")
    table, lineage = runs.table(), runs.lineage()
    drawn = lineage_svg(table, lineage)
    assert "<img" not in drawn and drawn.count("<rect") == 31
    columns = lineage_columns(lineage, list(table.index))
    place = {name: i for i, column in enumerate(columns) for name in column}
    assert len(place) == 31 and all(place[row.of] < place[row.run] for row in lineage.itertuples())
    assert "<img" not in make_grid(grid_frame(table))._dt_args["data_json"]


def test_damaged_notes_are_not_written_over(tmp_path):
    for text in ('{"note": "precious", "tags": ["x"],', '{"note": "precious", "tags": 5}'):
        (tmp_path / NOTES_FILE).write_text(text)
        with pytest.raises(ValueError, match="notes.json"):
            write_notes(tmp_path, tags=["new"])
        assert (tmp_path / NOTES_FILE).read_text() == text
