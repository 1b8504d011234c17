"""The token view and the conversation as their user sees them: in JupyterLab, in Jupyter Notebook 7 and in marimo, by mouse and by keyboard.

MERGE_LAB_SCREENSHOTS=folder keeps a screenshot of each.
"""

import json
import os
import time
from pathlib import Path

import pytest
from servers import browser_api, CHROMIUM, FLAGS, jupyter_lab, marimo_app, open_notebook

sync_api = browser_api()
import nbformat

pytest.importorskip("anywidget", reason="anywidget is not installed")

SETUP = """
import time

from transformers.utils.logging import disable_progress_bar

from merge_lab import asking as asking_module
from merge_lab.asking import Asking
from merge_lab.brush import blends_of
from merge_lab.chat import load_task
from merge_lab.checkpoints import load_tokenizer
from merge_lab.explorer import MergeExplorer
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import bundled_path
from merge_lab.token_board import TokenBoard

disable_progress_bar()


class SlowHalt(asking_module.Halt):
    def __call__(self, *args, **kwargs):
        time.sleep(0.1)  # a token of a real model
        return super().__call__(*args, **kwargs)


asking_module.Halt = SlowHalt
paths = [str(bundled_path(f"models/{name}")) for name in ("rewrite", "summarize")]
merger = Merger.from_config(MergerConfig(model_paths=paths, mode="vector_output", dtype="float32"))
tests = {name: load_task(bundled_path(f"tasks/{name}"), "validation") for name in ("rewrite", "summarize")}
explorer = MergeExplorer(lambda: merger, load_tokenizer(paths[0]), tests, prompts=2, rows=2)
explorer.move()
explorer.worker.wait()
board = TokenBoard(explorer)
asking = Asking(lambda: merger, load_tokenizer(paths[0]), blends_of(explorer), "runs/a", max_new_tokens=40)
"""
MARIMO = """
import marimo

app = marimo.App(width="full")


@app.cell
def _():
{setup}
    return asking, board


@app.cell
def _(board):
    board.view()
    return


@app.cell
def _(asking):
    asking.view()
    return


if __name__ == "__main__":
    app.run()
"""
QUESTION = "Say it in other words: The angry farmer kept the damp box by the shop on Friday."
EVIL = "<img src=x onerror=\"document.title='broken'\"> <b>bold</b>"


def lab_notebook(folder: Path):
    sources = [SETUP, "board.view()", "asking.view()", "import time\ntime.sleep(15)"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "tokens.ipynb")


def open_lab(page, address: str):
    open_notebook(page, address, "tokens.ipynb")
    for _ in range(3):
        page.evaluate("jupyterapp.commands.execute('notebook:run-cell-and-select-next')")


@pytest.fixture(scope="module", params=["jupyterlab", "notebook", "marimo"])
def page(request, tmp_path_factory):
    "The two widgets in a notebook; `page.folder` is where it runs, `page.place` what runs it."
    place = request.param
    pytest.importorskip(place, reason=f"{place} is not installed")
    folder, home = (tmp_path_factory.mktemp(name) for name in ("work", "home"))
    if place != "marimo":
        lab_notebook(folder)
        server = jupyter_lab(folder, home, place == "notebook")
    else:
        setup = "\n".join(f"    {line}" if line else "" for line in SETUP.splitlines())
        (folder / "tokens.py").write_text(MARIMO.format(setup=setup))
        server = marimo_app(folder / "tokens.py", home)
    with server as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(90 * 1000)
        page.loaded = []  # what was asked for elsewhere
        page.on("request", lambda request: page.loaded.append(request.url))
        page.goto(address) if place == "marimo" else open_lab(page, address)
        page.wait_for_selector(".mlc-tokens .mlc-token")
        page.wait_for_selector(".mlc-chat .mlc-question")
        page.place, page.folder, page.address = place, folder, address
        yield page
        browser.close()


