"""The table of runs in JupyterLab, in a real browser: sort, filter, choose, note, delete and undo."""

import pytest
from servers import CHROMIUM, FLAGS, open_notebook, PATIENCE, run_all
from test_browser import lab, nbformat, picture, press, sync_api, wait_text  # noqa: F401

CELL = """
from pathlib import Path
from merge_lab.run_table_view import RunTable

mark = "# The options of a run, written by merge_lab.\\n"
for i in range(12):
    place = Path(f"runs/run-{i:02}")
    place.mkdir(parents=True)
    made = f"lora_dropout: 0\\nbase_model: models/base\\n" if i < 4 else f"dataset_configs: {{}}\\nmodel_paths: [runs/run-{i % 4:02}/final_merged, runs/run-{i - 1:02}/merged]\\n"
    (place / "config.yaml").write_text(mark + made)
    (place / "history.jsonl").write_text(f'{{"step": {i + 1}, "loss": {(7 * i) % 12 + 0.5}}}\\n')
runs = RunTable("runs")
runs.note("run-03", "<b>not bold</b>", ["paper"]), runs.note("run-05", "", ["paper"])
runs.view()
"""


@pytest.fixture(scope="module")
def page(lab):  # noqa: F811
    "A notebook with a table of twelve runs."
    address, folder = lab
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}  # without it JupyterLab asks which
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=kernel), folder / "runs.ipynb")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(PATIENCE * 150)
        asked = []
        page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:", address.replace("http", "ws"))) else asked.append(request.url))
        page.asked = asked
        open_notebook(page, address, "runs.ipynb")
        run_all(page)
        page.wait_for_selector(".ml-browser table.dataTable tbody tr")
        yield page
        browser.close()


def names(page) -> list[str]:
    "Runs in the grid, from top to bottom."
    return [text for text in page.locator(".ml-browser .dt-scroll-body tbody tr:not(.dtrg-group) td:first-child").all_inner_texts() if text.startswith("run-")]


def test_the_grid_sorts_and_filters_and_asks_no_server(page):
    assert len(names(page)) == 12
    picture(page, ".ml-browser", "8-run-table")
    assert page.locator(".ml-browser .dt-scroll-head th .dtcc button").count() >= 10  # a filter of its own beside each head
    page.locator(".ml-browser .dt-scroll-head th", has_text="loss").locator(".dtcc button").first.click()
    page.wait_for_function("() => [...document.querySelectorAll('.ml-browser .dt-scroll-body tbody td:first-child')][0].innerText === 'run-00'")
    assert names(page)[:3] == ["run-00", "run-07", "run-02"]  # 0.5, 1.5, 2.5
    page.locator(".ml-browser .dt-search input").first.fill("paper")
    page.wait_for_function("() => document.querySelectorAll('.ml-browser .dt-scroll-body tbody tr').length === 2")
    assert "<b>not bold</b>" in page.locator(".ml-browser .dt-scroll-body tbody").inner_text()
    page.locator(".ml-browser .dt-search input").first.fill("")
    assert page.asked == []


def test_groups_stand_together(page):
    page.locator(".ml-browser .widget-dropdown select", has_text="system").select_option("system")
    page.wait_for_selector(".ml-browser tr.dtrg-group")
    heads = page.locator(".ml-browser tr.dtrg-group").all_inner_texts()
    assert [head.split()[0] for head in heads if head.strip()] == ["lora", "mask-merge"]
    picture(page, ".ml-browser", "8-run-table-grouped")
    page.locator(".ml-browser .widget-dropdown select", has_text="system").select_option("nothing")


def test_a_clicked_row_is_the_run_that_is_noted_deleted_and_brought_back(page):
    page.locator(".ml-browser .dt-scroll-body td:first-child", has_text="run-09").first.click()
    page.wait_for_function("() => [...document.querySelector('.ml-browser select[multiple]').selectedOptions].some(o => o.text === 'run-09')")
    page.locator(".ml-browser select[multiple]").select_option(["run-11"])
    page.locator(".ml-browser input[placeholder*='commas']").fill("late, good")
    page.locator(".ml-browser input[placeholder*='commas']").press("Enter")
    press(page, ".ml-browser", "Note")
    wait_text(page, ".ml-browser-status", "text.includes('noted of run-11')")
    press(page, ".ml-browser", "Delete")
    wait_text(page, ".ml-browser-status", "text.includes('deleted run-11')")
    page.wait_for_function("() => ![...document.querySelectorAll('.ml-browser .dt-scroll-body td')].some(c => c.innerText === 'run-11')")
    press(page, ".ml-browser", "Undo")
    wait_text(page, ".ml-browser-status", "text.includes('run-11 is back')")
    page.wait_for_function("() => [...document.querySelectorAll('.ml-browser .dt-scroll-body td')].some(c => c.innerText === 'good, late')")
    assert page.locator(".ml-lineage rect").count() == 13  # and the model that is no run
