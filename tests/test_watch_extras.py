"""Trackers and views that are extras: what is said without them, and that they work where they are installed."""

import sys
from types import SimpleNamespace

import pytest

from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.tinylm import tiny_experts
from merge_lab.training import check_report_to


@pytest.mark.parametrize("mode, account, says", [("online", False, "WANDB_MODE=offline"), ("online", True, None), ("offline", False, None)])
def test_a_tracker_without_an_account_is_refused_before_models_are_loaded(monkeypatch, mode, account, says):
    fake = SimpleNamespace(setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)), login=lambda prompt: account)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("merge_lab.training.get_available_reporting_integrations", lambda: ["wandb"])
    if says is None:
        return check_report_to("wandb")
    with pytest.raises(ValueError, match=says):
        check_report_to("wandb")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_missing_is_named_with_its_install_command(monkeypatch, name):
    monkeypatch.setattr("merge_lab.training.get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        check_report_to(name)


def test_treescope_shows_what_a_merge_is_made_of():
    treescope = pytest.importorskip("treescope")
    merger = Merger(tiny_experts("llama", n=2), MergerConfig(constrain_mode="sum1"))
    page = treescope.render_to_html(merger, compressed=False)
    for part in ("component 0", "sum1", "alphas of shape"):
        assert part in page
