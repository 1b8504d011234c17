"""What holds for the tree as a whole: layers, notebooks, imports, and what must not be in it."""

import json
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
MAXIMUM = {"library": 150, "study": 400}  # KB; a study makes no module


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def exported(notebook: Path) -> str | None:
    "Name of the module that a notebook makes."
    found = re.search(r"#\| default_exp (\S+)", "".join(cells(notebook)[0]["source"]))
    return found and found.group(1)


def layer(notebook: Path) -> tuple[int, int, bool]:
    "Number of the notebook, of the system inside its layer, and whether it comes after the system's parts."
    numbers = re.findall(r"(?:^|/)(\d\d)_", notebook.relative_to(ROOT / "nbs").as_posix())
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0, not notebook.stem.endswith("_parts")


MODULES = {exported(p): layer(p) for p in NOTEBOOKS if exported(p)}


def imported_modules(notebook: Path) -> set[str]:
    "Modules of the package that the exported cells import, wherever in the cell."
    found = set()
    for cell in cells(notebook):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "#| export" in source:
            found |= set(re.findall(r"^\s*from merge_lab\.([\w.]+) import", source, re.MULTILINE))
            for names in re.findall(r"^\s*from merge_lab import ([^#\n]+)", source, re.MULTILINE):
                found |= {name.split()[0] for name in names.split(",")}
    return found & set(MODULES)


@pytest.mark.parametrize(
    "notebook", [p for p in NOTEBOOKS if exported(p)], ids=lambda p: p.stem
)
def test_imports_only_go_down(notebook):
    own, name = layer(notebook), exported(notebook)
    for other in imported_modules(notebook) - {name}:
        assert MODULES[other] < own, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_formulas_are_written_with_one_backslash(notebook):
    "A doubled backslash in markdown is a line break, not a command: the formula would not render."
    for cell in cells(notebook):
        if cell["cell_type"] == "markdown":
            for formula in re.findall(r"\$[^$]+\$", "".join(cell["source"])):
                assert not re.search(r"\\\\[a-z]", formula), formula


def test_layer_rule_sees_an_import():
    training = next(p for p in NOTEBOOKS if p.stem == "31_training")
    assert {"losses", "merger", "core"} <= imported_modules(training)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_tidy(notebook):
    text = notebook.read_text(encoding="utf-8")
    budget = MAXIMUM["library" if exported(notebook) else "study"]
    assert len(text) <= budget * 1024, f"{len(text) // 1024} KB, at most {budget}"
    metadata = json.loads(text)["metadata"]
    assert "widgets" not in metadata
    assert "application/vnd.jupyter.widget-view" not in text
    for cell in cells(notebook):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", "".join(cell["source"])
            assert output.get("name") != "stderr", "".join(cell["source"])


def test_import_is_light():
    code = (
        "import sys, merge_lab, merge_lab.core, merge_lab.masks, merge_lab.anyprec\n"
        "heavy = {'transformers', 'matplotlib', 'ipywidgets', 'IPython'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_training_needs_no_pictures():
    code = (
        "import sys, merge_lab.training, merge_lab.systems.mask_merge\n"
        "heavy = {'matplotlib', 'ipywidgets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_paths_of_a_machine_and_no_large_files():
    path = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work)/\w")
    for file in tracked():
        assert file.stat().st_size < 4 * 2**20, file
        if file.suffix in (".py", ".ipynb", ".md", ".ini", ".toml", ".yaml", ".json", ""):
            text = file.read_text(encoding="utf-8", errors="ignore")
            found = path.search(text)
            assert not found, f"{file.name}: {text[found.start():found.start() + 40]!r}"


def test_readme_is_made_from_the_index():
    "Word for word, with the links that `make readme` rewrites."
    link = re.compile(r"\]\(([a-z0-9_/]+\.(?:ipynb|png))\)")
    made = ["".join(cell["source"]) for cell in cells(ROOT / "nbs" / "index.ipynb")]
    made = [link.sub(r"](nbs/\1)", text).strip() for text in made]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.split(r"\n+", readme.strip()) == re.split(r"\n+", "\n\n".join(made))


INHERITED = re.compile(r"on_\w+|forward|step|compute_loss|extra_repr")  # described by torch and transformers


def public_functions():
    "Public functions and methods of the package, with the module's name."
    for file in sorted((ROOT / "merge_lab").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
        for owner in owners if not file.name.startswith("_") else ():
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    yield f"{file.stem}.{getattr(owner, 'name', '')}.{node.name}".replace("..", "."), node


def raises_itself(node: ast.FunctionDef) -> bool:
    "Whether the body, without functions inside it, raises something new."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if (isinstance(child, ast.Raise) and child.exc is not None) or raises_itself(child):
            return True
    return False


def test_public_functions_say_what_they_do_and_what_they_raise():
    silent = [name for name, node in public_functions() if not ast.get_docstring(node) and not INHERITED.fullmatch(node.name)]
    assert not silent
    documented = [(name, node, ast.get_docstring(node)) for name, node in public_functions() if ast.get_docstring(node)]
    untold = [name for name, node, text in documented if raises_itself(node) and not re.search(r"[Rr]aise|[Rr]efuse", text)]
    assert not untold and sum(raises_itself(node) for _, node, _ in documented) > 100
