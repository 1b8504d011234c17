"""The workbench as its user sees it: real JupyterLab, real Chromium, buttons only.

MERGE_LAB_SCREENSHOTS=folder keeps a screenshot of every panel.
"""

import functools
import os
import re
import time
from pathlib import Path

import pytest
from servers import browser_api, CHROMIUM, FLAGS, jupyter_lab, open_notebook, PATIENCE, run_all

ROOT = Path(__file__).resolve().parent.parent

sync_api = browser_api()
import nbformat

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

STATUS = ".ml-explorer .ml-status"
PROBE = """
import torch
from safetensors.torch import save_file

print("session is", session.state)
if session.exported:
    with torch.no_grad():
        logits = session.merger(torch.tensor([[1, 5, 9, 12]])).logits
    own = {name: tensor.clone() for name, tensor in session.merger.merged_state_dict().items()}
    save_file({"logits": logits} | own, "own.safetensors")
    print("merger is written")
"""
DIGEST = """async image => {
  if (!image.naturalWidth) return null;
  try {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const digest = await crypto.subtle.digest('SHA-256', bytes);
    return [...new Uint8Array(digest)].map(b => b.toString(16).padStart(2, '0')).join('');
  } catch { return null; }  // it has just been replaced
}"""
CUT_OFF = """() => {
  const seen = element => element.offsetWidth > 0;
  const named = '.lm-TabBar-tabLabel, .ml-label, .ml-panel .widget-label, .ml-panel button, .ml-panel .widget-readout, .ml-svg text';
  const cut = [...document.querySelectorAll(named)].filter(e => seen(e) && e.scrollWidth > e.clientWidth + 1);
  const pen = document.createElement('canvas').getContext('2d');
  for (const select of document.querySelectorAll('.ml-panel select:not([multiple])')) {
    pen.font = getComputedStyle(select).font;
    const width = pen.measureText(select.selectedOptions[0]?.text ?? '').width;
    if (seen(select) && width > select.clientWidth - 18) cut.push(select);
  }
  for (const control of document.querySelectorAll('.ml-field .ml-control')) {
    const edge = control.closest('.widget-tab').getBoundingClientRect().right;
    if (seen(control) && control.getBoundingClientRect().right > edge) cut.push(control);
  }
  return cut.map(e => e.innerText || e.className);
}"""


