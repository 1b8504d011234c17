"""Runs that several test files begin with, and commands on tiny models that take a second each."""

import json
import os
import signal
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import TrainerCallback

from merge_lab.adapters import load_base, make_lora_config, quiet_peft
from merge_lab.cli import main
from merge_lab.run_folder import bundled_path, OPTIMIZER_FILE, save_tensors, seal, STATE_FILE, write_json
from merge_lab.systems.mask_merge import demo_config, MaskMergeConfig
from merge_lab.tinylm import save_tiny, tiny_experts


def small(folder, **options) -> MaskMergeConfig:
    "A short mask merge of the bundled experts, in `run` below the folder."
    defaults = dict(
        dataset_configs={str(bundled_path(f"tasks/{task}")): 48 for task in ("rewrite", "summarize")},
        max_steps=6, eval_samples=4, per_device_train_batch_size=4, report=False,
    )  # fmt: skip
    return demo_config(output_dir=str(folder / "run"), **defaults | options)


class SignalAt(TrainerCallback):
    "A signal, Ctrl-C's unless another is given, while a step (from 0) is computed."

    def __init__(self, step: int, number: int = signal.SIGINT):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def stopping_at(call: int, function):
    "The function, which is stopped as by Ctrl-C at one of its calls; `calls` counts them."
    calls = []

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    stops.calls = calls
    return stops


CHAT = [{"messages": [{"role": "user", "content": f"the cat saw {n}"}, {"role": "assistant", "content": f"{n} dog ran home"}]} for n in ("one", "two", "three", "four", "five")]
MERGE = "mask-merge --model_paths a b --dataset_configs chat_a chat_b --output_dir out --device cpu"
TRAIN = " --max_steps 2 --held_out_rows 1 --eval_samples 1 --per_device_train_batch_size 1 --no_report --base_model mean"
LORA = "lora --base_model a --datasets chat_a/train.jsonl --output_dir out --device cpu --max_steps 1"
ADAPTERS = "lora-merge --base_model a --adapters x y --datasets chat_a chat_b --output_dir out --device cpu --max_steps 1"
TOPK = "dam-topk --base_model a --model_paths b a --datasets chat_b chat_a --output_dir out --device cpu --k 4"
DAM = "dam-train --untrained_merged_model_name dam --hf_disk_dataset_dir topk --output_dir out --device cpu --max_steps 1"
LAYERS = "layer-merge a --output_dir out --device cpu --max_steps 1"
QUANTIZE = "quantize a --output_dir out --device cpu --dataset text.txt --max_length 8 --num_samples 2"
ROUTER = "router q --output_dir out --device cpu --dataset text.txt --max_length 16 --prefix_length 4 --num_samples 4 --num_validation 2 --num_train_epochs 1 --static False"
COMPARE = "compare a b --datasets chat_a chat_b --output_dir out --minutes 1"


def sealed_checkpoint(folder, step, processes=1):
    "What a run leaves after a step, as far as it is looked at before it is gone on from."
    place = Path(folder) / f"checkpoint-{step}"
    save_tensors(place / OPTIMIZER_FILE, {})
    chance = ["rng_state.json"] if processes == 1 else [f"rng_state_{i}.json" for i in range(processes)]
    for name in (STATE_FILE, "trainer_state.json", *chance):
        write_json(place / name, {"global_step": step})
    seal(place)
    return place


def rows(path, values):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(value) + "\n" for value in values))


def adapters(base):
    "Two random adapters, which name their base."
    for seed, folder in enumerate("xy"):
        torch.manual_seed(seed)
        with quiet_peft():
            get_peft_model(load_base(base, "cpu"), make_lora_config(load_base(base, "cpu"), {"r": 2})).save_pretrained(folder)


def make_ground(folder):
    "Two tiny models, two adapters, data for each, a text, and what runs of them leave: a merge, a dataset of teachers, a DAM, a quantised model."
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, model in zip("ab", tiny_experts(n=2)):
            save_tiny(model, name)
            for split in ("train", "validation", "test"):
                rows(f"chat_{name}/{split}.jsonl", CHAT)
        some = ["cat", "dog", "bird", "fish", "tree", "house", "river", "road", "sun", "moon"]
        Path("text.txt").write_text("\n\n".join(f"the {a} saw the {b} and a {a} ran home ." for a in some for b in some))
        adapters("a")
        runs = (MERGE + TRAIN + " --save_steps 1", "run"), (TOPK, "topk"), ("dam-merge a b a --output_dir out --device cpu", "dam"), (QUANTIZE, "q")
        for words, place in runs:
            assert main(words.replace("_dir out", f"_dir {place}").split()) == 0
    finally:
        os.chdir(before)
    return folder
