"""The workbench notebook from top to bottom, without a browser."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    "The notebook, its seconds, and the folder that it ran in."
    execute = runpy.run_path(str(ROOT / "benchmarks/workbench.py"))["execute"]
    folder = tmp_path_factory.mktemp("workbench")
    return *execute(folder), folder


def outputs(notebook, kind):
    found = [o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])]
    return [data[kind] for data in found if kind in data]


def test_every_panel_is_there_and_no_cell_complains(executed):
    notebook, _, _ = executed
    views = outputs(notebook, "application/vnd.jupyter.widget-view+json")
    assert len(views) == 8  # options, dials, tokens, training, conversation, runs, options and run of another
    streams = [o for c in notebook.cells for o in c.get("outputs", []) if o.get("name")]
    assert not [o["text"] for o in streams if o["name"] == "stderr"]


def test_it_ends_in_figures_that_need_no_kernel(executed):
    notebook, _, _ = executed
    assert len(outputs(notebook, "image/png")) == 3
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-3:]
    assert all("image/png" in cell.outputs[0]["data"] for cell in last)


def test_its_script_leaves_a_whole_run(executed):
    run = executed[2] / "runs/script"
    assert len((run / "history.jsonl").read_text().splitlines()) == 8
    assert (run / "masks/masks.safetensors").exists() and (run / "config.yaml").exists()


def test_in_a_clone_it_works_beside_the_readme(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "nbs/workbench.ipynb").read_text(encoding="utf-8"))
    first = next(cell for cell in cells["cells"] if cell["cell_type"] == "code")
    (tmp_path / "nbs").mkdir()
    cell = tmp_path / "cell.py"
    cell.write_text("".join(first["source"]))
    monkeypatch.chdir(tmp_path / "nbs")  # where JupyterLab starts its kernel
    runpy.run_path(str(cell))
    assert Path.cwd() == tmp_path / "nbs"
    (tmp_path / "settings.ini").touch()
    for _ in range(2):  # a cell may be run again
        runpy.run_path(str(cell))
        assert Path.cwd() == tmp_path
