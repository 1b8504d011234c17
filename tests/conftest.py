"""One torch thread: two collapse when anything else runs on two cores. Nothing is downloaded."""

import gc
import logging
import os
import shlex
import subprocess
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import forks

torch.set_num_threads(1)

# a worker takes whole files; what takes long begins first, or one core idles at the end
LONG = [f"test_{name}" for name in ["real", "widgets", "dam", "browser", "mask_merge", "lora_merge", "export", "distributed", "layer_merge", "router"]]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes minutes; only with -m slow")


def pytest_collection_modifyitems(config, items):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
    skip = pytest.mark.skip(reason="no CUDA device is visible")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_collected_again():
    "Loading a model collects garbage; among the objects of all that is imported that takes longer than the model."
    gc.collect()
    gc.freeze()


@pytest.fixture
def forked(monkeypatch):
    "Python processes are forked from one that has imported torch and transformers: a tenth of the time."
    monkeypatch.setattr(subprocess, "Popen", forks.Popen)


@pytest.fixture
def nothing_deprecated():
    "Fail on what is deprecated: warnings, and what transformers, peft and trl log instead of warning of it."
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "trl")]
    for one in loggers:
        one.addHandler(handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        warnings.filterwarnings("error", ".*deprecated", DeprecationWarning)
        yield
    for one in loggers:
        one.removeHandler(handler)
    assert not [text for text in said if "deprecated" in text.lower()]


@pytest.fixture
def readme_commands():
    "What gives the words of the README's commands that begin so, as printed there."

    def commands(start):
        text = Path(__file__).parent.parent.joinpath("README.md").read_text("utf-8")
        lines = text.replace("\\\n", " ").splitlines()
        return [shlex.split(x)[1:] for x in lines if x.startswith(f"merge-lab {start}")]

    return commands
