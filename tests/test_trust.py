"""What a run may be trusted for: nothing finished is lost, nothing damaged is used, nobody else is in its folder."""

import dataclasses
import json
import os
import pickletools
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import merge_lab
from merge_lab import exports
from merge_lab.cli import main
from merge_lab.components import load_model
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.run_folder import alone_in, bundled_path, damage_of, last_checkpoint, read_history, RunInterrupted, save_tensors, sweep, UNFINISHED
from merge_lab.run_folder import finish_replacement, whole_checkpoint, whole_folder, write_text
from merge_lab.runs import Run
from merge_lab.stopping import StopCallback
from merge_lab.systems import lora_merge, quantize
from merge_lab.systems.mask_merge import demo_config, run
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model
from small_runs import ADAPTERS, DAM, LAYERS, LORA, make_ground, MERGE, QUANTIZE, ROUTER, rows, sealed_checkpoint, SignalAt, small, stopping_at, TRAIN


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
    sealed_checkpoint(made, 20)
    before = bytes_of(made)
    with pytest.raises(ValueError, match="has made 20 steps"):
        lora_merge.run(dataclasses.replace(config, max_steps=10, resume=True))
    assert bytes_of(made) == before


@pytest.mark.parametrize("name", ["optimizer.safetensors", "optimizer.json", "trainer_state.json", "masks.safetensors", "rng_state.json", "manifest.json"])
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
    for number in (8, 9):
        (Path(copied.output_dir) / f"checkpoint-{number}").mkdir()
    (Path(copied.output_dir) / "checkpoint-8" / "trainer_state.json").touch()
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
    refused(dataclasses.replace(config, resume=True, max_steps=4), ValueError, "model0 has changed, or is another one, since the run")


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
os.rename, os.replace, os.unlink = map(killed, (os.rename, os.replace, os.unlink))
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
        child = subprocess.run([sys.executable, "-c", _EXPORT, str(left), a, b, "20KB"], check=False, cwd=tmp_path, capture_output=True, timeout=120)
        assert child.returncode in (0, -signal.SIGKILL), child.stderr.decode()
        state = load_model(tmp_path / "merged").state_dict()
        same = [all(torch.equal(state[name], tensor) for name, tensor in one.items()) for one in wanted]
        assert any(same), f"a mix after {left} writes"
        states.add("second" if same[1] and child.returncode == 0 else "first")
        left += 5
    assert {"first", "second"} <= states
    assert not list((tmp_path / "merged").glob(".unfinished*")) and (tmp_path / "merged" / "README.md").exists()


def killed_after(calls, work) -> bool:
    "Do some work in a process that dies before it has made, moved or removed a file or folder once more than so many times; whether it came to its end."
    if not (child := os.fork()):
        left = [calls]

        def counted(call):
            def wrapped(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return wrapped

        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def until_whole(calls, work) -> int:
    "Go on after each kill with a start that is killed as early, if it ever gets so far; how often it was killed."
    kills = 0
    while not killed_after(calls + kills, work):
        kills += 1
    return kills


EARLIER_AND_LATER = {  # files of two checkpoints, the second in place of the first
    "plain": (("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"), ("config.json", "model.safetensors", "tokenizer.json")),
    "shards": (("config.json", "model.safetensors", "templates/more.jinja"), ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "templates/more.jinja")),
    "adapter": (("adapter_config.json", "adapter_model.safetensors"),) * 2,
    "masks": (("merger_config.json", "masks.safetensors", "dam.json"), ("merger_config.json", "masks.safetensors")),
    "talking": (("config.json", "model.safetensors", "chat_template.jinja", "templates/more.jinja"), ("config.json", "model.safetensors")),
}


