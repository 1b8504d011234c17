"""The LoRA pipeline across architectures, processes and settings."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys

import datasets
import pandas as pd
import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from merge_lab import adapters
from merge_lab.adapters import (
    cpu_likes_bf16, device_settings, find_target_modules, fixed_loss, grow_rank, load_adapter, load_base, make_lora_config, merge_adapter,
    presets, probe_logits, quiet_peft,
)
from merge_lab.chat import ChatCollator
from merge_lab.diagnosis import LiveCurves, training_curves, training_diagnostics
from merge_lab.run_folder import begin_run, bundled_path, RunInterrupted
from merge_lab.sft_data import bytes_of_token, encode_rows, longest_row, prepare_dataset, task_names
from merge_lab.systems.lora import LoRAPipelineConfig, make_lora, run, show_result, SmoLoRA, train_with_ranks, use_curriculum
from merge_lab.tinylm import save_tiny, tiny_model, tiny_tokenizer
from small_runs import SignalAt

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
]
TEXTS = ["the cat saw a big red bird.", "the dog ran home fast."] * 4
CHAT = [
    {
        "messages": [
            {"role": "user", "content": "who ran home?"},
            {"role": "assistant", "content": "the dog."},
        ]
    }
] * 8


pytestmark = pytest.mark.usefixtures("nothing_deprecated")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def base(in_empty_folder):
    return str(save_tiny(tiny_model(), "base"))


def quick(base, rows=None, **options):
    "A pipeline that trains in a second."
    sft = dict(
        max_steps=4,
        learning_rate=1e-2,
        gradient_accumulation_steps=1,
        logging_steps=1,
        disable_tqdm=True,
    )
    sft |= options.pop("sft", {})
    lora = dict(lora_dropout=0.0) | options.pop("lora", {})
    rows = datasets.Dataset.from_dict({"text": TEXTS}) if rows is None else rows
    return SmoLoRA(base, rows, lora=lora, sft=sft, device="cpu", **options)


def adapted(architecture, seed=0, **options):
    "A peft model whose adapters do something."
    torch.manual_seed(seed)
    base = tiny_model(architecture)
    with quiet_peft():
        model = get_peft_model(base, make_lora_config(base, options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("preset", presets)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_presets_wrap_every_architecture_and_merge_exactly(architecture, preset):
    save_tiny(tiny_model(architecture), "base")
    model = adapted(architecture, target_modules=preset)
    model.save_pretrained("adapter")
    plain = probe_logits(load_base("base", "cpu"))
    merged, report = merge_adapter(load_base("base", "cpu"), "adapter", "merged")
    assert report["max_logit_difference"] < 1e-4
    assert (probe_logits(merged) - plain).abs().max() > 1e-2
    again = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert (probe_logits(again) - probe_logits(model)).abs().max() < 1e-4
    assert again.config.use_cache and not hasattr(again, "peft_config")


def test_presets_grow():
    counts = {p: len(find_target_modules(tiny_model(), p)) for p in presets}
    assert counts == {"conservative": 2, "balanced": 3, "aggressive": 7}
    assert find_target_modules(tiny_model("gpt2"), "balanced") == ["c_attn"]


def test_save_and_inference_in_a_later_process(base, forked):
    "Of an adapter that was trained on text, and of one that was trained on conversations."
    wanted = {}
    for layout, column in (
        ("text", TEXTS),
        ("messages", [c["messages"] for c in CHAT]),
    ):
        rows, chat = datasets.Dataset.from_dict({layout: column}), layout == "messages"
        lora = quick(
            base, rows, output_dir=layout, lora=dict(target_modules="aggressive")
        )
        lora.train()
        wanted[layout] = (
            f"{chat} {lora.inference('the cat', max_new_tokens=6, chat=chat)}"
        )
        assert wanted[layout] == f"{chat} {lora.inference('the cat', max_new_tokens=6)}"
    script = (
        "from merge_lab.systems import lora as pipeline\n"
        "from merge_lab.systems.lora import SmoLoRA, complete\n"
        "def told(*given, chat, **options):\n"
        "    return f'{chat} {complete(*given, chat=chat, **options)}'\n"
        "pipeline.complete = told\n"
        "for run in ('text', 'messages'):\n"
        "    lora = SmoLoRA('base', output_dir=run, device='cpu')\n"
        "    print(lora.save()['max_logit_difference'])\n"
        "    print(SmoLoRA('base', output_dir=run, device='cpu').inference('the cat', max_new_tokens=6))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    differences, said = done.stdout.splitlines()[-4::2], done.stdout.splitlines()[-3::2]
    assert max(map(float, differences)) < 1e-4 and said == list(wanted.values())


def test_training_touches_adapters_only(base):
    lora = quick(base, output_dir="run")
    before = load_base(base, "cpu").state_dict()
    curves = lora.train()
    assert curves.loss.iloc[-1] < curves.loss.iloc[0]
    state = lora.model.get_base_model().state_dict()
    for name, tensor in before.items():
        held = state.get(name, state.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(held, tensor), name
    trained = [n for n, p in lora.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_the_prompt_is_not_learned(base):
    rows = encode_rows(datasets.Dataset.from_list(CHAT), tiny_tokenizer())
    learned = [i for i, l in zip(rows[0]["input_ids"], rows[0]["labels"]) if l != -100]
    words = tiny_tokenizer().convert_ids_to_tokens(learned)
    assert words == ["the", "dog", ".", "<eos>"]
    lora = quick(base, datasets.Dataset.from_list(CHAT), output_dir="run")
    lora.train()
    batch = next(iter(lora.trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum() == len(learned) * len(batch["labels"])


def test_settings_given_late_take_effect_or_raise(base):
    lora = quick(base, output_dir="run")
    lora.peft_config.r = 3
    lora.sft_config.max_steps = 2
    lora.sft_config.gradient_checkpointing = True
    curves = lora.train()
    assert len(curves) == 2 and lora.model.peft_config["default"].r == 3
    assert lora.trainer.args.activation_checkpointing
    lora.peft_config.r = 5
    with pytest.raises(ValueError, match="r=5: the adapter was trained with 3"):
        lora.train()
    lora.peft_config.r = 3
    lora.sft_config.max_step = 9
    with pytest.raises(AttributeError, match="Did you mean 'max_steps'"):
        lora.train()


@pytest.mark.parametrize(
    "name, value, was",
    [
        ("output_dir", "elsewhere", "run"),
        ("output_dir", pathlib.Path("elsewhere"), "run"),
        ("device", "cuda:9", "cpu"),
        ("base_model_name", "nope", "base"),
    ],
)
def test_base_folder_and_device_are_fixed(base, name, value, was):
    lora = quick(base, output_dir="run")
    says = f"{name}='{value}': it was fixed as '{was}'. Make a new SmoLoRA"
    with pytest.raises(AttributeError, match=says):
        setattr(lora, name, value)
    assert str(getattr(lora, name)) == was


def test_presets_given_late_are_resolved(base):
    lora = quick(base, output_dir="run", sft=dict(max_steps=1))
    lora.peft_config.target_modules = "aggressive"
    lora.train()
    wanted = set(find_target_modules(tiny_model(), "aggressive"))
    assert lora.model.peft_config["default"].target_modules == wanted
    lora = quick(base, output_dir="other", sft=dict(max_steps=1))
    for wrong, says in (("all", "no preset"), (["query"], "target_modules='query'")):
        lora.peft_config.target_modules = wrong
        with pytest.raises(ValueError, match=says):
            lora.train()


def test_rows_given_late_are_learned_and_validated(base):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    lora = SmoLoRA(base, output_dir="run", device="cpu", sft=dict(max_steps=2))
    with pytest.raises(TypeError, match="dataset='rows.jsonl': expected rows"):
        lora.dataset = "rows.jsonl"
    lora.dataset = lora.eval_dataset = rows
    lora.sft_config.logging_steps, lora.sft_config.disable_tqdm = 1, True
    assert lora.train().eval_loss.notna().all()


def test_training_again_goes_on(base):
    lora = quick(base, output_dir="run")
    first = lora.train()
    both = lora.train()
    assert list(both.index) == list(range(1, 9))
    assert both.loss.iloc[-1] < first.loss.iloc[-1]


def same(model, other):
    return torch.equal(probe_logits(model.eval()), probe_logits(other.eval()))


@pytest.mark.parametrize("between", ["save", "adapter", "inference"])
def test_training_goes_on_after_merging_and_loading(base, between):
    "The adapter that was trained is the one that is trained further, wherever it was in between."
    lora, whole = (quick(base, output_dir=folder) for folder in ("run", "whole"))
    for each in (lora, whole):
        each.train()
    if between == "save":
        lora.save()
    elif between == "adapter":
        lora.load_model(lora.adapter_dir)
        assert not lora.model.training and same(lora.model, whole.model)
    else:
        lora.save()
        lora = quick(base, output_dir="run")  # as in a later process
        lora.inference("the cat", max_new_tokens=1)
    both, wanted = lora.train(), whole.train()
    assert both.loss.iloc[-4:].tolist() == wanted.loss.iloc[-4:].tolist()
    assert both.index[-1] == (4 if between == "inference" else 8)
    assert same(lora.model, whole.model)
    assert same(
        load_adapter(load_base(base, "cpu"), "run/adapter_checkpoint"), whole.model
    )


def test_a_merged_model_without_its_adapter_is_not_trained(base):
    save_tiny(tiny_model(seed=3), "merged")
    lora = quick(base, output_dir="run")
    lora.load_model("merged")
    with pytest.raises(
        FileNotFoundError, match="adapter_checkpoint has no adapter_config"
    ):
        lora.train()
    assert not pathlib.Path("run/adapter_checkpoint").exists()


class StopOnce(TrainerCallback):
    "Stops the first training after two steps, with a checkpoint."

    stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.stopped:
            self.stopped = control.should_training_stop = control.should_save = True


def test_what_was_stopped_goes_on_in_the_same_process(base):
    live = LiveCurves(lambda figure: None)
    lora = quick(base, output_dir="run", callbacks=[StopOnce(), live])
    assert list(lora.train().index) == [1, 2]
    assert list(lora.train(resume=True).index) == [1, 2, 3, 4]
    lines = pathlib.Path("run/history.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert steps == [1, 2, 3, 4] == [row["step"] for row in live.log if "loss" in row]
    whole = quick(base, output_dir="whole")
    assert (
        whole.train().loss.tolist() == training_curves(lora.log_history).loss.tolist()
    )


def test_validation_loss_is_logged_and_callbacks_are_called(base):
    class Counter(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            Counter.steps += 1

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    lora = quick(base, rows, output_dir="run", eval_dataset=rows, callbacks=[Counter()])
    assert lora.train()["eval_loss"].notna().sum() == 4 and Counter.steps == 4
    assert training_diagnostics(lora.log_history).ok.all()


def test_diagnostics_of_a_run_reach_memory_and_pace(base, monkeypatch):
    found = run(quick_config(), disable_tqdm=True)["diagnostics"]
    assert found.ok.all() and " free" in found.seen["memory"]
    assert "s a step" in found.seen["slow training"]
    monkeypatch.setattr("merge_lab.diagnosis.free_memory", lambda: 2**20)
    full = run(quick_config(output_dir="full"), disable_tqdm=True)
    failed = full["diagnostics"][~full["diagnostics"].ok]
    assert list(failed.index) == ["memory"]
    assert "at least 1.00 MiB free" in failed.seen["memory"]
    assert failed.advice["memory"].startswith("Reduce the batch size")
    short = training_diagnostics(full["lora"].log_history, max_steps=4, hours=1e-9)
    assert "more workers" in short.advice["slow training"]


class Cache(TrainerCallback):
    "Keeps what the config says of the cache at every step."

    def __init__(self):
        self.said = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.said.append(model.config.use_cache)


def test_the_cache_stays_as_the_model_had_it(base):
    "While it trains, too: nothing is switched off that would have to be switched on again."
    for use_cache in (True, False):
        model = tiny_model()
        model.config.use_cache = use_cache
        save_tiny(model, "cached")
        told = Cache()
        lora = quick("cached", output_dir=f"run-{use_cache}", sft=dict(max_steps=1), callbacks=[told])
        lora.train()
        assert told.said == [use_cache]
        assert lora.model.config.use_cache is use_cache
        lora.save()
        merged = AutoModelForCausalLM.from_pretrained(lora.merged_dir)
        assert merged.config.use_cache is use_cache


def test_tensorboard_gets_the_losses(base):
    from tensorboard.backend.event_processing import event_accumulator

    run(quick_config(report_to="tensorboard"), disable_tqdm=True)
    (events,) = pathlib.Path("run").rglob("events.out.tfevents.*")
    read = event_accumulator.EventAccumulator(str(events)).Reload()
    wanted = pd.read_json("run/history.jsonl", lines=True).loss.dropna().tolist()
    assert [s.value for s in read.Scalars("train/loss")] == pytest.approx(wanted)
    with pytest.raises(ValueError, match="report_to='clearml'.*pip install clearml"):
        run(quick_config(output_dir="other", report_to="clearml"))


def test_checkpoints_resume_to_the_same_adapter(base):
    options = dict(sft=dict(max_steps=6, save_strategy="steps", save_steps=3))
    whole = quick(base, output_dir="whole", **options)
    whole.train()
    resumed = quick(base, output_dir="whole", **options)
    for path in (resumed.output_dir / "checkpoint-6").iterdir():
        path.unlink()
    (resumed.output_dir / "checkpoint-6").rmdir()
    resumed.train(resume=True)
    assert torch.equal(
        probe_logits(resumed.model.eval()), probe_logits(whole.model.eval())
    )


def test_a_line_that_a_kill_cut_off_does_not_stop_a_resumed_run(base):
    options = dict(sft=dict(max_steps=4, save_strategy="steps", save_steps=2))
    quick(base, output_dir="run", **options).train()
    shutil.rmtree("run/checkpoint-4")
    history = pathlib.Path("run/history.jsonl")
    history.write_text("".join(history.open().readlines()[:3]) + '{"loss": 1.5, "st')
    quick(base, output_dir="run", **options).train(resume=True)
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_grown_rank_keeps_the_function_and_learns(architecture, rslora):
    save_tiny(tiny_model(architecture), "base")
    model = adapted(
        architecture, r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=rslora
    )
    before = probe_logits(model)
    for rank in (8, 16):
        grow_rank(model, rank)
        assert (probe_logits(model) - before).abs().max() < 1e-4
    model.save_pretrained("grown")
    again = load_adapter(load_base("base", "cpu"), "grown", trainable=True)
    assert (probe_logits(again) - before).abs().max() < 1e-4
    again(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    ups = [p.grad for n, p in again.named_parameters() if "lora_B" in n]
    assert all(grad[:, 4:].abs().max() > 0 for grad in ups)


def test_stages_of_a_rank_stabilised_adapter_join_without_a_jump(base):
    adapter = dict(r=8, lora_alpha=16, use_rslora=True)
    lora = quick(base, output_dir="run", lora=adapter)
    stages = train_with_ranks(lora, [2, 4])
    assert abs(stages.loss_first[4] - stages.loss_last[2]) < 1e-4
    config = lora.model.peft_config["default"]
    assert config.lora_alpha / config.r**0.5 == pytest.approx(16 / 8**0.5)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_with_biases_of_its_own_does_not_grow():
    model = adapted("llama", r=2, lora_bias=True)
    with pytest.raises(
        ValueError, match="lora_bias=True: the adapter is more than B A"
    ):
        grow_rank(model, 4)


def test_curriculum_changes_what_is_read_first(base):
    rows = datasets.Dataset.from_dict({"text": ["the " * n for n in (9, 3, 7, 1, 5)]})
    lora = quick(base, rows, output_dir="run")
    use_curriculum(lora)
    lora.train()
    lengths = [
        b["attention_mask"].sum().item() for b in lora.trainer.get_train_dataloader()
    ]
    assert lengths == sorted(lengths) and len(set(lengths)) == 5


def test_pickled_adapters_are_refused(base):
    adapted("llama").save_pretrained("adapter")
    torch.save({}, "adapter/adapter_model.bin")
    pathlib.Path("adapter/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_adapter(load_base(base, "cpu"), "adapter")


def test_folders_of_splits_and_samples():
    folder = pathlib.Path("task")
    folder.mkdir()
    for split, n in (("train", 8), ("validation", 2)):
        lines = "".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(n))
        (folder / f"{split}.jsonl").write_text(lines)
    assert len(prepare_dataset("task")) == 8
    assert prepare_dataset("task", split="validation")["text"] == [
        "validation 0",
        "validation 1",
    ]
    sample = prepare_dataset("task", n=3, seed=1)["text"]
    assert (
        len(set(sample)) == 3 and sample == prepare_dataset("task", n=3, seed=1)["text"]
    )
    with pytest.raises(ValueError, match="n=9: expected 1 to 8"):
        prepare_dataset("task", n=9)


def test_a_conversation_without_an_answer_is_refused_where_it_is_read():
    asked = {"messages": CHAT[0]["messages"][:1]}
    lines = [json.dumps(row) + "\n" for row in (CHAT[0], asked)]
    pathlib.Path("rows.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="rows.jsonl:2: no assistant turn"):
        prepare_dataset("rows.jsonl")


def quick_config(**options):
    "A run of a few steps."
    pathlib.Path("rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    )
    few = dict(max_steps=4, gradient_accumulation_steps=1, logging_steps=1)
    few |= dict(base_model="base", datasets=["rows.jsonl"], device="cpu")
    return LoRAPipelineConfig(**few | {"output_dir": "run"} | options)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(datasets=["nowhere"]), "no such file or folder here"),
        (dict(max_length=8, datasets=["long.jsonl"]), "long.jsonl:.*no assistant token is left"),
        (dict(base_model="config_only"), "holds no weights"),
        (dict(datasets=["run/kept.jsonl"]), "overwrite would clear run"),
        (dict(chat_template="run/kept.jsonl"), "overwrite would clear run"),
        (dict(n_samples=99), "n=99: expected 1 to 8"),
    ],
)
def test_what_cannot_run_clears_nothing(base, options, says):
    folder = begin_run(quick_config())
    (folder / "kept.jsonl").write_text('{"text": "kept"}\n')
    long = {"messages": [{"role": "user", "content": "the cat " * 9}]}
    long["messages"].append({"role": "assistant", "content": "a dog."})
    pathlib.Path("long.jsonl").write_text(json.dumps(long) + "\n")
    save_tiny(tiny_model(), "config_only", tiny_tokenizer())
    pathlib.Path("config_only/model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=says):
        run(quick_config(overwrite=True, **options), disable_tqdm=True)
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "kept.jsonl"}


def test_an_interrupted_run_goes_on_to_the_same_adapter(base):
    before = signal.getsignal(
        signal.SIGINT
    )  # ignored where the tests run in the background
    with pytest.raises(RunInterrupted, match="stopped after step 2 of 4"):
        run(quick_config(), [SignalAt(1)], disable_tqdm=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert pathlib.Path("run/adapter_checkpoint/adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="seed=9, but the run in run was begun"):
        run(quick_config(resume=True, seed=9), disable_tqdm=True)
    resumed = run(quick_config(resume=True), disable_tqdm=True)
    whole = run(quick_config(output_dir="whole"), disable_tqdm=True)
    assert resumed["curves"].loss.tolist() == whole["curves"].loss.tolist()
    models = [found["lora"].model.eval() for found in (resumed, whole)]
    assert torch.equal(*map(probe_logits, models))
    lines = pathlib.Path("run/history.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3, 4]


def test_an_interrupted_run_of_growing_ranks_stops(base):
    with pytest.raises(RunInterrupted, match="Growing ranks start anew"):
        run(quick_config(ranks=[2, 4]), [SignalAt(1)], disable_tqdm=True)
    assert not pathlib.Path("run/checkpoint_r4").exists()


def test_resuming_needs_a_checkpoint(base):
    run(quick_config(save_steps=0), disable_tqdm=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint to go on from"):
        run(quick_config(resume=True))
    with pytest.raises(ValueError, match="resume=True with ranks"):
        LoRAPipelineConfig(resume=True, ranks=[4, 8])


def test_validation_needs_no_further_options(base):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    lora = SmoLoRA(base, rows, eval_dataset=rows, device="cpu")
    assert lora.sft_config.eval_strategy == "steps" and lora.sft_config.eval_steps == 10


def test_weights_have_the_precision_that_was_asked_for(base):
    lora = quick(base, output_dir="run", sft=dict(bf16=True, max_steps=1))
    lora.train()
    kept = {p.dtype for p in lora.model.parameters() if not p.requires_grad}
    assert kept == {torch.bfloat16}
    plain = quick(base, output_dir="run", sft=dict(max_steps=1))
    plain.train()
    assert {p.dtype for p in plain.model.parameters()} == {torch.float32}


def test_an_adapter_of_another_base_is_refused(base):
    adapted("llama").save_pretrained("adapter")
    save_tiny(tiny_model(hidden_size=64), "wide")
    save_tiny(tiny_model(num_hidden_layers=1), "short")
    for other, says in (("wide", "of size"), ("short", "which it lacks")):
        with pytest.raises(ValueError, match=f"another base than {other}.*{says}"):
            load_adapter(load_base(other, "cpu"), "adapter")


def test_prefixes_are_spelt_as_the_tokenizer_knows_them():
    tokenizer = tiny_tokenizer()
    assert task_names(["x/dog", "x/bird.jsonl"], tokenizer) == ["dog", "bird"]
    with pytest.raises(ValueError, match="the same to the tokenizer"):
        task_names(["x/zzz", "x/qqq"], tokenizer)


def test_growing_ranks_are_checked_early():
    with pytest.raises(ValueError, match="expected rising ranks"):
        LoRAPipelineConfig(ranks=[8, 4])
    with pytest.raises(ValueError, match="expected a step for each rank"):
        LoRAPipelineConfig(ranks=[4, 8], max_steps=1)


def test_curves_of_a_log():
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "eval_loss": 3.0},
        {"step": 2, "loss": 1.0},
    ]
    curves = training_curves(log + [{"step": 2, "train_runtime": 1.0}])
    assert curves.loss.tolist() == [2.0, 1.0] and curves.eval_loss.iloc[0] == 3.0


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_likes_bf16_trains_large_bf16_bases_in_it(base, monkeypatch, fast):
    monkeypatch.setattr(adapters, "cpu_likes_bf16", lambda: fast)
    save_tiny(tiny_model().to(torch.bfloat16), "half")
    assert not device_settings("cpu", "half")["bf16"]  # too small to gain anything
    monkeypatch.setattr(adapters, "SMALL", 1000)
    assert device_settings("cpu", "half")["bf16"] == fast
    assert not device_settings("cpu", base)["bf16"]  # stored in fp32
    assert not device_settings("cpu")["bf16"]
    lora = make_lora(quick_config(base_model="half"))
    assert lora.sft_config.bf16 == fast
    assert lora.dtype == (torch.bfloat16 if fast else torch.float32)
    assert not make_lora(
        quick_config(base_model="half", precision="fp32")
    ).sft_config.bf16


def test_a_torch_that_does_not_tell_means_fp32(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert cpu_likes_bf16() is False
    monkeypatch.setattr(
        torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False
    )
    assert cpu_likes_bf16() is True


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bf16_weights_are_merged_in_fp32_and_rounded_once(architecture):
    save_tiny(tiny_model(architecture).to(torch.bfloat16), "base")
    adapted(architecture, target_modules="aggressive").save_pretrained("adapter")
    exact = load_adapter(load_base("base", "cpu", torch.float32), "adapter")
    exact = exact.merge_and_unload().state_dict()
    half = load_base("base", "cpu", torch.bfloat16)
    buffers = {name: b.clone() for name, b in half.named_buffers()}
    merged, report = merge_adapter(half, "adapter", "merged")
    assert report["dtype"] == "bfloat16" and "verdict" not in report
    again = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    for model in (merged, again):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    for name, buffer in merged.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(
            buffer, buffers[name]
        )


def test_merging_is_judged_by_the_loss_on_some_rows(base, monkeypatch, caplog):
    rows = datasets.Dataset.from_list(CHAT * 3)
    adapted("llama", target_modules="aggressive").save_pretrained("adapter")
    with caplog.at_level("INFO", "merge_lab"):
        merged, report = merge_adapter(
            load_base(base, "cpu"), "adapter", "merged", tiny_tokenizer(), rows
        )
    assert report["loss_merged"] == pytest.approx(report["loss_adapter"], abs=1e-4)
    wanted = fixed_loss(merged, tiny_tokenizer(), rows, n=16)
    assert report["loss_merged"] == pytest.approx(wanted) and report["loss_rows"] == 16
    assert report["fine"] and report["verdict"] in caplog.text
    assert report["verdict"].endswith("nats per answer token: fine")

    merge = adapters.merge_layers

    def badly(model):
        merged = merge(model)
        with torch.no_grad():
            merged.lm_head.weight.mul_(0.5)
        return merged

    monkeypatch.setattr(adapters, "merge_layers", badly)
    caplog.clear()
    _, report = merge_adapter(
        load_base(base, "cpu"), "adapter", "merged", tiny_tokenizer(), rows
    )
    assert not report["fine"] and "more than 2 %" in report["verdict"]
    assert [r.levelname for r in caplog.records if r.levelname == "WARNING"]


def test_the_loss_of_rows_does_not_depend_on_how_many_are_read_at_once():
    model, rows = tiny_model().eval(), datasets.Dataset.from_dict({"text": TEXTS[:6]})
    batch = ChatCollator(tiny_tokenizer())(list(encode_rows(rows, tiny_tokenizer())))
    names = ("input_ids", "attention_mask", "labels")
    whole = model(**{name: batch[name] for name in names}).loss.item()
    assert fixed_loss(model, tiny_tokenizer(), rows) == pytest.approx(whole, abs=1e-5)


def test_rows_longer_than_the_model_are_asked_as_far_as_it_goes():
    model = tiny_model("gpt2")
    most = model.config.max_position_embeddings
    short, long = (
        datasets.Dataset.from_dict({"text": ["the cat ran home. " * n]})
        for n in (most // 5, most)
    )
    assert len(encode_rows(long, tiny_tokenizer(), None)[0]["input_ids"]) > most
    found = fixed_loss(model, tiny_tokenizer(), long, max_length=None)
    cut = fixed_loss(model, tiny_tokenizer(), long, max_length=most)
    assert found == cut != fixed_loss(model, tiny_tokenizer(), short)


def task_folder(name="pets", validation=5):
    "A folder of splits, as a task has."
    pathlib.Path(name).mkdir()
    for split, n in (("train", 8), ("validation", validation)):
        lines = (json.dumps(CHAT[0]) + "\n") * n
        if n:
            pathlib.Path(name, f"{split}.jsonl").write_text(lines)
    return name


def test_the_validation_split_of_a_task_is_used(base):
    task_folder()
    config = quick_config(datasets=["pets"], max_steps=40, batch_size=4)
    found = run(config, disable_tqdm=True)
    looks = found["curves"].eval_loss.dropna()
    assert 5 <= len(looks) <= 8 and looks.index[-1] == 40
    assert len(found["lora"].eval_dataset) == 5
    assert found["report"]["loss_rows"] == 5
    without = quick_config(
        datasets=["pets"], eval_dataset="none", output_dir="without", max_steps=20
    )
    assert "eval_loss" not in run(without, disable_tqdm=True)["curves"]


def test_a_task_without_a_validation_split_is_not_validated(base):
    task_folder(validation=0)
    lora = make_lora(quick_config(datasets=["pets"]))
    assert lora.eval_dataset is None and lora.sft_config.eval_strategy == "no"
    given = make_lora(quick_config(datasets=["pets"], eval_dataset="rows.jsonl"))
    assert len(given.eval_dataset) == 8


def test_validation_takes_a_tenth_of_a_run_at_most():
    for steps in (60, 150, 1000):
        config = LoRAPipelineConfig(max_steps=steps, output_dir="bundled")
        lora = make_lora(config)  # the bundled task
        rows, every = len(lora.eval_dataset), lora.sft_config.eval_steps
        assert rows <= 64 and 5 <= steps / every <= 8
        assert rows * steps / every <= 0.1 * 3 * 8 * steps
    given = bundled_path("tasks/rewrite/train.jsonl")
    many = make_lora(
        LoRAPipelineConfig(max_steps=50, eval_dataset=str(given), output_dir="bundled")
    )
    assert many.sft_config.eval_steps == 50  # once, at the end


def test_several_tasks_are_validated_with_their_prefixes(base):
    for name in ("dog", "bird"):
        task_folder(name)
    config = quick_config(datasets=["dog", "bird"], task_prefixes=True, max_steps=40)
    rows = make_lora(config).eval_dataset["messages"]
    said = {row[0]["content"].split("]")[0] for row in rows}
    assert said == {"[TASK:dog", "[TASK:bird"}


def test_validation_does_not_change_what_is_trained(base):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    models = []
    for folder, held_out in (("with", rows), ("without", None)):
        lora = quick(
            base,
            output_dir=folder,
            eval_dataset=held_out,
            lora=dict(lora_dropout=0.5, target_modules="aggressive"),
        )
        lora.train()
        models.append(lora.model)
    assert same(*models)


def test_files_of_a_run_are_as_readable_as_others(base):
    umask = os.umask(0o022)
    try:
        run(quick_config(save_steps=2), disable_tqdm=True)
    finally:
        os.umask(umask)
    files = [path for path in pathlib.Path("run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "README.md"}
    narrow = {str(p) for p in files if stat.S_IMODE(p.stat().st_mode) != 0o644}
    assert not narrow


def card_of(folder):
    "Front matter and text of a card."
    _, data, text = (pathlib.Path(folder) / "README.md").read_text().split("---", 2)
    return yaml.safe_load(data), text


def test_cards_say_what_was_trained(base):
    here = str(pathlib.Path("base").resolve())
    run(quick_config(base_model=here, save_steps=4), disable_tqdm=True)
    for folder in ("run/adapter_checkpoint", "run/checkpoint-4"):
        data, text = card_of(folder)
        assert here not in f"{data} {text}" and "More Information" not in text
        assert data["library_name"] == "peft" and "rank 8" in text
    recorded = json.loads(
        pathlib.Path("run/adapter_checkpoint/adapter_config.json").read_text()
    )
    assert recorded["base_model_name_or_path"] == here
    data, text = card_of("run/final_merged")
    assert data["base_model"] == [here] and data["library_name"] == "transformers"
    assert "4 of 8 x 1 rows" in text and "Merging changed the loss" in text
    told = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert told["max_steps"] == 4 and told["base_model"] == "base" and told["datasets"] == ["rows.jsonl"]
    assert not {"output_dir", "device", "resume", "overwrite", "save_steps"} & told.keys()
    later = SmoLoRA(here, output_dir="run", device="cpu")
    later.save()
    assert "4 of 8 x 1 rows" in card_of("run/final_merged")[1] and "max_steps: 4" in card_of("run/final_merged")[1]


def test_the_card_of_an_adapter_names_a_base_that_others_can_find(base):
    run(quick_config(merge=False), disable_tqdm=True)
    assert card_of("run/adapter_checkpoint")[0]["base_model"] == "base"


def test_the_pace_is_shown_and_kept(base, capsys, caplog):
    with caplog.at_level("INFO"):
        found = run(quick_config(max_steps=6, logging_steps=2))
    assert "step 6 of 6, loss" in caplog.text and "tokens_per_second" in caplog.text
    capsys.readouterr()
    history = pd.read_json("run/history.jsonl", lines=True)
    rates = history.tokens_per_second[history.loss.notna()]
    assert (rates > 0).all() and (history.seconds_left.dropna() >= 0).all()
    show_result(found)
    said = capsys.readouterr().out
    assert "Trained 6 steps in " in said and " tokens per second." in said
    assert "Merging changed the loss from " in said and ": fine." in said


def test_a_step_learns_eight_rows_unless_both_numbers_are_given(base, monkeypatch):
    def both(**options):
        options = {"gradient_accumulation_steps": None} | options
        sft = make_lora(quick_config(**options)).sft_config
        return sft.per_device_train_batch_size, sft.gradient_accumulation_steps

    assert both() == (8, 1)
    assert both(batch_size=2) == (2, 4)
    assert both(gradient_accumulation_steps=4) == (2, 4)
    assert both(batch_size=3, gradient_accumulation_steps=2) == (3, 2)
    token = bytes_of_token(tiny_model().config)
    longest = longest_row(
        datasets.Dataset.from_dict({"text": TEXTS}), tiny_tokenizer()
    )
    monkeypatch.setattr("merge_lab.systems.lora.FORWARD_BYTES", 5 * token * longest)
    assert both() == (4, 2)


def test_logits_are_computed_of_learned_positions_only(base, monkeypatch):
    "Also where there is no Triton; the losses are those of trl as it is."
    from trl.trainer import utils

    rows, scored = datasets.Dataset.from_list(CHAT), []
    apply = utils._ChunkedLogProbFunction.apply

    def counted(hidden, *args):
        scored.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", counted)
    curves = quick(base, rows, output_dir="run").train()
    learned = sum(l != -100 for l in encode_rows(rows, tiny_tokenizer())[0]["labels"])
    assert set(scored) == {learned}
    scored.clear()
    monkeypatch.setattr(
        "merge_lab.systems.lora.learned_positions_only", contextlib.nullcontext
    )
    plain = quick(base, rows, output_dir="plain").train()
    assert min(scored) > learned
    assert curves.loss.tolist() == pytest.approx(plain.loss.tolist(), abs=1e-5)


@pytest.mark.parametrize("bf16", [True, False])
def test_short_rows_in_bf16_on_a_cpu_use_plain_attention(base, bf16):
    used = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            used.append(model.config._attn_implementation)

    lora = quick(base, output_dir="run", sft=dict(bf16=bf16), callbacks=[Look()])
    for _ in range(2):  # a base, and a model that has its adapter
        lora.train()
    assert set(used) == {"eager" if bf16 else "sdpa"}
    assert lora.model.config._attn_implementation == "sdpa"
