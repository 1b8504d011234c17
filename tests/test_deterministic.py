"""Asked to, every system that trains gives the same bits twice."""

import json
from pathlib import Path

import pytest
import torch

from merge_lab.cli import main
from merge_lab.run_folder import sha256_of
from small_runs import ADAPTERS, DAM, LAYERS, LORA, make_ground, MERGE, QUANTIZE, ROUTER, TRAIN

SYSTEMS = {  # words, and what the run leaves
    "mask-merge": (MERGE + TRAIN, "masks/masks.safetensors"),
    "mask-merge layer by layer": (f"{MERGE}{TRAIN} --train_mode layerwise --layer_steps 2 --finish_steps 1", "masks/masks.safetensors"),
    "mask-merge of few bits": (f"{MERGE}{TRAIN} --frozen_bits 4", "masks/masks.safetensors"),
    "mask-merge on its own words": (f"{MERGE}{TRAIN} --answers components --answers_per_prompt 1 --answer_tokens 4 --on_policy 0.5 --no_save_merged", "masks/masks.safetensors"),
    "dam-train": (f"{DAM} --held_out_rows 1 --no_save_merged", "masks.safetensors"),
    "layer-merge": (f"{LAYERS} --n_pairs 1 --data_dir chat_a --num_samples 4 --held_out_rows 2 --dtype float32", "merged/model.safetensors"),
    "layer-merge by a block": (f"{LAYERS} --strategy block --n_pairs 1 --data_dir chat_a --num_samples 4 --held_out_rows 2 --block_tries 1 --hidden_steps 2 --block_steps 2 --dtype float32", "merged/model.safetensors"),
    "lora": (f"{LORA} --eval_dataset none", "adapter_checkpoint/adapter_model.safetensors"),
    "lora-merge": (f"{ADAPTERS} --held_out_rows 1 --eval_samples 0 --no_save_merged", "masks/masks.safetensors"),
    "quantize": (QUANTIZE, "layer-00001.safetensors"),
    "router": (f"{ROUTER} --dropout 0.1", "best_router_checkpoint.safetensors"),
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_bits_twice(name, ground, monkeypatch, capsys):
    monkeypatch.chdir(ground)
    words, left = SYSTEMS[name]
    found = []
    for place in (f"{name.replace(' ', '-')}-1", f"{name.replace(' ', '-')}-2"):
        torch.rand(7)  # chance of the process that is not the run's
        status = main([*words.replace("_dir out", f"_dir {place}").split(), "--deterministic"])
        assert status == 0, capsys.readouterr().err[-2000:]
        found.append(sha256_of(Path(place, left)))
    if "--on_policy" in words:
        assert any(json.loads(line).get("rollout_tokens") for line in Path(place, "history.jsonl").read_text().splitlines())
    assert found[0] == found[1] and not torch.are_deterministic_algorithms_enabled()