def make_workbench(folder: Path):
    "A copy of the workbench with one more cell, which asks the kernel something."
    notebook = nbformat.read(ROOT / "nbs/workbench.ipynb", 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    nbformat.write(notebook, folder / "workbench.ipynb")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address and folder of a JupyterLab of its own."
    folder, home = (tmp_path_factory.mktemp(name) for name in ("work", "home"))
    make_workbench(folder)
    with jupyter_lab(folder, home) as address:
        yield address, folder


@pytest.fixture(scope="module")
def page(lab):
    "The workbench after Run All."
    address, _ = lab
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(PATIENCE * 1000)
        open_notebook(page, address, "workbench.ipynb")
        run_all(page)
        page.wait_for_selector(".ml-scores")
        yield page
        browser.close()


def picture(page, panel, name: str):  # panel: a selector or a locator
    "Keep a screenshot of a panel, if the user asked for it."
    folder = os.environ.get("MERGE_LAB_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        place = page.locator(panel).first if isinstance(panel, str) else panel
        place.scroll_into_view_if_needed()
        place.screenshot(path=str(Path(folder) / f"{name}.png"))
        page.screenshot(path=str(Path(folder) / f"{name}-page.png"))


def wait_text(page, selector: str, test: str, argument=None):
    "Wait until the text of `selector` passes a JavaScript test of (text, argument)."
    script = f"""([selector, argument]) => {{
      const text = document.querySelector(selector)?.innerText ?? '';
      return {test} ? (text || true) : false;
    }}"""
    return page.wait_for_function(
        script, arg=[selector, argument], polling=100
    ).json_value()


def open_tab(page, name: str):
    page.locator(".ml-panel .lm-TabBar-tab", has_text=name).first.click()


def press(page, panel: str, text: str):
    page.locator(f"{panel} button:not([disabled])", has_text=text).first.click()


def state_is(page, state: str):
    wait_text(page, ".ml-session .ml-state", "text.trim() === argument", state)


def test_no_cell_failed(page):
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    errors = page.locator(".jp-OutputArea-output[data-mime-type*='stderr']")
    assert not [text for text in errors.all_inner_texts() if "Traceback" in text]


def test_a_changed_field_shows_in_the_yaml_view(page):
    open_tab(page, "Masks")
    picture(page, ".ml-panel", "1-masks")
    page.locator(".ml-field-constrain_mode select").select_option("sum1")
    wait_text(page, ".ml-face", "text.includes('constrain_mode: sum1')")
    page.locator(".ml-field-constrain_mode select").select_option("delta")
    wait_text(page, ".ml-face", "!text.includes('constrain_mode')")
    open_tab(page, "Training")
    picture(page, ".ml-panel", "2-training-options")


def test_a_wrong_path_shows_at_its_field(page):
    open_tab(page, "Components")
    area = page.locator(".ml-field-model_paths textarea")
    good = area.input_value()
    area.fill("./nowhere")
    wait_text(
        page, ".ml-field-model_paths .ml-error", "text.includes('no such folder')"
    )
    picture(page, ".ml-panel", "3-wrong-path")
    area.fill(good)
    wait_text(page, ".ml-field-model_paths .ml-note", "text.includes('fit together')")
    wait_text(page, ".ml-face", "text.startsWith('model_paths:')")


def test_looking_at_every_tab_changes_nothing_and_nothing_is_cut_off(page):
    tabs = page.locator(".ml-panel .lm-TabBar-tab")
    names = [name.strip() for name in tabs.all_inner_texts()]
    assert {"Components", "Masks", "Training", "Pairs", "Healing"} <= set(names)
    before = [face.inner_text() for face in page.locator(".ml-face").all()]
    assert len(before) == 2
    for i, name in enumerate(names):
        tabs.nth(i).click()
        page.wait_for_function(
            f"document.querySelectorAll('.ml-panel .lm-TabBar-tab')[{i}].classList.contains('lm-mod-current')"
        )
        assert page.evaluate(CUT_OFF) == [], name
        panel = tabs.nth(i).locator("xpath=ancestor::*[contains(@class, 'ml-panel')]")
        picture(page, panel, f"2-tab-{i:02d}-{name.lower().replace(' ', '-')}")
    assert [face.inner_text() for face in page.locator(".ml-face").all()] == before
    assert "learning_rate: 0.2\n" in before[0] and "max_length" not in before[0]


def test_the_share_changes_the_scores(page):
    before = page.locator(".ml-scores").inner_text()
    page.locator(".ml-share .noUi-handle").focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    wait_text(page, ".ml-scores", "text !== argument", before)
    picture(page, ".ml-explorer", "4-explorer")


def merges(page) -> int:
    return int(re.search(r"merge (\d+)", page.locator(STATUS).inner_text())[1])


def wait_for_merge_of(page, component: int):
    "Wait until the merged model scores and answers as a component does."
    page.wait_for_function(
        """component => {
          const rows = [...document.querySelectorAll('.ml-scores tr')].slice(1);
          const scores = rows.map(row => [...row.cells].slice(1).map(cell => cell.innerText).join());
          const answers = [...document.querySelectorAll('.ml-answers tr')].slice(1);
          const own = answers.every(row => row.cells[4].innerText === row.cells[2 + component].innerText);
          return scores.at(-1) === scores[component] && answers.length && own;
        }""",
        arg=component,
        polling=50,
    )
    settle(page)


@pytest.mark.parametrize("pause", [0.02, 0.2], ids=["fast", "slow"])
def test_forty_positions_make_few_merges_and_end_on_the_last(page, pause):
    page.locator(".ml-share .noUi-handle").focus()
    page.keyboard.press("Home")
    wait_text(page, ".ml-share .widget-readout", "text.trim() === '0.00'")
    wait_for_merge_of(page, 0)
    before = merges(page)
    base = page.locator(".ml-share .noUi-base").bounding_box()
    y = base["y"] + base["height"] / 2
    page.mouse.move(base["x"], y)
    page.mouse.down()
    for position in range(1, 41):  # steps of 0.025, from 0 to 1
        page.mouse.move(base["x"] + position / 40 * base["width"], y)
        time.sleep(pause)
    page.mouse.up()
    wait_text(page, ".ml-share .widget-readout", "text.trim() === '1.00'")
    wait_for_merge_of(page, 1)  # a share of one is the second component
    assert 1 <= merges(page) - before <= 15


def test_training_starts_from_the_dials_when_they_are_set(page):
    page.locator(".ml-share .noUi-handle").focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.locator(".ml-shift-attention .noUi-handle").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    wait_text(page, ".ml-share .widget-readout", "text.trim() === '0.50'")
    wait_text(page, ".ml-shift-attention .widget-readout", "text.trim() === '+0.10'")
    settle(page)
    press(page, ".ml-explorer", "Set as initial masks")
    wait_text(page, ".ml-face", "/default: 0.5\\b[^]*attn: 0.6\\b/.test(text)")
    wait_text(page, STATUS, "text.includes('training will start')")
    press(page, ".ml-explorer", "Shifts to zero")
    wait_text(page, ".ml-shift-attention .widget-readout", "text.trim() === '+0.00'")
    press(page, ".ml-explorer", "Set as initial masks")
    wait_text(page, ".ml-face", "/default: 0.5\\b/.test(text) && !/attn:/.test(text)")


def settle(page, selector: str = STATUS):
    "Wait until a line, by default that of merges, has stood for a second."
    text, since = page.locator(selector).inner_text(), time.monotonic()
    while time.monotonic() - since < 1:
        if (now := page.locator(selector).inner_text()) != text:
            text, since = now, time.monotonic()
        time.sleep(0.1)


def run_last_cell(page, says: str):
    "Ask the kernel something, and wait for its answer."
    page.evaluate("""() => {
      const notebook = jupyterapp.shell.currentWidget.content;
      notebook.activeCellIndex = notebook.widgets.length - 1;
      jupyterapp.commands.execute('notebook:run-cell');
    }""")
    page.wait_for_function(
        "says => [...document.querySelectorAll('.jp-OutputArea-output')]"
        ".some(o => o.innerText.includes(says))",
        arg=says,
    )


def test_train_pause_resume_stop_export(page, lab):
    _, folder = lab
    press(page, ".ml-session", "Start")
    seen = watch_pictures(page, 4)
    assert all(len(pictures) >= 4 for pictures in seen)  # so each changed three times
    run_last_cell(page, "session is running")

    press(page, ".ml-session", "Pause")
    state_is(page, "paused")
    settle(page, ".ml-progress")  # the state may be drawn before the line
    step = page.locator(".ml-progress").inner_text().split("·")[0]
    time.sleep(1)  # several steps long
    assert page.locator(".ml-progress").inner_text().split("·")[0] == step
    shown = page.locator(".ml-session").inner_text()
    assert "used: " in shown and "estimated peak" in shown
    picture(page, ".ml-session", "5-paused")
    press(page, ".ml-session", "Save now")
    checkpoint = f"checkpoint-{step.split()[1]}"
    wait_text(
        page,
        ".ml-progress",
        "text.includes('saved') && text.includes(argument)",
        checkpoint,
    )
    assert (folder / "runs/workbench" / checkpoint / "trainer_state.json").exists()

    press(page, ".ml-session", "Resume")
    wait_text(page, ".ml-progress", "text.split('·')[0] !== argument", step)
    press(page, ".ml-session", "Stop")
    state_is(page, "stopped")
    press(page, ".ml-session", "Export")
    wait_text(page, ".ml-progress", "text.includes('exported')")
    picture(page, ".ml-session", "6-exported")
    run_last_cell(page, "merger is written")
    check_checkpoint(folder)


def check_checkpoint(folder: Path):
    "The exported checkpoint has the merger's own weights and logits, which are no component's."
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    own, model = (
        load_file(folder / "own.safetensors"),
        load(folder / "runs/workbench/merged"),
    )
    expected, weights = own.pop("logits"), model.state_dict()
    assert own.keys() <= weights.keys() and len(own) >= 30
    assert all(torch.equal(weights[name], tensor) for name, tensor in own.items())
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 9, 12]])).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    experts = [
        load(ROOT / "data/models" / name).state_dict()
        for name in ("rewrite", "summarize")
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    average = (experts[0][name] + experts[1][name]) / 2
    for other in (average, *(expert[name] for expert in experts)):
        assert (weights[name] - other).abs().max() > 1e-4


def watch_pictures(page, wanted: int) -> list[set[str]]:
    "What loss, trajectories and heatmap show while training, one after another."
    seen, end = [set(), set(), set()], time.monotonic() + PATIENCE
    while min(map(len, seen)) < wanted and time.monotonic() < end:
        images = (page.locator(f"img.ml-{name}") for name in ("loss", "trajectories"))
        digests = [image.evaluate(DIGEST) for image in images]
        digests.append(page.locator(".ml-heatmap").inner_html())
        if page.locator(".ml-progress").inner_text().startswith("step"):
            for shown, digest in zip(seen, digests):
                shown.update([digest] if digest else [])
        time.sleep(0.05)
    return seen


def test_runs_are_listed_and_compared(page):
    press(page, ".ml-browser", "Refresh")
    wait_text(page, ".ml-browser", "text.includes('workbench')")
    page.locator(".ml-browser select[multiple]").select_option(["workbench", "script"])
    press(page, ".ml-browser", "Compare")
    wait_text(page, ".ml-browser-status", "text.includes('2 compared')")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.ml-browser img')].length === 2 &&"
        " [...document.querySelectorAll('.ml-browser img')].every(i => i.naturalWidth)"
    )
    picture(page, ".ml-browser", "7-runs")
    press(page, ".ml-browser", "Load masks")
    wait_text(page, ".ml-browser-status", "text.includes('choose one run')")
    page.locator(".ml-browser select[multiple]").select_option(["script"])
    press(page, ".ml-browser", "Load masks")
    wait_text(
        page, ".ml-browser-status", "text.includes('starts from the masks of script')"
    )
    wait_text(page, STATUS, "text.includes('masks of script')")


