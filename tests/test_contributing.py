"""What CONTRIBUTING.md, CHANGELOG.md and the hooks promise holds."""

import re
from configparser import ConfigParser
from pathlib import Path

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