def picture(page, panel: str, name: str):
    "Keep a screenshot of a widget, if the user asked for it."
    folder = os.environ.get("MERGE_LAB_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        place = page.locator(panel).first
        place.scroll_into_view_if_needed()
        place.screenshot(path=str(Path(folder) / f"{page.place}-{name}.png"))


def until(condition, what: str = "", seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"took too long: {what}"
        time.sleep(0.05)
    return found


def tips(page, grid: str) -> list[str]:
    return page.locator(f".mlc-grid-{grid} .mlc-cell").evaluate_all("cells => cells.map(cell => cell.title)")


def answer(page) -> str:
    return "".join(page.locator(".mlc-tokens .mlc-token").all_text_contents())


def test_a_click_on_a_token_changes_the_picture_of_the_layers(page):
    picture(page, ".mlc-tokens", "1-first")
    before, title = tips(page, "change"), page.locator(".mlc-side .mlc-head").nth(1).inner_text()
    assert len(before) > 30 and "change" in before[0] and "nats" in before[0]
    assert page.locator(".mlc-grid-alpha thead").bounding_box()["height"] < 100  # names of columns leave the map its room
    names = page.locator(".mlc-grid-alpha .mlc-column").evaluate_all("heads => heads.map(head => [head.title, head.textContent])")
    assert ["post_attention_layernorm", "post_attn_norm"] in names
    page.locator(".mlc-token").nth(4).click()
    until(lambda: tips(page, "change") != before, "another picture")
    assert page.locator(".mlc-candidates .mlc-said").count() >= 2  # who says the token has it marked
    assert page.locator(".mlc-side .mlc-head").nth(1).inner_text() != title
    assert page.locator(".mlc-token.mlc-pinned").count() == 1
    assert "(pinned)" in page.locator(".mlc-candidates").inner_text()
    picture(page, ".mlc-tokens", "2-pinned")


def test_pointing_at_a_token_shows_what_each_model_would_have_said(page):
    page.locator(".mlc-token").nth(1).hover()
    text = until(lambda: "token 1:" in (text := page.locator(".mlc-candidates").inner_text()) and text)
    assert {"rewrite", "summarize", "merged"} <= set(text.split())
    page.locator(".mlc-status").first.hover()
    until(lambda: "(pinned)" in page.locator(".mlc-candidates").inner_text())


def test_keys_reach_and_pin_a_token(page):
    page.locator(".mlc-token.mlc-pinned").focus()
    before = tips(page, "change")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    until(lambda: tips(page, "change") != before)
    assert page.locator(".mlc-token").nth(3).get_attribute("aria-selected") == "true"


def test_a_map_opens_down_to_columns_and_back(page):
    page.locator(".mlc-grid-alpha .mlc-link").first.click()  # a layer
    until(lambda: "layer 0" in page.locator(".mlc-path").inner_text())
    page.locator(".mlc-grid-change .mlc-cell").first.focus()
    page.keyboard.press("Enter")
    until(lambda: "column 0:" in tips(page, "alpha")[0])
    picture(page, ".mlc-tokens", "3-columns")
    page.locator(".mlc-path .mlc-link").first.click()
    until(lambda: page.locator(".mlc-path").inner_text().strip() == "all layers")


def brush_everything(page):
    cells = page.locator(".mlc-grid-alpha .mlc-cell")
    cells.first.scroll_into_view_if_needed()
    first, last = cells.first.bounding_box(), cells.last.bounding_box()
    page.mouse.move(first["x"] + first["width"] - 4, first["y"] + 4)
    page.mouse.down()
    rows = page.locator(".mlc-grid-alpha tbody tr")
    for place in range(rows.count()):
        box = rows.nth(place).locator(".mlc-cell").last.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 4, box["y"] + 4)
    page.mouse.move(last["x"] + last["width"] - 4, last["y"] + 6)
    page.mouse.up()


def test_a_brush_over_the_map_changes_the_blend_and_its_answer(page):
    page.locator(".mlc-component").select_option("rewrite")
    until(lambda: "Alphas of rewrite" in page.locator(".mlc-side").first.inner_text())
    before, alphas = answer(page), tips(page, "alpha")
    cells = page.locator(".mlc-grid-alpha .mlc-cell")
    cells.first.focus()
    page.keyboard.down("Shift")
    for _ in range(10):
        page.keyboard.press("ArrowDown")
    page.keyboard.up("Shift")
    assert page.locator(".mlc-grid-alpha .mlc-selected").count() > 3
    page.keyboard.press("Escape")
    assert page.locator(".mlc-selected").count() == 0
    brush_everything(page)
    assert page.locator(".mlc-grid-alpha .mlc-selected").count() == cells.count()
    assert f"{cells.count()} cells are brushed" in page.locator(".mlc-brush").inner_text()
    picture(page, ".mlc-tokens", "4-brushed")
    page.locator(".mlc-by").fill("0.5")
    page.locator(".mlc-button.mlc-shift").click()
    until(lambda: answer(page) != before, "another answer")
    until(lambda: all("alpha 1.000" in tip for tip in tips(page, "alpha")), "other alphas")
    assert answer(page).startswith("On Friday,")  # one component is left, which answers so
    picture(page, ".mlc-tokens", "5-shifted")
    page.locator(".mlc-button.mlc-undo").click()
    until(lambda: answer(page) == before and tips(page, "alpha") == alphas, "what it was")


def test_a_colour_can_be_chosen(page):
    page.locator(".mlc-quantity").select_option(label="KL of rewrite to the blend")
    until(lambda: "KL of rewrite" in page.locator(".mlc-legend").first.inner_text())
    picture(page, ".mlc-tokens", "6-kl")


def voices(page) -> dict[str, tuple[str, str]]:
    found = page.locator(".mlc-voice").evaluate_all(
        "all => all.map(e => ['.mlc-head', '.mlc-said-text', '.mlc-state'].map(s => e.querySelector(s).textContent))"
    )
    return {head.removesuffix(state): (text, state) for head, text, state in found}


def ask(page, text: str):
    page.locator(".mlc-question").fill(text)
    page.locator(".mlc-question").press("Enter")


def test_a_question_is_answered_by_all_voices_as_they_speak_and_a_pick_is_kept(page):
    ask(page, QUESTION)
    seen = set()
    until(lambda: seen.add(voices(page).get("rewrite", ("", ""))[0]) or len(seen) > 3, "a stream")
    until(lambda: len(said := voices(page)) == 4 and {state for _, state in said.values()} == {"done"}, "an end")
    said = voices(page)
    assert list(said) == ["rewrite", "summarize", "uniform average", "the explorer"]
    assert said["rewrite"][0].startswith("On Friday,") and said["summarize"][0] != said["rewrite"][0]
    picture(page, ".mlc-chat", "7-answers")
    page.locator(".mlc-pick").first.click()
    until(lambda: page.locator(".mlc-message").count() == 2)
    rows = [json.loads(line) for line in (page.folder / "runs/a/preferences.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == [{"role": "user", "content": QUESTION}] and rows[0]["chosen_by"] == "rewrite"


def test_a_stop_is_heard_between_two_tokens(page):
    ask(page, QUESTION)
    until(lambda: voices(page).get("rewrite", ("", ""))[0], "a first word")
    page.locator(".mlc-button.mlc-stop").click()
    until(lambda: page.locator(".mlc-button.mlc-send").is_enabled())
    said = voices(page)
    assert said["the explorer"] == ("", "stopped") and said["rewrite"][1] == "stopped"
    assert len(said["rewrite"][0]) < 60


def test_what_was_typed_stays_until_it_is_taken_and_a_refusal_until_the_next_action(page):
    box, line = page.locator(".mlc-question"), page.locator(".mlc-chat .mlc-status")
    ask(page, QUESTION)
    until(lambda: box.input_value() == "", "the question is taken")
    until(lambda: page.locator(".mlc-button.mlc-stop").is_enabled() and voices(page).get("rewrite", ("", ""))[1] == "speaking", "a voice")
    ask(page, "And what else?")
    until(lambda: "somebody speaks" in line.inner_text(), "a refusal")
    said = voices(page)
    until(lambda: voices(page) != said, "a further piece")
    assert "somebody speaks" in line.inner_text() and box.input_value() == "And what else?"
    picture(page, ".mlc-chat", "8-refused")
    page.locator(".mlc-button.mlc-stop").click()
    until(lambda: page.locator(".mlc-button.mlc-send").is_enabled())
    assert "somebody speaks" not in line.inner_text() and box.input_value() == "And what else?"
    box.press("Enter")
    until(lambda: box.input_value() == "", "the question is taken")
    page.locator(".mlc-button.mlc-stop").click()
    until(lambda: page.locator(".mlc-button.mlc-send").is_enabled())
    page.locator(".mlc-pick").first.click()
    until(lambda: "not kept as data" in line.inner_text(), "why it is not kept")


def test_what_is_said_is_text(page):
    page.locator(".mlc-button.mlc-new").click()
    until(lambda: page.locator(".mlc-message").count() == 0)
    page.locator(".mlc-system").fill(EVIL)
    ask(page, EVIL)
    until(lambda: page.locator(".mlc-message").count() == 2)
    assert EVIL in page.locator(".mlc-message").last.inner_text()
    assert page.locator(".mlc img, .mlc-message span b").count() == 0 and page.title() != "broken"
    page.locator(".mlc-button.mlc-stop").click()
    until(lambda: page.locator(".mlc-button.mlc-send").is_enabled())
    picture(page, ".mlc-chat", "9-text")


def test_a_stop_is_heard_while_a_cell_runs(page):
    if page.place == "marimo":
        pytest.skip("marimo runs no cell by itself")
    page.locator(".mlc-system").fill("")
    ask(page, QUESTION)
    until(lambda: voices(page).get("rewrite", ("", ""))[0], "a first word")
    page.evaluate("""() => {
      const notebook = jupyterapp.shell.currentWidget.content;
      notebook.activeCellIndex = 3;
      jupyterapp.commands.execute('notebook:run-cell');
    }""")
    page.wait_for_function("() => document.querySelectorAll('.jp-CodeCell')[3].innerText.includes('[*]')")
    page.locator(".mlc-button.mlc-stop").click()
    until(lambda: page.locator(".mlc-button.mlc-send").is_enabled())
    assert "[*]" in page.locator(".jp-CodeCell").nth(3).inner_text()  # it runs still


def test_nothing_is_loaded_from_elsewhere(page):
    if page.place != "marimo":
        elsewhere = [url for url in page.loaded if not url.startswith((page.address.removesuffix("/notebooks"), "blob:", "data:"))]
        assert elsewhere == []
    assert page.locator(".mlc").count() == 2
