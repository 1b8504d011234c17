"""Two processes train what one does; sharded ones hold half of the frozen weights. Started as two machines would, on loopback."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from merge_lab.memory import estimate_memory
from merge_lab.tinylm import tiny_config

import forks
from servers import free_port

WORKER = Path(__file__).with_name("distributed_worker.py")


def agent(folder: Path, port: int) -> list[str]:
    "A torchrun agent, one of two that meet at the port."
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=merge",
        "--max-restarts=0",
        str(WORKER),
        str(folder),
    ]


def finish(processes: list[subprocess.Popen]):
    "Wait for all; end all if one fails."
    try:
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "This process, then two agents of one process each: {1: (facts, tensors, folder), 2: ...}."
    folder = tmp_path_factory.mktemp("distributed")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    options = dict(
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(WORKER), str(folder)])
        runpy.run_path(str(WORKER))
    command = agent(folder, free_port())
    finish([forks.Popen(command, **options) for _ in range(2)])
    return {
        n: (
            json.loads((folder / f"facts-{n}.json").read_text()),
            torch.load(folder / f"tensors-{n}.pt", weights_only=True),
            folder,
        )
        for n in (1, 2)
    }


def test_two_processes_train_the_same_masks(runs):
    assert runs[1][0]["trainer_wrapper"] == "none"
    assert runs[2][0]["trainer_wrapper"] == "DDP"
    one, two = runs[1][1]["masks"], runs[2][1]["masks"]
    assert one.keys() == two.keys()
    assert (
        max((mask - mask.mean()).abs().max() for mask in one.values()) > 1e-2
    )  # they moved
    for name in one:
        assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)


def test_two_ranks_hold_half_of_the_frozen_weights(runs):
    facts = runs[2][0]
    assert facts["wrapper"] == "FSDP2"
    assert facts["bytes"] <= 0.55 * facts["bytes_whole"]


def test_the_estimate_knows_what_a_sharded_run_gathers(runs):
    "Two layers beside embedding and head; where these are large, they themselves while they are copied."

    def parts(ranks, **shape):
        options = dict(seq_len=4, batch_size=1, dtype="float32", device="cpu")
        return estimate_memory(
            tiny_config("llama", **shape), ranks=ranks, **options
        ).parts

    one, two = (parts(ranks, num_hidden_layers=6) for ranks in (1, 2))
    masks = 0.05 * one["components"]  # are gathered, too
    deep = two["transients"] - one["transients"]
    assert 0 <= runs[2][0]["gathered"]["deep"] - deep <= masks
    assert two["components"] == one["components"] / 2
    assert two["masks"] == one["masks"] / 2 == parts(8, num_hidden_layers=6)["masks"]
    wide = dict(num_hidden_layers=3, vocab_size=4096)
    layer = parts(1, num_hidden_layers=7)["components"] - one["components"]
    starting = parts(2, **wide)
    assert starting["activations"] == 0  # nothing has run yet
    found = runs[2][0]["gathered"]["wide"]
    assert abs(found - starting["transients"]) <= layer + masks


def test_sharded_gradients_are_those_of_one_process(runs):
    one, two = runs[1][1]["gradients"], runs[2][1]["gradients"]
    assert any(gradient.abs().max() > 1e-4 for gradient in one.values())
    for name in one:
        assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)


def test_a_sharded_run_saves_resumes_and_exports(runs):
    from safetensors.torch import load_file

    assert runs[2][0]["resumed"]
    folder = runs[2][2]
    for kind, file in (("saved", "masks.safetensors"), ("merged", "model.safetensors")):
        one, two = (load_file(folder / f"{kind}-{n}" / file) for n in (1, 2))
        assert one.keys() == two.keys()
        for name in one:
            assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)


def test_a_notebook_launches_two_processes(tmp_path, forked):
    from safetensors.torch import load_file

    worker = Path(__file__).with_name("launcher_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        load_file(tmp_path / f"masks-{n}" / "masks.safetensors") for n in (1, 2)
    )
    for name in one:
        assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)


PROGRAM = Path(sys.executable).with_name("merge-lab")


def launch(*words: str, program=PROGRAM, **environment) -> subprocess.CompletedProcess:
    "merge-lab, or another program, in two processes."
    engine = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *engine, f"--master-port={free_port()}", str(program), *words],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def small(folder, **options):
    from merge_lab.run_folder import bundled_path
    from merge_lab.systems.mask_merge import demo_config

    tasks = ("rewrite", "summarize")
    data = {str(bundled_path(f"tasks/{task}")): 48 for task in tasks}
    return demo_config(output_dir=str(folder), **dict(dataset_configs=data, eval_samples=2) | options)


def saved(folder, name="masks/masks.safetensors"):
    from safetensors.torch import load_file

    return load_file(folder / name)


def test_the_command_trains_sharded_as_in_one_process(tmp_path, forked):
    from merge_lab.config import config_to_yaml
    from merge_lab.systems.mask_merge import run
    from merge_lab.run_folder import read_history

    config = small(
        tmp_path / "two",
        max_steps=3,
        per_device_train_batch_size=4,
        optim="sgd",  # as above
        learning_rate=1.0,
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    done = launch("mask-merge", str(file), "--shard")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Written:") == 1  # the other process keeps quiet
    config.output_dir, config.per_device_train_batch_size = str(tmp_path / "one"), 8
    config.report = False
    run(config, progress=False)
    for name in ("masks/masks.safetensors", "merged/model.safetensors"):
        one, two = (saved(tmp_path / n, name) for n in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)
    one, two = (read_history(tmp_path / n / "history.jsonl") for n in ("one", "two"))
    assert two.loss.to_list() == pytest.approx(one.loss.to_list(), rel=1e-5)
    assert one.loss.iloc[-1] < one.loss.iloc[0]
    assert (tmp_path / "two" / "report.html").exists()
    assert len(list((tmp_path / "two" / "plots").glob("*.png"))) == 7


def test_two_processes_learn_from_what_the_blend_writes_as_one_does(tmp_path, forked):
    "Greedy answers, so that both ways write the same; each process writes and scores its own rows'."
    from merge_lab.config import config_to_yaml
    from merge_lab.run_folder import read_history
    from merge_lab.systems.mask_merge import run

    options = dict(on_policy=1.0, answer_temperature=0.0, rollout_steps=1, answer_tokens=8, loss_func_name="reverse_kl", eval_samples=0, save_merged=False, report=False)
    options |= dict(max_steps=3, optim="sgd", learning_rate=1.0, residual_rank=2)  # SGD as above
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(small(tmp_path / "two", per_device_train_batch_size=4, **options)), encoding="utf-8")
    done = launch("mask-merge", str(file))
    assert done.returncode == 0, done.stderr[-4000:]
    run(small(tmp_path / "one", per_device_train_batch_size=8, **options), progress=False)
    one, two = (saved(tmp_path / n, "masks/masks.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and any(name.endswith(".left") and mask.any() for name, mask in one.items())
    for name in one:
        assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
    one, two = (read_history(tmp_path / n / "history.jsonl") for n in ("one", "two"))
    assert two.loss.to_list() == pytest.approx(one.loss.to_list(), rel=1e-4)
    assert two.rollout_tokens.notna().all() and two.rollout_tokens.equals(one.rollout_tokens)
    assert two.rollout_nats.dropna().to_list() == pytest.approx(one.rollout_nats.dropna().to_list(), rel=1e-4)


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(tmp_path, forked):
    "One sample a process, so that often a process has none of a source; Adam's state is divided as well."
    from merge_lab.config import config_to_yaml
    from merge_lab.systems.mask_merge import prepare

    options = dict(
        max_steps=4, per_device_train_batch_size=1, save_merged=False, report=False
    )
    options |= dict(base_model=None, eval_samples=0)
    files = {}
    for name in ("whole", "cut"):
        config = small(
            tmp_path / name, shard=True, lr_scheduler_type="constant", **options
        )
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(config_to_yaml(config), encoding="utf-8")
    stopped = tmp_path / "stopped.py"
    stopped.write_text(SIGNAL_TO_ONE, encoding="utf-8")
    cut = launch("mask-merge", str(files["cut"]), program=stopped)
    assert cut.returncode != 0 and "stopped after step 2 of 4" in cut.stderr, (
        cut.stderr[-4000:]
    )
    assert cut.stderr.count("stopped after step") == 1
    with pytest.raises(ValueError, match="written by 2 processes, and there are 1"):
        prepare(
            small(
                tmp_path / "cut", resume=True, lr_scheduler_type="constant", **options
            )
        )
    both = tmp_path / "both.py"
    both.write_text(RESUMED_AND_WHOLE, encoding="utf-8")
    on = launch(str(files["cut"]), str(files["whole"]), program=both)
    assert on.returncode == 0, on.stderr[-4000:]
    one, two = (saved(tmp_path / name) for name in ("whole", "cut"))
    for name in one:
        assert torch.equal(one[name], two[name]), name


RESUMED_AND_WHOLE = """
import sys
from merge_lab.cli import main

cut, whole = sys.argv[1:]
sys.exit(main(["mask-merge", cut, "--resume"]) or main(["mask-merge", whole]))
"""


SIGNAL_TO_ONE = """
import os, signal, sys
from merge_lab import training
from merge_lab.cli import main

before = training.StopCallback.on_step_begin

def begin(self, args, state, control, **kwargs):
    "The second process gets SIGTERM while the second step runs."
    if os.environ["RANK"] == "1" and state.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return before(self, args, state, control, **kwargs)

training.StopCallback.on_step_begin = begin
sys.exit(main())
"""


def test_sharding_is_refused_where_it_cannot_be(tmp_path):
    from merge_lab.systems.mask_merge import prepare

    with pytest.raises(ValueError, match="torchrun"):
        prepare(small(tmp_path / "run", shard=True))
    for option in ("offload", "keep_merged", "torch_compile"):
        with pytest.raises(ValueError, match="do not go together"):
            small(tmp_path / "run", shard=True, **{option: True})
    with pytest.raises(ValueError, match="do not go together"):
        small(tmp_path / "run", shard=True, mask_decay=1.0)
    with pytest.raises(ValueError, match="optim='adafactor'"):
        small(tmp_path / "run", shard=True, optim="adafactor")
