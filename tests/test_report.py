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
        browser = playwright.chromium.launch(executable_path=chromium, args=flags, ignore_default_args=["--hide-scrollbars"])
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


def test_wide_tables_scroll_where_one_sees_it_and_figures_answer(browser, tmp_path):
    random = np.random.default_rng(0)
    tasks = [f"task <{i}>" for i in range(6)]
    scores = pd.DataFrame([(m, t, random.random(), random.random()) for m in ("base", "merged") for t in tasks], columns=["model", "task", "exact_match", "loss"])
    history = pd.DataFrame({"step": range(1, 21), "loss": np.linspace(2, 1, 20), "source": 0})
    sections = [
        report.Table(report.score_table(scores.query("task < 'task <3>'"))), report.Table(report.score_table(scores)),
        report.Plot(viz.task_matrix(scores)), report.Plot(viz.loss_curves(history)),
    ]  # fmt: skip
    written = report.report_html("Wide", sections, tmp_path / "r.html")
    with browser.new_page(viewport=dict(width=1100, height=800)) as page:
        page.goto(written.as_uri())
        narrow, wide = page.evaluate("[...document.querySelectorAll('.table .scroll')].map(s => [s.clientWidth, s.scrollWidth, s.offsetHeight - s.clientHeight, s.getBoundingClientRect().right])")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert narrow[0] >= narrow[1] and narrow[2] < 8  # it fits, with the page's margins
        assert wide[0] < wide[1] and wide[2] >= 8 and wide[3] <= 1100  # a bar that is always there
        page.locator(".table .scroll").nth(1).focus()
        page.keyboard.press("End")
        page.keyboard.down("ArrowRight")
        for _ in range(100):  # the page's own rules let nobody wait for a function in it
            if moved := page.evaluate("document.querySelectorAll('.table .scroll')[1].scrollLeft") > 0:
                break
            page.wait_for_timeout(50)
        assert moved
        cells, steps = (figure.locator(".marks rect") for figure in page.locator(".plot").all())
        assert cells.count() == 12 and steps.count() == 20
        assert "base, task <0>: " in cells.first.text_content() and "step 1: " in steps.first.text_content()
        picture, mark = page.locator(".plot img").nth(1).bounding_box(), steps.nth(10).bounding_box()
        assert picture["x"] < mark["x"] and mark["x"] + mark["width"] <= picture["x"] + picture["width"] + 1
        steps.nth(10).hover()
        assert page.evaluate("document.querySelectorAll('.marks')[1].querySelectorAll('rect')[10].matches(':hover')")
