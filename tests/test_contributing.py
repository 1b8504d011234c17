"""What CONTRIBUTING.md, CHANGELOG.md and the hooks promise holds."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def test_changelog_tells_of_the_version_that_is_built():
    "Newest first, each release with its day; what is not released yet stands above."
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    releases = [head for head in heads if head != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", head) for head in releases)
    versions = [tuple(map(int, head.split(" ")[0].split("."))) for head in releases]
    assert versions == sorted(versions, reverse=True) and len(set(versions)) == len(versions)
    assert tuple(map(int, settings()["version"].split("."))) == versions[0]
    assert "Unreleased" not in heads[1:]
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def hooks() -> list[dict]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    return [hook for repo in config["repos"] for hook in repo["hooks"]]


def test_hooks_run_what_a_change_must_pass():
    "By the project's own tools, so that neither a network nor another version of them is asked."
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for hook in hooks():
        assert hook["language"] == "system" and not hook["pass_filenames"], hook["id"]
        assert " ".join([hook["entry"], *hook.get("args", ())]) in lines
        program = Path(sys.executable).parent / Path(hook["entry"].split()[0]).name
        assert program.exists(), f"{program}: not among the requirements of 'dev'?"
    assert [hook["id"] for hook in hooks()] == ["nbdev-clean", "nbdev-export", "ruff"]


def test_hooks_look_at_every_notebook_and_module():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    patterns = {hook["id"]: re.compile(hook["files"]) for hook in hooks() if "files" in hook}
    seen = 0
    for name in tracked.stdout.splitlines():
        if name.endswith(".ipynb"):
            assert patterns["nbdev-clean"].search(name), name
        if name.endswith(".ipynb") or re.match(r"merge_lab/.*\.py", name):
            assert patterns["nbdev-export"].search(name), name
            seen += 1
    assert seen > 50 or not tracked.stdout  # an archive without its history has nothing to look at
