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


def layer(notebook: Path) -> tuple[int, int]:
    "Number of the notebook, and of the system inside its layer."
    numbers = re.findall(r"(?:^|/)(\d\d)_", notebook.relative_to(ROOT / "nbs").as_posix())
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


MODULES = {exported(p): layer(p) for p in NOTEBOOKS if exported(p)}


REGISTRY = "commands"  # its tables are names only, for whoever asks what there is to run: the one module that may name what is above it
UNTOLD = "a name that is put together"


def exported_source(notebook: Path) -> str:
    "What goes into the module."
    sources = ["".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]
    return "\n".join(source for source in sources if "#| export" in source)


def named(node: ast.AST) -> list[str]:
    "Dotted names that a piece of code imports: by a statement, or anywhere in a string, which may be a name to look up or code for another process."
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and len(node.args) > 1:  # import_module(".lora", "merge_lab.systems")
        texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        return [texts[1] + texts[0]] if len(texts) == 2 and texts[0].startswith(".") else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found = re.findall(r"\bmerge_lab(?:\.\w+)+", node.value)
        several = re.findall(r"\bfrom (merge_lab(?:\.\w+)*) import ([\w, ]+)", node.value)
        return found + [f"{module}.{name}" for module, names in several for name in re.findall(r"\w+", names)]
    parts = node.values[:-1] if isinstance(node, ast.JoinedStr) else [node.left, getattr(node.left, "right", None)] if isinstance(node, ast.BinOp) else []
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return [f"{text}{UNTOLD}" for text in (re.search(r"(?:\bmerge_lab\.[\w.]*)?$", text)[0] for text in texts) if text]


def docstrings(tree: ast.AST) -> list[ast.AST]:
    "What describes modules, classes and functions: it names what it likes."
    owners = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    first = [node.body[0].value for node in owners if node.body and isinstance(node.body[0], ast.Expr)]
    return [node for node in first if isinstance(node, ast.Constant)]


def imported_modules(source: str, strings: bool = True) -> set[str]:
    "Modules of the package that code imports, wherever in it; `UNTOLD` for a string that is only the beginning of a name."
    tree, found = ast.parse(source), set()
    aside = set(docstrings(tree))
    for node in ast.walk(tree):
        if node in aside or not strings and not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for name in named(node):
            if name.startswith("merge_lab."):
                parts = name.split(".")[1:]
                found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & set(MODULES)
                found |= {UNTOLD} if name.endswith(UNTOLD) else set()
    return found


def wrong_imports(name: str, source: str) -> set[str]:
    "What a module imports and may not: what is not below it, and, for a system, any other system."
    imported, own = imported_modules(source, strings=name != REGISTRY) - {name}, MODULES[name]
    systems = {other for other in imported if name.startswith("systems.") and other.startswith("systems.")}
    return {other for other in imported if other == UNTOLD or MODULES[other] >= own} | systems


@pytest.mark.parametrize(
    "notebook", [p for p in NOTEBOOKS if exported(p)], ids=lambda p: p.stem
)
def test_imports_only_go_down(notebook):
    assert not wrong_imports(exported(notebook), exported_source(notebook))


@pytest.mark.parametrize(
    "name, source, wrong",
    [
        ("losses", "from merge_lab.training import TrainConfig", "training"),
        ("losses", "def late():\n    from merge_lab import core, cli as face", "cli"),
        ("losses", "import merge_lab.runs", "runs"),
        ("runs", "find_object('merge_lab.systems.lora.SmoLoRA')(base)", "systems.lora"),
        ("runs", "importlib.import_module('merge_lab.systems.lora')", "systems.lora"),
        ("runs", "import_module('.lora', 'merge_lab.systems')", "systems.lora"),
        ("runs", "where = 'merge_lab.systems.lora.SmoLoRA'", "systems.lora"),
        ("runs", "find_object(f'merge_lab.systems.{name}.run')", UNTOLD),
        ("runs", "find_object('merge_lab.' + name)", UNTOLD),
        ("runs", "RUN = f'{HEAR}; from merge_lab.cli import main; sys.exit(main())'", "cli"),
        ("runs", "RUN = 'import sys\\nimport merge_lab.cli as face'", "cli"),
        ("runs", "RUN = 'from merge_lab import core, cli'", "cli"),
        ("runs", "RUN = f'from merge_lab.systems.{name} import run'", UNTOLD),
        ("runs", "RUN = 'import merge_lab.' + name", UNTOLD),
        ("runs", "RUN = HEAR + '; import merge_lab.' + name", UNTOLD),
        ("systems.lora_merge", "from merge_lab.systems.lora import run", "systems.lora"),
        ("systems.lora_merge", "from merge_lab.systems import lora", "systems.lora"),
        ("systems.lora_merge", "find_object('merge_lab.systems.lora.run')", "systems.lora"),
        (REGISTRY, "from merge_lab.systems.lora import run", "systems.lora"),
    ],
)
def test_layer_rule_fails_on_a_planted_import(name, source, wrong):
    assert wrong in wrong_imports(name, f"from merge_lab.config import option\n{source}\n")


