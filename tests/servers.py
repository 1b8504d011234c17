"""Notebook servers of their own, for tests in a browser: JupyterLab and marimo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 420  # seconds: the machine may be busy with other things
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
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
READY = """async () => {
  const widget = jupyterapp.shell.currentWidget;
  if (!widget || !widget.context) return false;
  await widget.context.ready;
  await widget.sessionContext.ready;
  await widget.sessionContext.session.kernel.info;
  return true;
}"""


RAN = """() => {
  const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
  return cells.filter(c => c.type === 'code').every(c => c.executionCount !== null);
}"""


def browser_api():
    "Playwright's interface; a module is skipped where there is no browser, no playwright or no nbformat."
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)", allow_module_level=True)
    pytest.importorskip("nbformat", reason="nbformat is not installed")
    return pytest.importorskip("playwright.sync_api", reason="no playwright")


def open_notebook(page, address: str, name: str):
    "Show a notebook in JupyterLab, with its kernel ready, in a window without the file list."
    page.goto(f"{address}/lab/tree/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function(READY)
    page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")


def run_all(page):
    "Run all cells, and wait until they have run."
    page.evaluate("{ jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(RAN, polling=200)


def write_settings(folder: Path):
    for name, value in SETTINGS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_server(address: str, server, log: Path):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} did not start:\n{log.read_text()[-2000:]}")


@contextmanager
def serving(command: list[str], folder: Path, home: Path, probe: str, **own):
    "A server in a process group of its own, which ends with the block."
    own |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for_server(probe, server, home / "log")
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


@contextmanager
def jupyter_lab(folder: Path, home: Path):
    "Address of a JupyterLab that shows a folder."
    port = free_port()
    write_settings(home / "settings")
    own = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    command += [
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    address = f"http://127.0.0.1:{port}"
    with serving(command, folder, home, f"{address}/api", **own):
        yield address


@contextmanager
def marimo_app(file: Path, home: Path):
    "Address of a marimo notebook that runs as an app."
    port = free_port()
    command = [sys.executable, "-m", "marimo", "--quiet", "run", str(file)]
    command += ["--headless", "--no-token", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    own = {"HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home, "MARIMO_SKIP_UPDATE_CHECK": 1}
    with serving(command, file.parent, home, f"{address}/health", **own):
        yield address
