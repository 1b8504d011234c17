"""The HTML report: self-contained, safe against what models say, readable in a real browser."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest

from merge_lab import report, viz


def example_sections():
    random = np.random.default_rng(0)
    models = ["base", "an expert with quite a long name", "learned masks"]
    tasks = ["rewrite", "summarize", "extract"]
    rows = [(m, t, random.random(), random.random() * 4) for m in models for t in tasks]
    scores = pd.DataFrame(rows, columns=["model", "task", "exact_match", "loss"])
    answers = pd.DataFrame(
        {
            "prompt": ["Say </script><script>alert(1)</script> & more"],
            "expected": ["<b>bold</b>"],
            "learned masks": ["<img src=https://example.com/x.png onerror=alert(1)>"],
            "uniform average": [""],
        }
    )
    return [
        report.Headline({"exact match": 0.975, "prompts": 1200}),
        report.Heading("Scores"),
        report.Prose("**Bold** and `code <br>`.\n\nSecond paragraph."),
        report.Table(report.score_table(scores), "Test split."),
        report.Plot(viz.task_matrix(scores), "One sentence."),
        report.Heading("Answers"),
        report.Answers(answers),
        report.Heading("Load it"),
        report.Code("x = '</code></pre>'" + " # long" * 60),
        report.Code("seed: 0", "config.yaml", folded=True),
    ]


def test_text_of_models_cannot_become_markup():
    page = report.render_report("<Title>", example_sections(), "A & B")
    assert (
        page.count("<script") == 1
        and "<b>bold" not in page
        and "<img src=https" not in page
    )
    assert "&lt;Title&gt;" in page and "A &amp; B" in page
    assert "<strong>Bold</strong> and <code>code &lt;br&gt;</code>" in page


def test_report_is_stable_and_names_nothing_outside(tmp_path):
    first = report.report_html(
        "T", example_sections(), tmp_path / "a" / "r.html"
    ).read_bytes()
    assert (
        first
        == report.report_html("T", example_sections(), tmp_path / "r.html").read_bytes()
    )
    links = re.findall(r'(?:src|href|srcset)="([^"]{0,12})', first.decode())
    assert links and all(link.startswith(("data:", "#")) for link in links)


def test_every_kind_of_section_refuses_what_it_cannot_show():
    with pytest.raises(TypeError, match="got DataFrame"):
        report.render_report("T", [pd.DataFrame()])
    with pytest.raises(ValueError, match="missing 'prompt'"):
        report.Answers(pd.DataFrame({"expected": ["a"]})).html()


def test_table_marks_the_best_at_printed_precision():
    frame = pd.DataFrame(
        {
            "loss": [0.12301, 0.12302, 0.4, np.nan],
            "exact_match": [0.1, 0.9, 0.9, np.nan],
        },
        index=list("abcd"),
    )
    body = report.Table(frame).html().split("<tbody>")[1]
    marked = [
        re.findall(r'class="number( best)?"', line) for line in body.split("</tr>")[:4]
    ]
    assert marked == [[" best", ""], [" best", " best"], ["", " best"], ["", ""]]
    assert "–" in body and "best" not in report.Table(frame, better={}).html()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "r.html"
    return report.report_html("Two experts, one model", example_sections(), path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_page_in_a_browser(browser, written, scheme, width):
    asked, told = [], []
    with browser.new_page(
        viewport=dict(width=width, height=800), color_scheme=scheme
    ) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: told.append(message.text))
        page.goto(written.as_uri())
        shown = page.locator("img").evaluate(
            "i => [i.complete, i.naturalWidth, i.currentSrc]"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.locator("summary").click()
        config = page.get_by_text("seed: 0").is_visible()
        sources = page.locator("source").get_attribute("srcset"), shown[2]
    assert [
        url for url in asked if not url.startswith(("file:", "data:"))
    ] == [] and told == []
    assert shown[0] and shown[1] > 0 and overflow <= 0 and config
    assert (sources[0] == sources[1]) is (scheme == "dark")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
