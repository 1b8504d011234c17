"""The table at the top of the README, made from the raw data of comparisons, and how often runs were killed. `make readme` runs this before the page is made."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BEGIN, END = "<!-- headline: made by docs/headline.py -->\n", "<!-- end of headline -->"
KILLS, END_OF_KILLS = "<!-- kills: made by docs/headline.py -->\n", "<!-- end of kills -->"
REAL = {"SmolLM2, 2 experts": "french+docstrings", "SmolLM2, 3 experts": "french+docstrings+german"}
TOYS = {"2 toys": "toy-pair", "3 toys": "toy-triple", "4 toys": "toy-six-4", "5 toys": "toy-six-5", "6 toys": "toy-six"}
ROWS = ("learned masks", "one model trained on all data", "mergekit, best setting", "RegMean++", "plain average")


def real_column(folder: Path, tasks: str) -> dict[str, list[float]]:  # row -> share of each seed
    "Shares on the real model."
    from merge_lab.real import recorded_shares

    shares = recorded_shares(folder, tasks)
    (mergekit,) = (name for name in shares.index if name.startswith("mergekit"))
    rows = dict(zip(ROWS, ("mask-merge", "trained on all data", mergekit, None, "uniform average")))
    found = {row: shares.loc[name].dropna().tolist() for row, name in rows.items() if name in shares.index}
    compared = folder.parent / "compare" / f"real-{tasks}.json"
    return found | ({"RegMean++": toy_column(compared)["RegMean++"]} if compared.exists() else {})


def toy_column(file: Path) -> dict[str, list[float]]:  # row -> share of each seed
    "Shares on bundled toys; of mergekit's methods the one that validation rows like best."
    from merge_lab.compare import read_comparison, scores_of
    from merge_lab.comparison import worst_shares
    from merge_lab.opponents import OPPONENTS

    table, _, facts = read_comparison(file)
    shares = worst_shares(scores_of(facts["rows"]), facts["experts"])
    tried = [name for name in table.index if name in OPPONENTS and OPPONENTS[name].mergekit]
    best = table.loc[tried, ("worst task", "on validation")].idxmax()
    rows = dict(zip(ROWS, ("learned masks", "trained on all data", best, "regmean++", "uniform average")))
    return {row: shares.loc[name].dropna().tolist() for row, name in rows.items() if name in shares.index}


def shown(values: list[float]) -> str:
    "The mean, half the range of several seeds, and how many seeds there are."
    if not values:
        return "-"
    half = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{half} ({len(values)})"


def table(root: Path = ROOT) -> str:
    "The table as it stands in the README."
    data = root / "data" / "benchmarks"
    columns = {title: real_column(data / "real", tasks) for title, tasks in REAL.items()}
    columns |= {title: toy_column(data / "compare" / f"{name}.json") for title, name in TOYS.items() if (data / "compare" / f"{name}.json").exists()}
    lines = [f"| recovered share of the worst task | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in ROWS:
        cells = [shown(column.get(row, [])) for column in columns.values()]
        lines.append(f"| {f'**{row}**' if row == ROWS[0] else row} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def kills(root: Path = ROOT) -> str:
    "How often runs were killed, and what came of it."
    facts = json.loads((root / "data" / "benchmarks" / "kills.json").read_text(encoding="utf-8"))
    newest, every = list(facts["counts"].values()), [*facts["counts"].values(), *facts.get("earlier", {}).get("counts", {}).values()]
    hits, identical, refused, corrupt, mixed = (sum(row[name] for row in every) for name in ("hits", "identical", "refused", "corrupt", "mixed"))
    least, most, latest = min(row["hits"] for row in newest), max(row["hits"] for row in newest), sum(row["hits"] for row in newest)
    which = f"{latest} of them, {least if least == most else f'{least} to {most}'} of each kind, on version {facts['commit']}, where checkpoints are replaced as a whole; the others on {facts['earlier']['commit']}, before that"
    return (
        f"Killed or stopped at random {hits} times ({which}), {len(newest)} kinds of runs and exports ended with the main file of undisturbed ones, byte for byte, {identical} times, and refused {refused} times\n"
        f"to go on where no whole checkpoint was there yet; {corrupt} files were corrupt and {mixed} checkpoints were mixed (`{facts['command']}`).\n"
    )


def fill(text: str, made: str, begin: str = BEGIN, end: str = END) -> str:
    "The text with a new table, or another part. Raises `ValueError` if it has no place for it."
    if begin not in text or end not in text:
        raise ValueError(f"no place for the table: expected lines {begin.strip()!r} and {end!r}. Put them where it shall stand.")
    head, rest = text.split(begin, 1)
    return head + begin + "\n" + made + "\n" + end + rest.split(end, 1)[1]


if __name__ == "__main__":
    page = ROOT / "nbs" / "index.ipynb"
    notebook = json.loads(page.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if BEGIN in (text := "".join(cell["source"])):
            cell["source"] = fill(text, table()).splitlines(keepends=True)
        if KILLS in text:
            cell["source"] = fill(text, kills(), KILLS, END_OF_KILLS).splitlines(keepends=True)
    page.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