@pytest.mark.parametrize(
    "name, source",
    [
        ("training", "from merge_lab.losses import LOSSES\nfind_object('merge_lab.merger.Merger')"),
        ("systems.lora_merge", "from merge_lab.adapters import load_base"),
        (REGISTRY, "saved = 'merge_lab.systems.lora_merge.AdapterMerger'"),
        ("runs", "COMMANDS['lora'].find('SmoLoRA')  # what the registry names"),
        ("runs", "RUN = f'{HEAR}; from merge_lab.commands import COMMANDS'"),
        ("runs", "def drawn():\n    'As merge_lab.cli does.'\n    text = f'written by merge_lab. {name}'"),
    ],
)
def test_layer_rule_allows_what_is_below_and_the_registry(name, source):
    assert not wrong_imports(name, source)


def dead_links(notebook: Path) -> list[str]:
    "Links in a notebook's text that lead to no file of the tree."
    dead = []
    for cell in cells(notebook):
        for target in re.findall(r"\]\(([^)\s]+)\)", "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""):
            if not re.match(r"\w+:", target):
                place = (notebook.parent / target.partition("#")[0]).resolve()
                dead += [] if place.exists() and place.is_relative_to(ROOT) else [target]
    return dead


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_to_files_that_there_are(notebook):
    assert not dead_links(notebook)


def test_a_planted_dead_link_is_found(tmp_path):
    text = "[a](nowhere.ipynb), [b](https://example.com/x), [c](../README.md), [d](../nbs/index.ipynb#goal), ![e](images/none.png)"
    planted = tmp_path / "planted.ipynb"
    planted.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": [text]}, {"cell_type": "code", "source": ["table[0](x)"]}]}))
    assert dead_links(planted) == ["nowhere.ipynb", "../README.md", "../nbs/index.ipynb#goal", "images/none.png"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_formulas_are_written_with_one_backslash(notebook):
    "A doubled backslash in markdown is a line break, not a command: the formula would not render."
    for cell in cells(notebook):
        if cell["cell_type"] == "markdown":
            for formula in re.findall(r"\$[^$]+\$", "".join(cell["source"])):
                assert not re.search(r"\\\\[a-z]", formula), formula


def test_layer_rule_sees_an_import():
    training = next(p for p in NOTEBOOKS if p.stem == "31_training")
    assert {"held_out", "merger", "config"} <= imported_modules(exported_source(training))


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


MATHEMATICS = [name for name, place in MODULES.items() if 10 <= place[0] < 20]


@pytest.mark.parametrize(
    "modules, heavy",
    [
        (["core"], {"transformers", "matplotlib", "ipywidgets", "IPython"}),
        (MATHEMATICS, {"transformers", "matplotlib", "ipywidgets", "IPython"}),
        (["training", "systems.mask_merge"], {"matplotlib", "ipywidgets"}),
    ],
    ids=["the package", "the floor of mathematics", "training needs no pictures"],
)
def test_imports_bring_nothing_heavy(modules, heavy, request):
    assert modules
    if "transformers" not in heavy:  # which is there in what is forked; nothing else that is looked for is
        request.getfixturevalue("forked")
    names = ", ".join(f"merge_lab.{name}" for name in modules)
    code = f"import sys\nassert not {heavy} & set(sys.modules)\nimport merge_lab, {names}\nfound = {heavy} & set(sys.modules)\nassert not found, found"
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


def test_no_link_is_tracked():
    "A link to an environment in place of its folder, once merged elsewhere, takes the place of the environment there."
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    assert not [line for line in listed if line.startswith("120000")]


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


MAKERS = {"stopped": "RunInterrupted"}  # functions that make an exception, and what they make


def raised_by(node: ast.AST) -> set[str]:
    "Names of the exception classes that a body raises new, without those of functions inside it."
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(child, ast.Raise) and child.exc is not None:
            made = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
            name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
            found |= {MAKERS.get(name, name)} if name in MAKERS or name[:1].isupper() else set()
        found |= raised_by(child)
    return found


def untold_exceptions(node: ast.FunctionDef) -> set[str]:
    "What a function raises itself and its docstring does not name; where it says that it raises, it names something."
    text = ast.get_docstring(node) or ""
    vague = re.search(r"\bRaises? ", text) and not re.search(r"\bRaises? (what|as) |`[\w.]*[A-Z]\w+`", text)
    return {name for name in raised_by(node) if f"`{name}`" not in text} | ({"a name"} if vague else set())


def test_public_functions_name_what_they_raise():
    found = {name: untold_exceptions(node) for name, node in public_functions() if not INHERITED.fullmatch(node.name)}
    assert not {name: missing for name, missing in found.items() if missing}


@pytest.mark.parametrize(
    "text, body, missing",
    [
        ("Raises `ValueError` for x.", "raise TypeError('x')", {"TypeError"}),
        ("Raises `ValueError` for x.", "if x:\n        raise yaml.constructor.ConstructorError(None)", {"ConstructorError"}),
        ("Stop.", "raise stopped(state, 'x', 'y')", {"RunInterrupted"}),
        ("Raises for x.", "pass", {"a name"}),
        ("Raises `ValueError` for x.", "raise ValueError('x')", set()),
        ("Raises what `check_run` raises.", "def inner():\n        raise ValueError", set()),
        ("Raises what the thread raised.", "raise error", set()),
    ],
)
def test_an_exception_that_is_not_named_is_found(text, body, missing):
    (node,) = ast.parse(f'def f(x):\n    "{text}"\n    {body}\n').body
    assert untold_exceptions(node) == missing


def test_no_module_is_too_long_to_read():
    for file in sorted((ROOT / "merge_lab").rglob("*.py")):
        if not file.name.startswith("_"):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            assert lines <= 700, f"{file.name}: {lines} lines; split it by content"
            assert not file.stem.endswith("_parts"), f"{file.name}: name it for what is in it"


def is_class(node: ast.AST) -> bool:
    "Whether an expression is a name in the form of a class's."
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return bool(re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name))


def changed_classes(source: str) -> list[str]:
    "Where code gives an object another class, or a class something from outside without the one helper."
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []
        parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        found += [part for part in parts if isinstance(part, ast.Attribute) and (part.attr == "__class__" or is_class(part.value))]
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("setattr", "__setattr__") and node.args:
            named = any(isinstance(arg, ast.Constant) and arg.value == "__class__" for arg in node.args)
            found += [node] if named or is_class(node.args[0]) else []
    return [ast.unparse(node) for node in found]


def leaked_methods(source: str) -> set[str]:
    "Names in `__all__` that are methods, added to a class by a decorator."
    tree, told = ast.parse(source), set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            told = {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
    added = [node for node in tree.body if isinstance(node, ast.FunctionDef) for call in node.decorator_list if isinstance(call, ast.Call)
             and call.args and is_class(call.args[0])]  # fmt: skip
    return {node.name for node in added} & told


MODULE_FILES = sorted(file for file in (ROOT / "merge_lab").rglob("*.py") if not file.name.startswith("_"))


@pytest.mark.parametrize("file", MODULE_FILES, ids=lambda file: file.stem)
def test_classes_are_changed_in_one_way(file):
    "Methods stand in their class or are added by `patch_to`; nothing becomes of another class; a method is no name of its module."
    source = file.read_text(encoding="utf-8")
    assert not changed_classes(source)
    assert not leaked_methods(source)


@pytest.mark.parametrize(
    "source",
    [
        "layer.__class__ = Mergeable", "def f(layer):\n    layer.module.__class__ = type(layer).__mro__[1]", "a, layer.__class__ = 1, Plain",
        "setattr(layer, '__class__', Plain)", "object.__setattr__(layer, '__class__', Plain)", "Merger.from_config = classmethod(_from_config)",
        "NestedModel.set_precision = set_precision", "def late():\n    transformers.Trainer.log = log", "Model.state = Model.mask_state = state",
        "setattr(Merger, 'alphas', alphas)", "Merger.steps += 1", "del Merger.alphas", "Merger.limit: int = 3",
    ],
)  # fmt: skip
def test_a_planted_change_of_a_class_is_found(source):
    assert changed_classes(f"from merge_lab.config import option\n{source}\n")


def test_a_planted_method_among_a_modules_names_is_found():
    source = "__all__ = ['Merger', 'alphas']\n@{}(Merger)\n@torch.no_grad()\ndef alphas(self):\n    pass\n"
    assert all(leaked_methods(source.format(name)) == {"alphas"} for name in ("method_of", "patch_to"))
    assert not changed_classes("self.state = None\nconfig.use_cache = False\nLOSSES.kl = row\nsetattr(config, key, value)\nreturn_class = type(x).__class__")
    assert not leaked_methods(source.format("patch_to").replace(", 'alphas'", ""))


def lines_of(cell: dict) -> list[str]:
    "Lines of a cell that are not blank, without its directive."
    return [line for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith("#|")]


def is_exported(cell: dict) -> bool:
    "Whether a cell defines something that goes into the module."
    source = "".join(cell["source"])
    return cell["cell_type"] == "code" and bool(re.match(r"#\| exporti?\b", source) and re.search(r"^(async def|def|class|\w+ ?[:=])", source, re.MULTILINE))


def test_notebooks_show_what_they_define_in_small_pieces():
    "Nine in ten exports within 25 lines, none above 50; two in three are followed at once by a cell that shows them at work."
    sizes, followed = [], []
    for notebook in NOTEBOOKS:
        all_cells = cells(notebook)
        for cell, after in zip(all_cells, [*all_cells[1:], None]):
            if is_exported(cell):
                sizes.append(len(lines_of(cell)))
                assert sizes[-1] <= 50, f"{notebook.stem}: {sizes[-1]} lines in the cell {lines_of(cell)[0]!r}"
                followed.append(after is not None and after["cell_type"] == "code" and not "".join(after["source"]).startswith("#| export"))
    assert sorted(sizes)[int(0.9 * len(sizes))] <= 25
    assert sum(followed) / len(followed) >= 0.65


def test_options_say_themselves_what_a_resumed_run_may_change():
    "Where a run is written, how it is started and where it is computed makes no other run, whatever the system."
    from merge_lab.commands import COMMANDS
    from merge_lab.config import resumable_options
    from merge_lab.loop_config import LoopConfig

    for name, command in COMMANDS.items():
        config = command.find(command.config)
        fields = set(config.__dataclass_fields__)
        if "resume" in fields:
            free = resumable_options(config)
            assert {"resume", "overwrite"} & fields <= free, name
            assert {"output_dir", "device", "report_to", "save_steps"} & fields <= free, name
            told = {field.name for field in config.__dataclass_fields__.values() if field.metadata.get("recipe", True)}
            assert not {"output_dir", "device", "resume", "overwrite", "report_to", "save_steps", "save_total_limit"} & told, name
            assert not {"seed", "learning_rate", "model_paths", "adapters", "datasets"} & free, name
            if issubclass(config, LoopConfig):
                assert resumable_options(LoopConfig) <= free, name


def test_older_module_names_lead_to_the_new_rooms():
    import importlib

    for old, name, home in [
        ("core", "begin_run", "run_folder"), ("tasks", "ChatCollator", "chat"), ("widgets", "ConfigPanel", "panel"),
        ("systems.lora_parts", "prepare_dataset", "sft_data"), ("systems.router_parts", "text_windows", "text_windows"),
        ("systems.layer_merge_parts", "prepare_calibration_data", "calibration"), ("training", "RunInterrupted", "run_folder"),
    ]:  # fmt: skip
        found = [getattr(importlib.import_module(f"merge_lab.{module}"), name) for module in (old, home)]
        assert found[0] is found[1], old
    with pytest.raises(AttributeError, match="it was divided into sft_data"):
        getattr(importlib.import_module("merge_lab.systems.lora_parts"), "no_such" + "_name")
