"""What the documentation site shows of notebooks and modules; `make docs` builds it and fails at a broken link."""

import dataclasses
import fnmatch
import importlib.util
import json
from pathlib import Path

import pytest

from merge_lab.config import option

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"blend": "merge_lab.masks.blend"}


@pytest.fixture(scope="module")
def pages():
    found = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def notebook(*cells: tuple[str, str]) -> str:
    made = []
    for i, (kind, source) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"{i:08x}", "metadata": {}, "source": source}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_a_page_shows_code_without_directives_and_names_its_module(pages):
    page = pages.read_notebook(notebook(
        ("code", "#| default_exp masks"),
        ("markdown", "# Masks\n\n> What a mask is.\n\nProse."),
        ("code", "%matplotlib inline\n%config Inline = 1"),
        ("code", "#| hide\nsecret = 1"),
        ("code", "#| export\nx = 100 % 7\n%time x\ny = 2"),
        ("code", "#| hide_input\nplot()"),
    ), NAMES)  # fmt: skip
    head, *code = page.cells
    assert head.source == "# Masks\n\n> What a mask is.\n\nModule {py:mod}`merge_lab.masks`.\n\nProse."
    assert [cell.source for cell in code] == ["x = 100 % 7\ny = 2", "plot()"]
    assert [cell.metadata.get("tags", []) for cell in code] == [[], ["hide-input"]]


def test_names_of_the_package_lead_to_the_reference(pages):
    link = "{py:obj}`blend <merge_lab.masks.blend>`"
    assert pages.link_names("See `blend`, not `other` or ``blend``.", NAMES) == f"See {link}, not `other` or ``blend``."
    for untouched in ("## `blend` in a heading", "[`blend`](x.ipynb) in a link", "```\n`blend`\n```"):
        assert pages.link_names(untouched, NAMES) == untouched
    assert pages.link_names("```\n`blend`\n```\n`blend`", NAMES).endswith(link)
    known = pages.known_names()
    assert known["constrain"] == "merge_lab.constraints.constrain"
    assert "run" not in known, "several systems have one: it says nothing of which is meant"


def test_every_notebook_has_its_place_in_the_contents(pages):
    entries = [line for line in pages.contents(ROOT).splitlines() if line.startswith("nbs/")]
    shown = {}
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        if not any(part.startswith(".") for part in path.parts):
            depth = name.count("/")  # a star of Sphinx ends at a slash
            shown[name] = [entry for entry in entries if fnmatch.fnmatch(name, entry) and entry.count("/") == depth]
    assert {name: len(found) for name, found in shown.items()} == {name: int(name != "nbs/index") for name in shown}


def test_reference_has_a_page_for_each_module_and_none_for_what_is_gone(pages, tmp_path):
    stale = tmp_path / "reference" / "merge_lab.gone.rst"
    stale.parent.mkdir()
    stale.write_text("")
    pages.gather(ROOT, tmp_path)
    made = {page.stem for page in (tmp_path / "reference").glob("merge_lab.*.rst")}
    exported = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "merge_lab").rglob("[a-z]*.py")}
    assert made == exported
    listed = (tmp_path / "reference" / "index.rst").read_text(encoding="utf-8")
    assert all(f"   {module}\n" in listed for module in made)
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")


@dataclasses.dataclass
class Options:
    "Of an example."

    rate: float = option(0.1, "Step size of *all* masks", low=0, high=1)
    way: str = option("up", "Where to", choices={"up": 1, "down": 2})
    rows: list = option([], "What is read")
    plain: int = 3  # said beside it


def test_docments_and_options_are_told(pages):
    from merge_lab.constraints import constrain

    lines = ["Alphas of `these` masks: *any*."]
    pages.tell_parameters(None, "function", "constrain", constrain, None, lines)
    assert lines[0] == r"Alphas of `these` masks: \*any\*."
    assert ":param mode: a key of CONSTRAINTS" in lines and ":type mode: str" in lines
    assert ":returns: n alphas of shape (...), same dtype" in lines and ":rtype: list[torch.Tensor]" in lines

    lines = []
    pages.tell_parameters(None, "class", "Options", Options, None, lines)
    assert ":param rate: Step size of \\*all\\* masks; 0 to 1; default ``0.1``" in lines
    assert ":param way: Where to; one of ``up``, ``down``; default ``'up'``" in lines
    assert ":param rows: What is read; default ``[]``" in lines
    assert ":param plain: said beside it" in lines
    assert pages.short_signature(None, "class", "Options", Options, None, "(rate=...)", None) == ("", None)


def test_methods_are_told_of_once(pages):
    from merge_lab import runs

    assert pages.is_told_elsewhere(None, "module", "export", runs.Run.export, False, None)
    assert pages.is_told_elsewhere(None, "class", "export", runs.Run.export, False, None) is None
    assert pages.is_told_elsewhere(None, "module", "find_runs", runs.find_runs, False, None) is None
    assert pages.is_told_elsewhere(None, "class", "dumps", json.dumps, False, None), "another library's"