@pytest.mark.parametrize("kind", EARLIER_AND_LATER)
def test_a_checkpoint_is_the_earlier_or_the_later_one_wherever_a_kill_comes(kind, tmp_path):
    "It has its own files and no other's, but for those that somebody has put there."
    folder, seen, calls = tmp_path / "out", set(), 0
    first, second = EARLIER_AND_LATER[kind]

    def write(names, told):
        with whole_checkpoint(folder) as made:
            for name in names:
                write_text(made / name, told)

    def replace():
        write(second, "later")

    def found():
        return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file() and path.name != ".written.json"}

    wanted = [{"notes.md": "mine"} | dict.fromkeys(names, told) for names, told in ((first, "earlier"), (second, "later"))]
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        write(first, "earlier")
        write_text(folder / "notes.md", "mine")
        ended = killed_after(calls, replace)
        until_whole(calls % 7, lambda: finish_replacement(folder))
        sweep(folder)
        assert found() in wanted, f"neither of the two after {calls} calls"
        seen.add(wanted.index(found()))
        if ended:
            break
        calls += 1
    assert seen == {0, 1} and found() == wanted[1]


def test_parts_of_a_folder_that_a_kill_left_to_be_moved_get_their_place(tmp_path):
    "A folder that holds something gets more: none of it or all of it."
    folder, seen, calls = tmp_path / "out", set(), 0

    def more():
        with whole_folder(folder) as made:
            for name in ("a", "b", "c"):
                write_text(made / name / "config.json", "new")

    while True:
        shutil.rmtree(folder, ignore_errors=True)
        write_text(folder / "mine.txt", "mine")
        ended = killed_after(calls, more)
        until_whole(calls % 7, lambda: finish_replacement(folder))
        seen.add(tuple(sorted(path.name for path in folder.iterdir())))
        if ended:
            break
        calls += 1
    assert seen == {("mine.txt",), ("a", "b", "c", "mine.txt")} and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("part", ["merged", "masks"])
def test_who_takes_a_run_elsewhere_finishes_what_a_kill_left_in_it(part, copied):
    "Export and the browser of runs see the checkpoint, or the masks, that had only to be moved."
    folder = Path(copied.output_dir, part)
    before, work = bytes_of(folder), folder / ".unfinished-checkpoint-abcdefgh"
    for name in ("finished", "replaced"):
        (work / name).mkdir(parents=True)
    for name in ("config.json", "merger_config.json", "masks.safetensors"):
        if (folder / name).exists():
            (folder / name).rename(work / "finished" / name)
    found = exports.find_source(copied.output_dir)
    assert (found.plain if part == "merged" else found.masks) == folder and bytes_of(folder) == before
    (work / "replaced").mkdir(parents=True)
    (folder / "README.md").rename(work / "replaced" / "README.md") if part == "merged" else (folder / "merger_config.json").rename(work / "replaced" / "merger_config.json")
    run = Run(copied.output_dir)
    assert run.merged and run.masks and bytes_of(folder) == before


def test_saved_masks_are_of_one_merger_wherever_a_kill_comes(tmp_path):
    paths = [str(save_tiny(model, tmp_path / name)) for name, model in zip("ab", tiny_experts(n=2))]
    one, other = (Merger.from_config(MergerConfig(paths, mode=mode)) for mode in ("scalar", "vector_input"))
    one.tied_weights(), other.tied_weights()
    seen, calls = set(), 0
    while "ended" not in seen:
        shutil.rmtree(tmp_path / "masks", ignore_errors=True)
        one.save_pretrained(tmp_path / "masks")
        seen |= {"ended"} if killed_after(calls, lambda: other.save_pretrained(tmp_path / "masks")) else set()
        loaded = Merger.from_pretrained(tmp_path / "masks")
        seen.add(loaded.merger_config.mode)
        assert loaded.mask_state().keys() == one.mask_state().keys()
        calls += 2
    assert seen == {"ended", "scalar", "vector_input"}


WRITERS = {"checkpoint": whole_checkpoint, "folder": whole_folder, "in its place": lambda folder: whole_folder(folder, instead=True)}


def writes(writer, folder, told):
    "Make one file in a folder by a writer, which yields when it is there."
    with writer(folder) as made:
        write_text(made / "merger_config.json", told)
        yield made


