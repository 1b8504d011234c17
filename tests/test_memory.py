"""The estimate is what a real step takes, and it allocates nothing. nbs/studies/memory.ipynb asserts the published figures."""

import itertools
import resource
import threading

import pytest
import torch
from transformers import LlamaConfig

from merge_lab import masks, memory, token_losses
from merge_lab.memory import estimate_memory, fit_report, track_memory, training_step
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.tinylm import tiny_config, tiny_experts

SHAPE = dict(vocab_size=320, hidden_size=64, num_hidden_layers=4)
CASES = list(
    itertools.product(["llama", "qwen2", "gpt2"], ["fused", "accurate"], [192, 448])
)


def batch_of(batch, tokens, vocab_size=320, n=2):
    ids = torch.randint(
        3, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)
    )
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids,
        source=torch.arange(batch) % n,
    )


def measure(
    architecture,
    impl,
    tokens,
    batch=1,
    checkpointing=False,
    fused=True,
    dtype=torch.float32,
    **options,
):
    merger = Merger(
        tiny_experts(architecture, n=2, **SHAPE), MergerConfig(impl=impl, **options)
    ).to(dtype=dtype)
    for _, leaf, key in merger.masked_parameters():
        leaf.masks[key].data = leaf.masks[key].data.float()
    if checkpointing:
        merger.checkpoint_activations()
    merger.train()
    optimizer = torch.optim.AdamW([p for p in merger.parameters() if p.requires_grad])
    objective = Objective(fused=fused)
    training_step(merger, batch_of(batch, tokens), objective, optimizer)
    with track_memory(merger) as use:
        training_step(merger, batch_of(batch, tokens), objective, optimizer)
    return use


def estimate(
    architecture,
    impl,
    tokens,
    batch=1,
    checkpointing=False,
    fused=True,
    dtype=torch.float32,
    **options,
):
    return estimate_memory(
        tiny_config(architecture, **SHAPE),
        seq_len=tokens,
        batch_size=batch,
        impl=impl,
        dtype=dtype,
        gradient_checkpointing=checkpointing,
        fused_loss=fused,
        device="cpu",
        **options,
    )


def check(found, wanted):
    assert found.peak_bytes == pytest.approx(wanted.peak_bytes, rel=0.1)
    assert found.parts["components"] == pytest.approx(
        wanted.parts["components"], rel=0.01
    )
    for part in (
        "activations",
        "logits",
        "transients",
    ):  # each part, not only their sum
        assert found.parts[part] == pytest.approx(
            wanted.parts[part], abs=0.1 * wanted.peak_bytes
        )


@pytest.mark.parametrize("architecture, impl, tokens", CASES)
def test_the_estimate_is_what_is_measured(architecture, impl, tokens):
    check(estimate(architecture, impl, tokens), measure(architecture, impl, tokens))


@pytest.mark.parametrize(
    "options",
    [
        dict(checkpointing=True),
        dict(fused=False),
        dict(batch=3),
        dict(dtype=torch.bfloat16),
        dict(keep_merged=True),
        dict(target_kinds=["linear"]),
        dict(mode="vector_output"),
        dict(mode="scalar", constrain_mode="sum1"),
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_every_option_is_estimated(options):
    check(
        estimate("llama", "fused", 256, **options),
        measure("llama", "fused", 256, **options),
    )


def test_options_change_the_estimate_the_right_way():
    least = estimate("llama", "fused", 512, checkpointing=True).peak_bytes
    assert (
        least
        < estimate("llama", "fused", 512).peak_bytes
        < estimate("llama", "accurate", 512, fused=False).peak_bytes
    )
    assert least < estimate("llama", "fused", 1024, checkpointing=True).peak_bytes


def shape_of_3b():
    return LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=1,
    )


def test_nothing_is_allocated():
    estimate("llama", "fused", 64)  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = shape_of_3b()
    config.num_hidden_layers = 4
    found = estimate_memory(config, seq_len=2048)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert found.peak_bytes > 2**31 and grown < 200_000


def test_what_fits_is_left_alone_and_what_does_not_is_cured():
    config = tiny_config("llama", **SHAPE)
    options = dict(
        seq_len=512, dtype="float32", device="cpu", gradient_checkpointing=False
    )
    asked = estimate_memory(config, **options).peak_bytes
    assert fit_report(config, 2 * asked, **options).remedy == {}
    report = fit_report(config, int(0.8 * asked), **options)
    assert not report.fits and report.remedy["gradient_checkpointing"]
    assert (
        estimate_memory(config, **{**options, **report.remedy}).peak_bytes
        <= 0.8 * asked
    )


def test_offloading_leaves_little_on_the_device():
    from merge_lab.tinylm import tiny_config

    config = tiny_config("llama", vocab_size=512, hidden_size=256, num_hidden_layers=8)
    here = estimate_memory(config, 3, 64, dtype="bfloat16")
    away = estimate_memory(config, 3, 64, dtype="bfloat16", offload=True)
    assert away.parts["components"] == 0 < here.parts["components"]
    largest = 2 * max(config.intermediate_size, config.vocab_size) * config.hidden_size
    assert here.peak_bytes - here.parts["components"] <= away.peak_bytes
    assert away.peak_bytes < here.peak_bytes - here.parts["components"] + 8 * largest


@pytest.mark.parametrize("impl", ["fused", "accurate", "efficient"])
def test_remembered_shapes_change_nothing(impl, monkeypatch):
    config = tiny_config("llama", **SHAPE)
    options = dict(seq_len=96, impl=impl, device="cpu", fused_loss=impl == "fused")
    fast = estimate_memory(config, **options)
    monkeypatch.setattr(memory, "_key", lambda *_: None)
    assert estimate_memory(config, **options).parts == fast.parts


def test_an_estimate_leaves_other_threads_alone():
    "A training in another thread, as the widgets start it, computes as ever, and its tensors are not counted."
    attention = torch.nn.functional.scaled_dot_product_attention
    tables = [token_losses._BLOCK, masks._BLOCK, masks._OPERATIONS_PER_ELEMENT]
    before, seen = [dict(table) for table in tables], []

    def train_elsewhere():
        weight = torch.nn.Parameter(torch.zeros(2**18))
        weight.sum().backward()
        torch.optim.AdamW([weight]).step()
        same = masks.bring(weight, torch.device("cpu")) is weight
        untouched = torch.nn.functional.scaled_dot_product_attention is attention
        seen.append(same and untouched and [dict(table) for table in tables] == before)

    def objective(*args, **batch):
        other = threading.Thread(target=train_elsewhere)
        other.start()
        other.join()
        return Objective(fused=True)(*args, **batch)

    config = tiny_config("llama", **SHAPE)
    options = dict(seq_len=64, dtype="float32", device="cpu", offload=True)
    alone = estimate_memory(config, objective=Objective(fused=True), **options)
    beside = estimate_memory(config, objective=objective, **options)
    assert seen and all(seen) and beside.parts == alone.parts
