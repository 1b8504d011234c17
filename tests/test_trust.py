"""What a run may be trusted for: nothing finished is lost, nothing damaged is used, nobody else is in its folder."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_lab.components import load_model
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import alone_in, bundled_path, read_history, save_tensors, seal
from merge_lab.systems import lora_merge
from merge_lab.systems.mask_merge import demo_config, run
from merge_lab.tinylm import save_tiny, tiny_experts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A short run with two checkpoints and an export; what goes on with it does so with a copy."
    config = demo_config(
        output_dir=str(tmp_path_factory.mktemp("trust") / "run"),
        dataset_configs={str(bundled_path(f"tasks/{task}")): 24 for task in ("rewrite", "summarize")},
        max_steps=4, save_steps=2, eval_samples=0, held_out_rows=4, per_device_train_batch_size=2, report=False, base_model=None,
        target_modules=["mlp"],
    )  # fmt: skip
    run(config, progress=False)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    "The same run in a folder of this test, asked to go on."
    folder = shutil.copytree(finished.output_dir, tmp_path / "run")
    return dataclasses.replace(finished, output_dir=str(folder), resume=True)


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"}


def masks_of(folder):
    return load_file(Path(folder) / "masks" / "masks.safetensors")


def refused(config, error, match):
    "A start that is refused leaves every file as it was."
    before = bytes_of(config.output_dir)
    with pytest.raises(error, match=match):
        run(config, progress=False)
    assert bytes_of(config.output_dir) == before


def test_fewer_steps_than_were_made_touch_nothing(copied):
    refused(dataclasses.replace(copied, max_steps=3), ValueError, "has made 4 steps")
    refused(dataclasses.replace(copied, seed=9), ValueError, "begun with")
    run(copied, progress=False)  # the documented way still works


def test_fewer_steps_than_were_made_touch_no_adapter_merge(tmp_path, monkeypatch):
    "Of other systems as well: the check stands in the contract that all of them use."
    made = tmp_path / "run"
    config = lora_merge.LoRAMergeConfig(adapters=["a", "b"], datasets=["c", "d"], output_dir=str(made), max_steps=20)
    from merge_lab.run_folder import begin_run

    begin_run(config)
    (made / "checkpoint-20").mkdir()
    for name in ("optimizer.pt", "scheduler.pt"):
        (made / "checkpoint-20" / name).write_text(name)
    (made / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": 20}')
    before = bytes_of(made)
    with pytest.raises(ValueError, match="has made 20 steps"):
        lora_merge.run(dataclasses.replace(config, max_steps=10, resume=True))
    assert bytes_of(made) == before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "masks.safetensors", "rng_state.pth"])
def test_a_file_that_a_checkpoint_lost_sends_back_to_the_one_before(copied, finished, name, caplog):
    folder = Path(copied.output_dir)
    (folder / "checkpoint-4" / name).unlink()
    run(copied, progress=False)
    assert f"checkpoint-4/{name} is missing" in caplog.text
    wanted = masks_of(finished.output_dir)
    assert all(torch.equal(mask, wanted[name]) for name, mask in masks_of(folder).items())


def test_an_edited_checkpoint_is_not_believed(copied, caplog):
    folder = Path(copied.output_dir)
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 4', '"global_step": 3'))
    masks = folder / "checkpoint-2" / "masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:-8])
    refused(copied, FileNotFoundError, "trainer_state.json is not what was written.*masks.safetensors is not what was written")


def test_an_empty_newest_checkpoint_hides_no_whole_one(copied):
    (Path(copied.output_dir) / "checkpoint-9").mkdir()
    assert len(run(copied, progress=False).history) == 4


def test_a_bad_line_of_the_history_erases_none(copied):
    file = Path(copied.output_dir) / "history.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + "{not json\n" + "".join(lines[2:]))
    refused(copied, ValueError, "history.jsonl:2: this line is no row")
    file.write_text("".join(lines[:-1]) + lines[-1][:20])  # torn by a kill
    assert len(read_history(file)) == 3


def test_masks_know_their_components(copied, tmp_path):
    folder, paths = Path(copied.output_dir) / "masks", copied.model_paths
    Merger.from_pretrained(folder)
    with pytest.raises(ValueError, match="components were swapped"):
        Merger.from_pretrained(folder, paths[::-1])
    other = shutil.copytree(paths[1], tmp_path / "retrained")
    weights = load_file(other / "model.safetensors")
    save_tensors(other / "model.safetensors", {name: weight + 0.01 for name, weight in weights.items()})
    with pytest.raises(ValueError, match="retrained has: its weights have changed"):
        Merger.from_pretrained(folder, [paths[0], str(other)])
    moved = shutil.copytree(paths[1], tmp_path / "moved")
    Merger.from_pretrained(folder, [paths[0], str(moved)])


def test_weights_that_changed_between_stop_and_resume_are_told(finished, tmp_path):
    paths = [shutil.copytree(path, tmp_path / f"model{i}") for i, path in enumerate(finished.model_paths)]
    config = dataclasses.replace(finished, model_paths=list(map(str, paths)), output_dir=str(tmp_path / "run"), save_merged=False, max_steps=2)
    run(config, progress=False)
    weights = load_file(paths[0] / "model.safetensors")
    save_tensors(paths[0] / "model.safetensors", {name: 2 * weight for name, weight in weights.items()})
    with pytest.raises(ValueError, match="its weights have changed"):
        run(dataclasses.replace(config, resume=True, max_steps=4), progress=False)


def test_a_folder_is_one_processes_own(copied, forked):
    code = f"from merge_lab.run_folder import alone_in; import sys\nwith alone_in({copied.output_dir!r}):\n    print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline()
        refused(copied, FileExistsError, "another process is at work in it")
        refused(dataclasses.replace(copied, resume=False, overwrite=True), FileExistsError, "another process is at work in it")
    finally:
        holder.kill()
        holder.wait()
    run(copied, progress=False)  # a dead process holds nothing
    with alone_in(copied.output_dir):  # nor does a run that has ended
        pass


_EXPORT = """
import os, sys
from merge_lab import run_folder
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
left = int(sys.argv[1])
def killed(write):
    def wrapped(*a, **k):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return write(*a, **k)
    return wrapped
