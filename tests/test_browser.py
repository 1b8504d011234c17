"""The workbench as its user sees it: real JupyterLab, real Chromium, buttons only.

MERGE_LAB_SCREENSHOTS=folder keeps a screenshot of every panel.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 420  # seconds: the machine may be busy with other things
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

if CHROMIUM is None:
    reason = "no Chromium is installed (apt-get install chromium)"
    pytest.skip(reason, allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "windowingMode": "none"
    },
}
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
STATUS = ".ml-explorer .ml-status"
PROBE = 'print("session is", session.state)'
RAN = """() => {
  const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
  return cells.filter(c => c.type === 'code').every(c => c.executionCount !== null);
}"""
READY = """async () => {
  const widget = jupyterapp.shell.currentWidget;
  if (!widget || !widget.context) return false;
  await widget.context.ready;
  await widget.sessionContext.ready;
  await widget.sessionContext.session.kernel.info;
  return true;
}"""


def write_settings(folder: Path):
    for name, value in SETTINGS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))


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
    write_settings(home / "settings")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
        "PYTHONPATH": ROOT,
        "OMP_NUM_THREADS": 1,
        "HF_HUB_OFFLINE": 1,
    }
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    command += [
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    log = (home / "log").open("w")
    server = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(address, server, home / "log")
        yield address, folder
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
        log.close()


def wait_for_server(address: str, server, log: Path):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def page(lab):
    "The workbench after Run All."
    address, _ = lab
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{address}/lab/tree/workbench.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_function(READY)
        page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
        page.evaluate("{ jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_function(RAN, polling=1000)
        page.wait_for_selector(".ml-scores")
        yield page
        browser.close()


def picture(page, selector: str, name: str):
    "Keep a screenshot of a panel, if the user asked for it."
    folder = os.environ.get("MERGE_LAB_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        place = page.locator(selector).first
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
    page.locator(".ml-field-constrain_mode select").select_option("identity")
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


def test_looking_at_a_panel_changes_nothing_and_labels_fit(page):
    yaml = page.locator(".ml-face").first.inner_text()
    assert "learning_rate: 0.03\n" in yaml and "max_length" not in yaml
    clipped = page.evaluate(
        """() => [...document.querySelectorAll('.ml-panel .lm-TabBar-tabLabel,'
          + ' .ml-label, .ml-panel .widget-label, .ml-panel button')]
          .filter(e => e.offsetWidth && e.scrollWidth > e.clientWidth + 1)
          .map(e => e.innerText)"""
    )
    assert clipped == []


def test_the_share_changes_the_scores(page):
    before = page.locator(".ml-scores").inner_text()
    page.locator(".ml-share .noUi-handle").focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    wait_text(page, ".ml-scores", "text !== argument", before)
    picture(page, ".ml-explorer", "4-explorer")


def test_forty_positions_make_few_merges_and_end_on_the_last(page):
    count = lambda: int(re.search(r"merge (\d+)", page.locator(STATUS).inner_text())[1])
    page.locator(".ml-share .noUi-handle").focus()
    page.keyboard.press("Home")
    wait_text(page, ".ml-share .widget-readout", "text.trim() === '0.00'")
    settle(page)
    before = count()
    for _ in range(40):  # steps of 0.025, from 0 to 1
        page.keyboard.press("ArrowRight")
        time.sleep(0.03)
    wait_text(page, ".ml-share .widget-readout", "text.trim() === '1.00'")
    same = "([...document.querySelectorAll('.ml-scores tr')].slice(-2)" + (
        ".map(row => [...row.cells].slice(1).map(cell => cell.innerText).join()))"
    )
    page.wait_for_function(f"() => {{ const [a, b] = {same}; return a === b }}")
    settle(page)
    assert 1 <= count() - before <= 15
    summarize, merged = page.evaluate(same)
    assert merged == summarize  # a share of one is the second component


def settle(page):
    "Wait until no merge has been made for two seconds."
    text, since = page.locator(STATUS).inner_text(), time.monotonic()
    while time.monotonic() - since < 2:
        if (now := page.locator(STATUS).inner_text()) != text:
            text, since = now, time.monotonic()
        time.sleep(0.1)


def test_train_pause_resume_stop_export(page, lab):
    _, folder = lab
    press(page, ".ml-session", "Start")
    seen = watch_pictures(page, 3)
    assert len(seen) >= 3

    page.evaluate("""() => {
      const notebook = jupyterapp.shell.currentWidget.content;
      notebook.activeCellIndex = notebook.widgets.length - 1;
      jupyterapp.commands.execute('notebook:run-cell');
    }""")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-OutputArea-output')]"
        ".some(o => o.innerText.includes('session is running'))"
    )

    press(page, ".ml-session", "Pause")
    state_is(page, "paused")
    step = page.locator(".ml-progress").inner_text().split("·")[0]
    time.sleep(3)
    assert page.locator(".ml-progress").inner_text().split("·")[0] == step
    picture(page, ".ml-session", "5-paused")

    press(page, ".ml-session", "Resume")
    wait_text(page, ".ml-progress", "text.split('·')[0] !== argument", step)
    press(page, ".ml-session", "Stop")
    state_is(page, "stopped")
    press(page, ".ml-session", "Export")
    wait_text(page, ".ml-progress", "text.includes('exported')")
    picture(page, ".ml-session", "6-exported")

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "runs/workbench/merged")
    assert model.config.model_type == "llama"
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 9, 12]])).logits
    assert logits.isfinite().all() and logits.std() > 0


def watch_pictures(page, wanted: int) -> set[str]:
    "Addresses that the picture of the loss has, one after another."
    seen, end = set(), time.monotonic() + PATIENCE
    while len(seen) < wanted and time.monotonic() < end:
        source = page.locator("img.ml-loss").get_attribute("src")
        if source and page.locator(".ml-progress").inner_text().startswith("step"):
            seen.add(source)
        time.sleep(0.1)
    return seen


def test_runs_are_listed_and_compared(page):
    press(page, ".ml-browser", "Refresh")
    wait_text(page, ".ml-browser", "text.includes('workbench')")
    page.locator(".ml-browser select").select_option(["workbench", "script"])
    press(page, ".ml-browser", "Compare")
    wait_text(page, ".ml-browser-status", "text.includes('2 compared')")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.ml-browser img')].length === 2 &&"
        " [...document.querySelectorAll('.ml-browser img')].every(i => i.naturalWidth)"
    )
    picture(page, ".ml-browser", "7-runs")


def test_another_system_runs_from_its_panel(page, lab):
    _, folder = lab
    press(page, ".ml-run", "Run")
    state = "['finished', 'failed'].includes(text.trim()) && text.trim()"
    wait_text(page, ".ml-run .ml-state", state)
    picture(page, ".ml-run", "8-run")
    assert page.locator(".ml-run .ml-state").inner_text().strip() == "finished"
    assert (folder / "runs/shorter/merged/config.json").exists()