@pytest.mark.parametrize("first", WRITERS)
@pytest.mark.parametrize("second", WRITERS)
def test_two_that_write_into_one_folder_do_so_one_after_the_other(first, second, tmp_path, monkeypatch):
    "The second is refused while the first is at work, leaves nothing, and goes on once the first has ended or was killed."
    monkeypatch.setattr("merge_lab.whole_files._PATIENCE", 0.1)
    folder = tmp_path / "out"
    at_work = writes(WRITERS[first], folder, "first")
    next(at_work)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="out: another process is at work in it: it writes"):
        next(writes(WRITERS[second], folder, "second"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert list(at_work) == [] and (folder / "merger_config.json").read_text() == "first"
    if not (child := os.fork()):
        next(writes(WRITERS[first], folder, "killed"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(writes(WRITERS[second], folder, "second"))
    assert (folder / "merger_config.json").read_text() == "second" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_writers_of_one_folder_lose_nothing(tmp_path):
    "Each is refused or writes all; what is there is of one of them."
    children = []
    for told in "abcd":
        if not (child := os.fork()):
            ended = 0
            for _ in range(15):
                try:
                    with whole_checkpoint(tmp_path / "out") as made:
                        for name in ("config.json", "model.safetensors", "tokenizer.json"):
                            write_text(made / name, told)
                    ended += 1
                except FileExistsError:
                    continue
            os._exit(ended)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    told = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.name != ".written.json"}
    assert sum(ended) and len(set(told.values())) == 1 and len(told) == 3


def test_a_run_and_an_export_do_not_write_into_one_folder(copied, tmp_path):
    "Whichever comes second is refused, and nothing of the first is lost."
    folder = tmp_path / "out"
    with whole_folder(folder, instead=True) as made:  # what `merge-lab export` does
        write_text(made / "export.json", "{}")
        with pytest.raises(FileExistsError, match="another process is at work in it: it writes"):
            run(dataclasses.replace(copied, output_dir=str(folder), resume=False), progress=False)
    assert [path.name for path in folder.iterdir()] == ["export.json"]

    made = exports.whole_folder(folder := tmp_path / "new")
    made.__enter__()
    write_text(folder / "config.yaml", "of a run that was begun since")
    with pytest.raises(FileExistsError, match="is no export"):
        made.__exit__(None, None, None)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]

    before = bytes_of(copied.output_dir)
    with alone_in(copied.output_dir), pytest.raises(FileExistsError, match="another process is at work in it"):
        Run(copied.output_dir).export()
    assert bytes_of(copied.output_dir) == before
    assert Run(copied.output_dir).export() == Path(copied.output_dir) / "merged"


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


def test_no_place_to_write_is_said_before_the_work(finished, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir(mode=0o500)
    own = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "closed" and own(path, mode))  # root may write anywhere
    with pytest.raises(PermissionError, match="nothing may be written"):
        run(dataclasses.replace(finished, output_dir=str(tmp_path / "closed" / "run"), dry_run=True), progress=False)


def test_overwriting_through_a_link_clears_what_it_leads_to(copied, tmp_path):
    (tmp_path / "link").symlink_to(copied.output_dir)
    (Path(copied.output_dir) / "old.txt").write_text("old")
    again = dataclasses.replace(copied, output_dir=str(tmp_path / "link"), resume=False, overwrite=True, max_steps=2)
    run(again, progress=False)
    assert (tmp_path / "link").is_symlink() and not (Path(copied.output_dir) / "old.txt").exists()
    assert json.loads((Path(copied.output_dir) / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


RUNS = {  # short runs that make checkpoints, and what their training reads
    "mask-merge": (MERGE + TRAIN, "a/model.safetensors"),
    "layerwise": (MERGE + TRAIN + " --train_mode layerwise --layer_steps 2", "chat_b/train.jsonl"),
    "dam-train": (f"{DAM} --held_out_rows 1 --max_steps 2", "b/model.safetensors"),
    "layer-merge": (f"{LAYERS} --n_pairs 1 --data_dir chat_a --num_samples 4 --held_out_rows 2 --max_steps 2", "chat_a/train.jsonl"),
    "lora": (f"{LORA} --eval_dataset none --max_steps 2", "a/model.safetensors"),
    "lora-merge": (f"{ADAPTERS} --held_out_rows 1 --eval_samples 0 --max_steps 2", "y/adapter_model.safetensors"),
    "router": (ROUTER, "q/layer-00000.safetensors"),
    "quantize": (QUANTIZE, "a/model.safetensors"),
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def here(ground, tmp_path, monkeypatch):
    "A copy of the ground that a test may spoil."
    monkeypatch.chdir(shutil.copytree(ground, tmp_path / "ground"))
    return tmp_path / "ground"


def changed(place):
    "The same file with other weights, or other rows."
    file = Path(place)
    if file.suffix == ".jsonl":
        file.write_text(file.read_text() + file.read_text())
    else:
        save_tensors(file, {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()})


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_what_is_asked_to_stop_goes_on_unless_what_it_reads_has_changed(name, number, here, monkeypatch, capsys):
    "Of every system: the step ends, a checkpoint is there, and nothing is taken up with other weights or rows."
    words, read = RUNS[name]
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    owner, where = (quantize, "write_quantized") if name == "quantize" else (StopCallback, "on_step_end")
    original = getattr(owner, where)

    def stops(*arguments, **options):
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, stops)
        assert main(words.split()) == 130
    signal.signal(number, before)
    err = capsys.readouterr().err
    assert "Traceback" not in err and ("--resume" in err)
    assert name in ("quantize", "layerwise") or last_checkpoint(Path("out"))
    kept = bytes_of("out")
    source = Path(read).read_bytes()
    changed(read)
    assert main([*words.split(), "--resume"]) == 2
    assert "has changed, or is another one, since the run in out was begun" in capsys.readouterr().err
    assert bytes_of("out") == kept
    Path(read).write_bytes(source)
    assert main([*words.split(), "--resume"]) == 0
    assert re.search("Next: |merge-lab router|Load what is kept with", capsys.readouterr().out)  # what to do then


@pytest.mark.parametrize("name", ["mask-merge", "dam-train", "lora-merge"])
def test_a_finished_merge_stays_until_the_one_that_is_trained_further_is_there(name, here, monkeypatch):
    "Also where fewer steps are asked for than were made, which is refused."
    words = RUNS[name][0].replace("--max_steps 1", "").replace("--max_steps 2", "") + " --max_steps"
    assert main([*words.split(), "2"]) == 0
    before, merged = bytes_of("out"), bytes_of("out/merged")
    assert main([*words.split(), "1", "--resume"]) == 2 and bytes_of("out") == before

    def fails(*_, **__):
        raise ValueError("the machine is gone")

    monkeypatch.setattr(StopCallback, "on_step_end", fails)
    assert main([*words.split(), "4", "--resume"]) == 2 and bytes_of("out/merged") == merged


@pytest.mark.parametrize("name", ["mask-merge", "lora-merge", "layer-merge", "quantize", "router"])
def test_a_full_disk_is_told_with_file_and_bytes(name, here, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert main(RUNS[name][0].split()) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and "unfinished" not in told.splitlines()[-1]
    assert re.search(r"out\S+safetensors: could not be written .*No space left.*are needed and .* are free.*--resume", told.splitlines()[-1]), told


@pytest.mark.parametrize("name", ["layer-merge", "lora"])
def test_a_disk_that_takes_no_whole_model_is_told_with_file_and_bytes(name, here, capsys):
    "Also where transformers writes: the operating system refuses what is longer than any other file of the run."
    words, before = RUNS[name][0], resource.getrlimit(resource.RLIMIT_FSIZE)
    if name == "layer-merge":  # or a layer less would leave too little
        save_tiny(tiny_model("llama", hidden_size=64), "a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, before[1]))
    try:
        status = main(words.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert status == 2 and "Traceback" not in told
    assert re.search(r"out\S*merged/model.safetensors: could not be written .*too large.*are needed and .* are free", told.splitlines()[-1]), told
    assert not Path("out/merged/config.json").exists()
    assert main([*words.split(), "--resume"]) == 0  # with more room


def test_a_router_without_a_folder_says_where_it_is(here, capsys):
    "It is made where the command is started, told at the end, and begun a second time only if that is asked for."
    words, before = ROUTER.replace(" --output_dir out", "").split(), {path.name for path in here.iterdir()}
    assert main(words) == 0 and "router_checkpoints" in capsys.readouterr().out
    assert {path.name for path in here.iterdir()} - before == {"router_checkpoints"}
    made = bytes_of("router_checkpoints")
    assert main(words) == 2 and "router_checkpoints already holds a run" in capsys.readouterr().err and bytes_of("router_checkpoints") == made


def test_a_report_of_models_with_dollars_in_their_names_is_written(here):
    for name, other in (("a", "a$b_{c$"), ("b", "$100")):
        shutil.copytree(name, other)
    words = (MERGE + TRAIN).replace(" --no_report", "").split()
    at = words.index("--model_paths")
    words[at + 1 : at + 3] = ["a$b_{c$", "$100"]
    assert main(words) == 0 and "a$b_{c$" in (here / "out" / "report.html").read_text()


def test_rows_of_a_fine_tune_are_copied_nowhere(here, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "cache"))
    before = {path.name for path in here.iterdir()}
    assert main(RUNS["lora"][0].split()) == 0
    assert {path.name for path in here.iterdir()} - before == {"out"}  # neither in the cache nor where the command was started


def test_no_checkpoint_holds_a_pickle(here):
    for name in ("mask-merge", "lora", "router"):
        words = RUNS[name][0].replace("_dir out", f"_dir {name}")
        assert main(f"{words} --save_steps 1".split()) == 0
        made = {path.suffix for path in Path(name).glob("checkpoint-*/*")}
        assert last_checkpoint(Path(name)) and not made & {".pt", ".pth", ".bin", ".pkl"}, made


def test_the_one_pickle_is_for_published_instructions_and_runs_nothing(here):
    "Routers are read from safetensors; `torch.load(\"best_router_checkpoint.pt\")` is what others were told to write."
    assert main(f"{RUNS['router'][0]} --save_steps 1".split()) == 0
    with zipfile.ZipFile("out/best_router_checkpoint.pt") as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        made = {argument for opcode, argument, _ in pickletools.genops(file.read(name)) if "GLOBAL" in opcode.name or opcode.name == "INST"}
    assert made == {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}
    told = torch.load("out/best_router_checkpoint.pt", weights_only=True)["model_state_dict"]
    assert all(torch.equal(told[name], tensor) for name, tensor in load_file("out/best_router_checkpoint.safetensors").items())


def test_nothing_is_unpickled():
    for file in Path(merge_lab.__file__).parent.rglob("*.py"):
        assert not re.search(r"torch\.load\(|pickle\.loads?\(|Unpickler|allow_pickle=True|weights_only=False|joblib", file.read_text(encoding="utf-8")), file


def test_masks_of_adapters_know_them(here):
    assert main(f"{RUNS['lora-merge'][0]} --no_save_merged".split()) == 0
    lora_merge.AdapterMerger.from_pretrained("out/masks")
    changed("x/adapter_model.safetensors")
    with pytest.raises(ValueError, match="trained with other weights than x has"):
        lora_merge.AdapterMerger.from_pretrained("out/masks")


def test_a_clearing_that_is_killed_leaves_a_run(copied, monkeypatch):
    "Killed while it overwrites, a run can be overwritten again."
    from merge_lab.run_folder import begin_run, is_run

    folder, config = Path(copied.output_dir), dataclasses.replace(copied, resume=False, overwrite=True)
    files = sum(1 for path in folder.iterdir() if path.name != ".lock")
    for left in range(files):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", stopping_at(1, shutil.rmtree))
            patch.setattr(Path, "unlink", stopping_at(1 + left, Path.unlink))
            with pytest.raises(KeyboardInterrupt):
                begin_run(config)
        assert is_run(folder)
    begin_run(config)


def test_what_safetensors_had_begun_is_swept_after_a_kill(tmp_path):
    "It writes by way of a hidden file of its own; the limit kills in the middle of that."
    import resource

    if not (child := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        save_tensors(tmp_path / "run" / "masks.safetensors", {"x": torch.ones(2**16)})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert [path.name.startswith(UNFINISHED) for path in (tmp_path / "run").iterdir()] == [True]
    sweep(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_who_may_read_other_new_files_may_read_weights(here):
    assert main(["align", "a", "b", "--output_dir", "out"]) == 0
    assert main(["export", "a", "--output_dir", "plain", "--tokens", "8"]) == 0
    Path("new").touch()
    files = [*Path("out").rglob("*.*"), *Path("plain").glob("*.*")]
    assert {path.stat().st_mode for path in files if path.is_file()} == {Path("new").stat().st_mode}


def test_a_killed_write_is_in_nobodys_way(tmp_path):
    from merge_lab.run_folder import UNFINISHED, begin_run

    config = demo_config(output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{UNFINISHED}config.yaml.x").touch()
    folder = begin_run(config)
    assert (folder / "config.yaml").exists()


def test_a_run_says_that_its_teachers_are_gone(tmp_path, caplog):
    data = {str(bundled_path(f"tasks/{task}")): 8 for task in ("rewrite", "summarize")}
    config = small(tmp_path, dataset_configs=data, max_steps=8, save_steps=4, eval_samples=0, held_out_rows=0, save_merged=False, dtype="bfloat16")
    with pytest.raises(RunInterrupted):
        run(config, progress=False, callbacks=(SignalAt(6, signal.SIGTERM),))
    (tmp_path / "run" / "teachers-0.cache").unlink()
    run(dataclasses.replace(config, resume=True), progress=False)
    assert "teachers-0.cache has 0 of 16 samples" in caplog.text


def words_of_unequal_length(folder, n):
    "Rows of chat data, no two of them alike."
    chance, some = random.Random(0), ("cat", "dog", "bird", "fish", "tree", "house", "river", "road", "sun", "moon")
    said = lambda most: " ".join(chance.choice(some) for _ in range(chance.randint(1, most)))
    for split in ("train", "validation", "test"):
        rows(f"{folder}/{split}.jsonl", [{"messages": [{"role": "user", "content": said(12)}, {"role": "assistant", "content": said(14)}]} for _ in range(n)])
    return folder


@pytest.mark.parametrize("deterministic", [False, True], ids=["kept", "deterministic"])
def test_bfloat16_without_its_teachers_goes_on_otherwise_or_alike_and_says_which(deterministic, tmp_path, monkeypatch, caplog):
    "Of width 256, where sums are long enough to round otherwise in other batches: what is promised is the same bits, or a warning."
    monkeypatch.chdir(tmp_path)
    paths = [str(save_tiny(model, name)) for name, model in zip("ab", tiny_experts(n=2, hidden_size=256, intermediate_size=1024))]
    data = {words_of_unequal_length(f"chat_{name}", 6): 6 for name in "ab"}
    options = dict(model_paths=paths, dataset_configs=data, max_steps=8, save_steps=4, eval_samples=0, held_out_rows=0, per_device_train_batch_size=3, learning_rate=0.1)
    config = small(tmp_path, **options, base_model=None, save_merged=False, dtype="bfloat16", deterministic=deterministic)
    whole, cut = (dataclasses.replace(config, output_dir=name) for name in ("whole", "cut"))
    run(whole, progress=False)
    with pytest.raises(RunInterrupted):
        run(cut, progress=False, callbacks=(SignalAt(4, signal.SIGTERM),))
    kept = list(Path("cut").glob("teachers-*"))
    for file in kept:
        file.unlink()
    run(dataclasses.replace(cut, resume=True), progress=False)
    wanted, found = masks_of("whole"), masks_of("cut")
    apart = max(float((wanted[name] - found[name]).abs().max()) for name in wanted)
    assert bool(kept) != deterministic and ("teachers read the others again" in caplog.text) != deterministic
    assert apart == 0 if deterministic else apart < 0.05, apart


def test_a_seal_says_which_file_is_not_what_was_written(tmp_path):
    made = sealed_checkpoint(tmp_path, 3)
    assert damage_of(made) == ""
    (made / "optimizer.json").write_text('{"global_step": 4}\n')
    assert damage_of(made).endswith("optimizer.json is not what was written")
    for told in ("{", "[]", '{"optimizer.json": 3}', '{"optimizer.json": ["a", "b"]}'):
        (made / "manifest.json").write_text(told)
        assert damage_of(made).endswith("manifest.json is damaged")
    (made / "manifest.json").unlink()
    assert damage_of(made).endswith("manifest.json is missing")


def test_a_seal_needs_nothing_of_a_newer_python(tmp_path, monkeypatch):
    "`hashlib.file_digest` came with 3.11; 3.10 is supported."
    import hashlib

    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/more.bin").write_bytes(b"x" * 3_000_000)
    made = sealed_checkpoint(tmp_path, 3)
    assert json.loads((made / "manifest.json").read_text())["more.bin"][1] == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert damage_of(made) == ""


def test_a_checkpoint_looks_at_no_component_again(tmp_path, monkeypatch):
    paths = [str(save_tiny(model, tmp_path / name)) for name, model in zip("ab", tiny_experts(n=2))]
    merger = Merger.from_config(MergerConfig(paths))
    looked = []
    monkeypatch.setattr("merge_lab.merger.weights_digest", lambda path: looked.append(path) or "digest")
    for step in range(3):
        merger.save_pretrained(tmp_path / f"checkpoint-{step}")
    assert looked == paths


def test_an_audit_that_asked_nobody_is_no_good_news(tmp_path):
    place = Path(__file__).parent.parent / "docs"
    sys.path.insert(0, str(place))
    try:
        import audit
    finally:
        sys.path.remove(str(place))
    skipped, fine = {"name": "torch", "skip_reason": "not found"}, {"name": "pip", "version": "1", "vulns": []}
    bad = {"name": "urllib3", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    assert audit.told({"dependencies": [skipped]}) == (2, audit.NOT_ASKED.format(why="the index that answers here knows none of the 1 packages"))
    assert audit.told({"dependencies": [skipped, fine]}) == (0, "1 packages audited, 0 known faults; 1 could not be asked about: torch.")
    assert audit.told({"dependencies": [bad, fine]}) == (1, "urllib3 1: PYSEC-1, mended in 2\n2 packages audited, 1 known faults.")
    assert audit.main(sys.executable, "nothing.txt") == 2  # a program that gives no report


def test_a_quantised_folder_is_verified(here, capsys, caplog):
    "Each precision reads the text; what is missing, damaged or no number is named."
    file, again = Path("q/layer-00001.safetensors"), ["verify", "q", "--tokens", "16"]
    assert main(again) == 0
    told = capsys.readouterr().out
    assert "The quantised model is whole" in told and all(f"{bits} bits" in told for bits in range(3, 9)) and "as it was" in told
    assert main([*again, "--against", "gguf"]) == 2 and "only this package reads" in capsys.readouterr().err
    config = Path("q/config.yaml").read_text()
    Path("q/config.yaml").write_text(config.replace("model_path: ", "model_path: gone/"))
    assert main(again) == 0
    assert "is not at gone/" in caplog.text and "as it was" not in capsys.readouterr().out
    Path("q/config.yaml").write_text(config)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(again) == 2 and "layer-00001.safetensors is not what was written" in capsys.readouterr().err
    file.unlink()
    assert main(again) == 2 and "layer-00001.safetensors" in capsys.readouterr().err
    Path("q/SHA256SUMS").unlink()
    assert main(again) == 2 and "layer-00001.safetensors: it cannot be read" in capsys.readouterr().err
    file.write_bytes(whole)
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".planes"))
    save_tensors(file, {key: tensor for key, tensor in tensors.items() if key != name})
    assert main(again) == 2 and f"{name} is missing" in capsys.readouterr().err
    save_tensors(file, {key: tensor * torch.nan if tensor.is_floating_point() else tensor for key, tensor in tensors.items()})
    assert main(again) == 2 and "decoder layer 1 gave NaN or infinity" in capsys.readouterr().err


def test_a_file_of_two_checkpoints_stays_with_the_one_that_stays(tmp_path):
    "A plain checkpoint and masks in one folder, with the same card: masks that are written anew without one leave it."

    def write(first: str, *others: str):
        with whole_checkpoint(tmp_path / "both") as place:
            place.mkdir(exist_ok=True)
            (place / first).write_text("{}")
            for name in others:
                (place / name).write_text("a card")

    write("config.json", "README.md")
    write("merger_config.json", "README.md")
    write("merger_config.json")
    assert (tmp_path / "both" / "README.md").read_text() == "a card"
    write("config.json")
    assert not (tmp_path / "both" / "README.md").exists()