os.replace, os.unlink = killed(os.replace), killed(os.unlink)
merger = Merger.from_config(MergerConfig(sys.argv[2:4], mask_init={"strategy": "odd_one_out", "selected_idx": 1}))
merger.save_merged("merged", max_shard_size=sys.argv[4])
"""


def test_an_export_that_is_killed_anywhere_is_never_a_mix(tmp_path, forked):
    a, b = (str(save_tiny(model, tmp_path / name)) for name, model in zip("ab", tiny_experts(n=2)))
    Merger.from_config(MergerConfig([a, b], mask_init={"strategy": "odd_one_out", "selected_idx": 0})).save_merged(tmp_path / "first", max_shard_size="20KB")
    wanted = [load_model(path).state_dict() for path in (a, b)]
    states, left = set(), 0
    while "second" not in states:
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        shutil.copytree(tmp_path / "first", tmp_path / "merged")
        child = subprocess.run([sys.executable, "-c", _EXPORT, str(left), a, b, "30KB"], check=False, cwd=tmp_path, capture_output=True, timeout=120)
        assert child.returncode in (0, -signal.SIGKILL), child.stderr.decode()
        if (tmp_path / "merged" / "config.json").exists():
            state = load_model(tmp_path / "merged").state_dict()
            same = [all(torch.equal(state[name], tensor) for name, tensor in one.items()) for one in wanted]
            assert any(same), f"a mix after {left} writes"
            states.add("second" if same[1] and child.returncode == 0 else "first")
        else:
            states.add("none")
        left += 5
    assert {"first", "second"} <= states
    assert not list((tmp_path / "merged").glob(".unfinished*")) and (tmp_path / "merged" / "README.md").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
def test_a_signal_before_training_is_told(number, tmp_path, forked):
    code = (
        "import os, signal, merge_lab.cli as cli\n"
        f"signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"cli.call = lambda *_: os.kill(os.getpid(), {int(number)}) or __import__('time').sleep(5)\n"
        "raise SystemExit(cli.main(['mask-merge']))"
    )
    child = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert child.returncode == 130 and "interrupted" in child.stderr and "Traceback" not in child.stderr


def test_no_place_to_write_is_said_before_the_work(finished, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="nothing may be written"):
        run(dataclasses.replace(finished, output_dir=str(tmp_path / "closed" / "run"), dry_run=True), progress=False)


def test_overwriting_through_a_link_clears_what_it_leads_to(copied, tmp_path):
    (tmp_path / "link").symlink_to(copied.output_dir)
    (Path(copied.output_dir) / "old.txt").write_text("old")
    again = dataclasses.replace(copied, output_dir=str(tmp_path / "link"), resume=False, overwrite=True, max_steps=2)
    run(again, progress=False)
    assert (tmp_path / "link").is_symlink() and not (Path(copied.output_dir) / "old.txt").exists()
    assert json.loads((Path(copied.output_dir) / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_seal_says_which_file_is_not_what_was_written(tmp_path):
    from merge_lab.run_folder import damage_of

    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    assert damage_of(tmp_path) == ""
    (tmp_path / "optimizer.pt").write_text("optimizer.pT")
    assert damage_of(tmp_path).endswith("optimizer.pt is not what was written")
    (tmp_path / "manifest.json").write_text("{")
    assert damage_of(tmp_path).endswith("manifest.json is damaged")


def test_a_seal_needs_nothing_of_a_newer_python(tmp_path, monkeypatch):
    "`hashlib.file_digest` came with 3.11; 3.10 is supported."
    import hashlib

    from merge_lab.run_folder import damage_of

    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    (tmp_path / "optimizer.pt").write_bytes(b"x" * 3_000_000)
    seal(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["optimizer.pt"][1] == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert damage_of(tmp_path) == ""


def test_a_checkpoint_looks_at_no_component_again(tmp_path, monkeypatch):
    paths = [str(save_tiny(model, tmp_path / name)) for name, model in zip("ab", tiny_experts(n=2))]
    merger = Merger.from_config(MergerConfig(paths))
    looked = []
    monkeypatch.setattr("merge_lab.merger.weights_digest", lambda path: looked.append(path) or "digest")
    for step in range(3):
        merger.save_pretrained(tmp_path / f"checkpoint-{step}")
    assert looked == paths
