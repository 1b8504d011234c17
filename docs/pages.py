"""What stands between the repository and its site: notebooks without directives, signatures from docments."""

import dataclasses
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
from fastcore.docments import docments

MODULE_PAGE = """{title}
{line}

.. automodule:: {module}
   :members:
   :exclude-members: logger
"""

REFERENCE_PAGE = """Modules
=======

The public names of each module, in the order of the notebooks that make them. All names stand in the :ref:`index <genindex>`.

.. toctree::
   :maxdepth: 1

"""


def modules_of(nbs: Path) -> dict[str, Path]:
    "Notebooks by the module that they make, in the order of their numbers."
    found = {}
    for notebook in sorted(nbs.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in notebook.parts:
            continue
        first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
        if made := re.search(r"#\| default_exp (\S+)", first):
            found[f"merge_lab.{made.group(1)}"] = notebook
    return found


def write_changed(page: Path, text: str):
    "Write a page if it says something new, so that what is built from it stays where it does not."
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")


def gather(root: Path, folder: Path):
    "Lay out what the site is made from: what is written, and a page of reference for each module."
    shutil.rmtree(folder / "nbs", ignore_errors=True)
    shutil.copytree(root / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*"))
    for name, original in {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}.items():
        if (root / original).exists():
            write_changed(folder / name, (root / original).read_text(encoding="utf-8"))
    modules = list(modules_of(root / "nbs"))
    for page in (folder / "reference").glob("merge_lab.*.rst"):
        if page.stem not in modules:
            page.unlink()
    for module in modules:
        title = module.removeprefix("merge_lab.")
        write_changed(folder / "reference" / f"{module}.rst", MODULE_PAGE.format(title=title, line="=" * len(title), module=module))
    write_changed(folder / "reference" / "index.rst", REFERENCE_PAGE + "".join(f"   {module}\n" for module in modules))


def contents(root: Path) -> str:
    "The table of contents, in the words of Sphinx: what to do, what to read, what to look up."
    systems = [f"nbs/{path.name}/*" for path in sorted((root / "nbs").iterdir()) if path.is_dir() and path.name[:1].isdigit()]
    sections = {
        "Start": ["nbs/workbench"],
        "Systems": systems,
        "Studies": ["nbs/studies/*"],
        "Library": [f"nbs/{digit}*" for digit in sorted({path.name[0] for path in (root / "nbs").glob("[0-9]*.ipynb")})],
        "Project": ["reference/index", *(name for name in ("CONTRIBUTING", "CHANGELOG") if (root / f"{name}.md").exists())],
    }
    made = []
    for caption, entries in sections.items():
        lines = ["```{toctree}", f":caption: {caption}", ":hidden:", ":glob:", "", *entries, "```"]
        made.append("\n".join(lines))
    return "\n\n".join(made)


def known_names() -> dict[str, str]:
    "Where a name of the package is told of, for names that only one module has."
    from merge_lab._modidx import d

    places: dict[str, list[str]] = {}
    for module, symbols in d["syms"].items():
        for symbol in symbols:
            name = symbol.removeprefix(f"{module}.")
            if "." not in name and not name.startswith("_"):
                places.setdefault(name, []).append(symbol)
    return {name: found[0] for name, found in places.items() if len(found) == 1}


def link_names(text: str, names: dict[str, str]) -> str:
    "Prose in which code that is a name of the package leads to its place in the reference."

    def link(match):
        name = match.group(1)
        return f"{{py:obj}}`{name} <{names[name]}>`" if name in names else match.group(0)

    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        plain = fenced or line.startswith("#") or "](" in line
        lines.append(line if plain else re.sub(r"(?<![`\w}])`([A-Za-z]\w*)`(?!`)", link, line))
    return "\n".join(lines)


def read_notebook(text: str, names: dict[str, str] | None = None):  # names: None for those of the package
    "A notebook as the site shows it: no directives, no magics, and names that lead to the reference."
    notebook = nbformat.reads(text, as_version=4)
    names = known_names() if names is None else names
    cells, module = [], None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = link_names(cell.source, names)
        if cell.cell_type == "code":
            directives = re.findall(r"^#\s*\|\s*(.+)$", cell.source, re.MULTILINE)
            if made := [words.split()[1] for words in directives if words.startswith("default_exp")]:
                module = made[0]
                continue
            if "hide" in directives:
                continue
            if "hide_input" in directives:
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
            kept = [line for line in cell.source.split("\n") if not re.match(r"#\s*\||%", line)]
            cell.source = "\n".join(kept).strip("\n")
            if not cell.source and not cell.outputs:
                continue
        cells.append(cell)
    if module and cells and cells[0].cell_type == "markdown":
        note = f"Module {{py:mod}}`merge_lab.{module}`."
        cells[0].source = re.sub(r"\A(# .+\n+(?:>.*(?:\n|\Z))*)", lambda head: f"{head.group(1).rstrip()}\n\n{note}\n", cells[0].source)
    notebook.cells = cells
    return notebook


def short_signature(app, what, name, obj, options, signature, returns):
    "A dataclass has too many fields for one line: they are told of below it."
    return ("", None) if what == "class" and dataclasses.is_dataclass(obj) else (signature, None)


def plain(text: str) -> str:
    "A docstring's line with what reStructuredText would take for marks made harmless, outside of code."
    parts = " ".join(text.split()).split("`")
    return "`".join(re.sub(r"([*|]|_(?!\w))", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def option_facts(field: dataclasses.Field) -> str:
    "What `merge_lab.config.option` knows of a field."
    facts = [plain(field.metadata.get("help") or "")]
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if choices := field.metadata.get("choices"):
        facts.append("one of " + ", ".join(f"``{choice}``" for choice in choices))
    if low is not None or high is not None:
        facts.append(f"{'at most' if low is None else low} {'and above' if high is None else f'to {high}' if low is not None else high}")
    if field.default is not dataclasses.MISSING:
        facts.append(f"default ``{field.default!r}``")
    elif field.default_factory is not dataclasses.MISSING:
        facts.append(f"default ``{field.default_factory()!r}``")
    return "; ".join(fact for fact in facts if fact)


def tell_parameters(app, what, name, obj, options, lines):
    "Add to a docstring what docments, or the options of a config, say of parameters and result."
    lines[:] = [plain(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    fields = {field.name: field for field in dataclasses.fields(obj)} if dataclasses.is_dataclass(obj) and what == "class" else {}
    if what == "class" and not fields and "__init__" not in vars(obj):
        return
    try:
        described = docments(obj if what != "class" or fields else obj.__init__, full=True)
    except (OSError, TypeError, ValueError, SyntaxError):
        return
    told = []
    for parameter, facts in described.items():
        said, annotation = facts["docment"] or "", facts["anno"]
        is_option = parameter in fields and fields[parameter].metadata.get("help")
        said = option_facts(fields[parameter]) if is_option else plain(said)
        typed = "" if annotation in (inspect.Parameter.empty, None) else inspect.formatannotation(annotation)
        if parameter == "return":
            told += [f":returns: {said}"] * bool(said) + [f":rtype: {typed}"] * bool(typed and said)
        elif parameter != "self" and (said or fields):
            told += [f":param {parameter}: {said}"] + [f":type {parameter}: {typed}"] * bool(typed)
    lines += ["", *told] if told else []


def is_told_elsewhere(app, what, name, obj, skip, options):
    "Leave out what another library wrote, and a function that a class of the module has for its method."
    if not inspect.isfunction(obj):
        return None
    owners = vars(sys.modules[obj.__module__]).values() if what == "module" else ()
    is_method = any(isinstance(owner, type) and vars(owner).get(name) is obj for owner in owners)
    return True if is_method or not obj.__module__.startswith("merge_lab") else None