def test_another_system_runs_from_its_panel(page, lab):
    _, folder = lab
    page.locator(".ml-panel .lm-TabBar-tab", has_text="Training").last.click()
    page.locator(".ml-field-max_steps input").last.fill("3")
    page.locator(".ml-face", has_text="max_steps: 3").last.wait_for()
    press(page, ".ml-run", "Run")
    state = "['finished', 'failed'].includes(text.trim()) && text.trim()"
    wait_text(page, ".ml-run .ml-state", state)
    picture(page, ".ml-run", "8-run")
    assert page.locator(".ml-run .ml-state").inner_text().strip() == "finished"
    assert (folder / "runs/shorter/merged/config.json").exists()
    history = (folder / "runs/shorter/history.jsonl").read_text().splitlines()
    assert len(history) == 3  # as the panel said
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('.ml-run img')];"
        " return all.length >= 3 && all.every(i => i.naturalWidth); }"
    )
    press(page, ".ml-browser", "Refresh")
    page.locator(".ml-browser select[multiple]").select_option(["shorter", "script"])
    press(page, ".ml-browser", "Compare")
    wait_text(
        page,
        ".ml-browser",
        "text.includes('layer-merge') && text.includes('2 compared')",
    )
    picture(page, ".ml-browser", "9-runs-of-two-systems")
