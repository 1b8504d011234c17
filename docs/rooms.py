"""The table of rooms in CONTRIBUTING.md, made from the notebooks. `make readme` runs this."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- rooms: made by docs/rooms.py -->\n", "<!-- end of rooms -->"


def told(notebook: Path) -> str:
    "What a notebook says that it is for: the quotation under its title."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    quoted = re.search(r"^>.*(?:\n>.*)*", text, re.MULTILINE)
    return " ".join(re.sub(r"^>", "", quoted.group(), flags=re.MULTILINE).split()) if quoted else ""


def rows(nbs: Path) -> list[str]:
    "A line for each notebook with a number, in the order of reading."
    lines = []
    for notebook in sorted(nbs.rglob("*.ipynb")):
        name = notebook.relative_to(nbs).with_suffix("").as_posix()
        if name[0].isdigit() and not any(part.startswith(".") for part in notebook.parts):
            lines.append(f"| [{name}](nbs/{name}.ipynb) | {told(notebook)} |")
    return lines


def table(root: Path = ROOT) -> str:
    "The table as it stands in CONTRIBUTING.md."
    return "\n".join(["| room | what it is for |", "|---|---|", *rows(root / "nbs"), ""])


def fill(text: str, made: str) -> str:
    "The text with a new table. Raises `ValueError` if it has no place for one."
    if BEGIN not in text or END not in text:
        raise ValueError(f"no place for the table: expected lines {BEGIN.strip()!r} and {END!r}. Put them where it shall stand.")
    head, rest = text.split(BEGIN, 1)
    return head + BEGIN + made + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), table()), encoding="utf-8")
