"Levels by token: nothing of the future, the same choices however a text is read, budgets on held-out text, files."

import dataclasses
import os
import re
import signal

import pytest
import torch
import torch.nn.functional as F

from merge_lab import token_routing, token_training
from merge_lab.cli import main
from merge_lab.nested_model import write_quantized
from merge_lab.run_folder import bundled_path, read_json, RunInterrupted
from merge_lab.static_mix import kept_of
from merge_lab.systems.quantize import QuantizeConfig, run_quantize
from merge_lab.systems.router import RouterConfig, run, use_kept
from merge_lab.text_windows import collate, exact_logits, text_windows
from merge_lab.tinylm import tiny_model, tiny_tokenizer
from merge_lab.token_levels import layer_token_costs, level_logits, oracle_choice, run_choice, token_divergences, whole_token_costs
from merge_lab.token_routing import fit_token_routers, log_factors, record_states, TokenRouters, TokenwiseQuantizeForCausalLM

PROMPT, TARGET = 6, 4.8


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request, tmp_path_factory):
    "A quantised tiny model."
    path = tmp_path_factory.mktemp(request.param) / "any"
    write_quantized(tiny_model(request.param, num_hidden_layers=3), tiny_tokenizer(), path, hessians=lambda n: {})
    return path


@pytest.fixture(scope="module")
def fitted(folder):
    "A model with fitted routers."
    train, validation = (text_windows(tiny_tokenizer(), ["prose"], seq_len=24, n=8, split=split) for split in ("train", "validation"))
    model = TokenwiseQuantizeForCausalLM.from_quantized(folder, precisions=[3, 4, 5, 8])
    model.fit_by_token(train, validation, PROMPT, TARGET)
    return model


@pytest.fixture
def model(folder, fitted, tmp_path):
    "The same with random weights in its routers, so that tokens differ much."
    fitted.save_token_routers(tmp_path / "routers.safetensors")
    model = TokenwiseQuantizeForCausalLM.from_quantized(folder, precisions=[3, 4, 5, 8])
    model.load_token_routers(tmp_path / "routers.safetensors")
    model.token_routers.weight.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.5)
    return model


def batch(seed=0, windows=3):
    "Ids, and labels whose first tokens are prompt."
    ids = torch.randint(7, 60, (windows, 20), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return ids, labels


def leaks(model, place=14) -> bool:
    "Whether what stands from a place on changes what earlier tokens choose."
    ids, labels = batch()
    other = ids.clone()
    other[:, place:] = torch.randint(7, 60, (3, 20 - place), generator=torch.Generator().manual_seed(9))
    first, second = model.infer_forward(ids, labels=labels), model.infer_forward(other, labels=labels)
    return not torch.equal(first.bits[:, PROMPT:place], second.bits[:, PROMPT:place])


def test_no_future_token_has_a_say(model):
    ids, labels = batch()
    assert len(model.infer_forward(ids, labels=labels).bits[:, PROMPT:].unique()) > 3
    assert not leaks(model)


@pytest.mark.parametrize("planted", ["mean", "next"])
def test_a_planted_leak_is_found(model, monkeypatch, planted):
    own = TokenRouters.features

    def features(self, hidden):
        seen = hidden.mean(1, keepdim=True).expand_as(hidden) if planted == "mean" else F.pad(hidden[:, 1:], (0, 0, 0, 1))
        return own(self, seen)

    monkeypatch.setattr(TokenRouters, "features", features)
    assert leaks(model)


def test_a_text_read_at_once_and_step_by_step_makes_the_same_choices(model):
    ids, labels = batch()
    whole = model.infer_forward(ids, labels=labels)
    step = model.infer_forward(ids[:, :PROMPT], use_cache=True)
    assert step.bits.isnan().all()
    for place in range(PROMPT, 20):
        step = model.infer_forward(ids[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
        torch.testing.assert_close(step.bits[:, 0], whole.bits[:, place])
        torch.testing.assert_close(step.logits[:, 0], whole.logits[:, place], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(9, 5), (14,), (3, 11), (8, 1, 5)])
def test_what_follows_may_come_in_passes_of_any_length(model, sizes):
    ids, labels = batch()
    whole, step, place = model.infer_forward(ids, labels=labels), model.infer_forward(ids[:, :PROMPT], use_cache=True), PROMPT
    for size in sizes:
        step = model.infer_forward(ids[:, place : place + size], past_key_values=step.past_key_values, use_cache=True)
        torch.testing.assert_close(step.bits, whole.bits[:, place : place + size])
        place += size


def test_a_prompt_may_come_in_passes(model):
    ids = batch()[0]
    told = [model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **options) for options in ({}, {"prefill_chunk_size": 7})]
    assert torch.equal(*told) and len(model.plan.spent) == 3 + 3 and all(part.isnan().all() for part in model.plan.spent[:3])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("length", [1, PROMPT])
def test_generation_is_the_same_with_and_without_a_cache(model, options, length):
    ids = batch()[0][:, :length]
    mask = torch.ones_like(ids)
    mask[1, : length // 2] = 0
    options = options | dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached, bits = model.generate(ids, mask, **options), model.written_bits()
    assert model.token_routers.sizes[:, 0].sum() <= bits <= model.token_routers.sizes[:, -1].sum()
    assert torch.equal(cached, model.generate(ids, mask, use_cache=False, **options))


def test_padding_and_its_neighbours_change_no_choice(model):
    ids, labels = batch()
    alone = model.infer_forward(ids[1:2], labels=labels[1:2])
    padded = F.pad(ids, (3, 0))
    mask = F.pad(torch.ones_like(ids), (3, 0))
    together = model.infer_forward(padded, mask, F.pad(labels, (3, 0), value=-100))
    assert torch.equal(together.bits[1, 3 + PROMPT :], alone.bits[0, PROMPT:])
    assert together.bits[:, : 3 + PROMPT].isnan().all()


def test_without_weights_every_token_reads_one_mix(model):
    ids, labels = batch()
    model.token_routers.weight.data.zero_()
    model.token_routers.bias.data.zero_()
    bits = model.infer_forward(ids, labels=labels).bits[:, PROMPT:]
    assert len(bits.unique()) == 1
    with model.set_precision(5):
        fixed = model.infer_forward(ids, labels=labels)
    assert fixed.bits.tolist() == [[5] * 3] * 3


def test_a_budget_is_met_on_text_that_nothing_was_fitted_on(fitted):
    test = text_windows(tiny_tokenizer(), ["prose"], seq_len=24, n=8, split="test")
    assert abs(fitted.spent_bits(test, PROMPT) - TARGET) < 0.1
    scores = fitted.beside_static(test, PROMPT)
    assert abs(scores["routed"]["real_bits"] - fitted.spent_bits(test, PROMPT)) < 1e-5
    assert abs(scores["static"]["real_bits"] - TARGET) < 0.05


def test_states_are_those_that_a_model_at_the_budget_meets(fitted):
    windows = text_windows(tiny_tokenizer(), ["prose"], seq_len=24, n=5, split="test")
    states, costs, counted = record_states(fitted, fitted.levels, windows, PROMPT, fitted.start, batch_size=2)
    ids, _ = collate(windows, PROMPT)
    assert states.shape == (5, 17, 3, 32) and costs.shape == (5, 17, len(fitted.levels.mixes))
    torch.testing.assert_close(states[:, :, 0], fitted.model.get_input_embeddings()(ids)[:, PROMPT:-1])
    whole = whole_token_costs(fitted, fitted.levels, ids, exact_logits(fitted, windows))
    torch.testing.assert_close(costs, whole[:, PROMPT:], atol=1e-6, rtol=1e-3)
    assert counted.all()


def test_of_a_conversation_only_answers_count():
    "A question costs what it costs: neither the factors nor the mean divergence see it."
    generator = torch.Generator().manual_seed(0)
    routers = TokenRouters(torch.ones(1, 3), torch.ones(1, 3), 8)
    states, counted = torch.randn(12, 60, 1, 8, generator=generator), torch.rand(12, 60, generator=generator) < 0.5
    told = F.rms_norm(states[:, :, 0], (8,))[..., 3] * 0.7
    costs = torch.where(counted, told, -3 * told).exp()[..., None] * torch.tensor([4.0, 2, 1])
    assert fit_token_routers(routers, states, log_factors(costs, 1, counted=counted), counted)[0] > 0.95
    assert fit_token_routers(routers, states, log_factors(costs, 1))[0] < 0.5


def test_a_budget_is_met_on_conversations(folder):
    "A token that predicts the first word of an answer is prompt, and reads nothing of the budget."
    train, validation = (text_windows(tiny_tokenizer(), ["tasks"], seq_len=48, n=12, split=split, prefix_length=PROMPT) for split in ("train", "validation"))
    model = TokenwiseQuantizeForCausalLM.from_quantized(folder, precisions=[3, 4, 5, 8])
    model.fit_by_token(train, validation, PROMPT, TARGET)
    found = model.beside_static(validation, PROMPT)["routed"]
    assert abs(model.spent_bits(validation, PROMPT) - TARGET) < 0.2 and abs(found["real_bits"] - TARGET) < 0.4


def test_what_can_be_predicted_is_predicted_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    routers = TokenRouters(torch.ones(2, 3), torch.ones(2, 3), 8)
    states = torch.randn(12, 60, 2, 8, generator=generator)
    told = F.rms_norm(states[:, :, 1], (8,))[..., 3] * 0.7
    costs = told.exp()[..., None] * torch.tensor([4.0, 2, 1])
    shares = fit_token_routers(routers, states, log_factors(costs, 1))
    assert shares[1] > 0.99 and shares[0] < 0.05
    torch.testing.assert_close(routers.weight[1, 3], torch.tensor(0.7), atol=0.05, rtol=0)


def test_an_oracle_by_token_beats_the_mix_of_its_budget_when_it_is_run(fitted):
    windows = text_windows(tiny_tokenizer(), ["prose"], seq_len=24, n=6, split="test")
    (ids, _), exact, levels, start = collate(windows, PROMPT), exact_logits(fitted, windows), fitted.levels, fitted.start
    costs = whole_token_costs(fitted, levels, ids, exact)[:, PROMPT:, None]
    choice = oracle_choice(costs, levels, levels.sizes[:, start].sum().item())
    static = run_choice(fitted, levels, ids, exact, torch.full_like(choice, start), start)
    found = run_choice(fitted, levels, ids, exact, choice, start)
    assert found["real_bits"] <= static["real_bits"] + 1e-9 and found["kl"] < static["kl"]


def test_costs_in_company_are_those_of_whole_passes(fitted):
    windows = text_windows(tiny_tokenizer(), ["prose"], seq_len=24, n=3, split="test")
    (ids, _), exact, levels = collate(windows, PROMPT), exact_logits(fitted, windows), fitted.levels
    choice = torch.randint(0, len(levels.mixes), (*ids.shape, 3), generator=torch.Generator().manual_seed(0))
    start, changes = layer_token_costs(fitted, levels, ids, exact, choice)
    torch.testing.assert_close(start, token_divergences(level_logits(fitted, levels, ids, choice), exact))
    for n in range(3):
        trial = choice.clone()
        trial[..., n] = 1
        torch.testing.assert_close(start + changes[:, :, n, 1], token_divergences(level_logits(fitted, levels, ids, trial), exact), atol=1e-6, rtol=1e-3)


def test_a_choice_of_another_shape_is_refused(fitted):
    ids = batch()[0]
    choice = torch.zeros(3, 19, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="choice is for 3 x 19 samples and the batch has 3 x 20"):
        level_logits(fitted, fitted.levels, ids, choice)


def test_routers_that_give_no_numbers_are_named(model):
    model.token_routers.bias.data[1] = float("nan")
    ids, labels = batch()
    with pytest.raises(FloatingPointError, match="router of layer 1"):
        model.infer_forward(ids, labels=labels)


def test_the_command_fits_tells_and_keeps(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "prose", "--max_length", "24", "--prefix_length", str(PROMPT), "--num_samples", "8", "--num_validation", "8", "--device", "cpu"]
    done = main(["router", "--model_path", str(folder), "--granularity", "token", "--target_bits", str(TARGET), "--output_dir", "run", *words])
    told, wrong = capsys.readouterr()
    assert not done, wrong
    facts = read_json(tmp_path / "run" / "static.json")
    assert f"within the budget: {facts['kept']}" in told and "real_bits" in told
    routed = facts["routed"]
    assert abs(routed["real_bits"] - TARGET) < 0.2 and (facts["kept"] == "routed") == (routed["gain"] > routed["error"] and routed["real_bits"] <= TARGET + 0.05)
    assert [row["oracle"] for row in facts["headroom"]] == ["static", "by token"] and "An oracle by token promises" in told
    assert all(sum(own) == pytest.approx(1) for own in facts["load"]) and len(facts["entropy"]) == len(facts["load"]) == 3 and "entropy" in told
    assert read_json(tmp_path / "run" / "training_history.json")["epochs"][0]["real_bits"] == facts["routed"]["real_bits"]
    model = TokenwiseQuantizeForCausalLM.from_quantized(folder)
    assert use_kept(model, tmp_path / "run") == facts["kept"] and (model.assignment is None) == (facts["kept"] == "routed")


def test_the_fewest_bits_of_any_model_are_a_level(tmp_path):
    "Sums of bytes over weights are no round numbers: the bundled base failed by a rounding."
    run_quantize(QuantizeConfig(str(bundled_path("models/base")), str(tmp_path / "any"), dataset=["prose"], max_length=32, num_samples=4))
    told = run(RouterConfig(str(tmp_path / "any"), granularity="token", target_bits=4.5, dataset=["prose"], max_length=32, prefix_length=8, num_samples=8, num_validation=8, token_steps=1, output_dir=str(tmp_path / "run"), device="cpu"))[1]
    assert abs(told.attrs["static"]["routed"]["real_bits"] - 4.5) < 0.3


@pytest.mark.parametrize("option", ["num_costs", "gate", "dropout"])
def test_what_is_of_prompts_alone_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} would have no effect"):
        RouterConfig("any", granularity="token", **{option: {"num_costs": 3, "gate": "sparsemax", "dropout": 0.1}[option]})


def test_where_an_oracle_has_too_little_to_win_the_mix_is_kept_and_nothing_trained(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(token_training, "gate_gradients", lambda *_: pytest.fail("trained"))
    config = RouterConfig(str(folder), dataset=["prose"], granularity="token", target_bits=TARGET, max_length=24, prefix_length=PROMPT, num_samples=8, num_validation=8, least_headroom=1.0, output_dir=str(tmp_path / "run"))
    assert run(config)[1].attrs["static"]["kept"] == "static" and "least_headroom=1" in caplog.text


def test_more_bytes_are_no_skill(fitted):
    "A static mix of a few more bytes diverges less than the budget's; as routers it saves nothing."
    windows = text_windows(tiny_tokenizer(), ["prose"], seq_len=24, n=8, split="validation")
    before = fitted.mask_state()
    for name in ("weight", "bias"):
        getattr(fitted.token_routers, name).data.zero_()
    fitted.fit_token_price(windows, PROMPT, TARGET + 0.04)
    scores = fitted.beside_static(windows, PROMPT)
    fitted.load_mask_state(before)
    assert scores["routed"]["real_bits"] > scores["static"]["real_bits"] or scores["routed"]["kl"] >= scores["static"]["kl"]
    assert kept_of(scores, TARGET) == "static"


def test_training_by_token_that_is_stopped_goes_on_to_the_same_routers(folder, tmp_path, monkeypatch):
    config = RouterConfig(str(folder), dataset=["prose"], granularity="token", target_bits=TARGET, precisions=[3, 4, 5, 8], max_length=24, prefix_length=PROMPT, num_samples=12, num_validation=8, token_steps=6, learning_rate=3e-3, output_dir=str(tmp_path / "cut"))
    calls, gradients = [], token_training.gate_gradients

    def counted(*arguments):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return gradients(*arguments)

    monkeypatch.setattr(token_training, "gate_gradients", counted)
    with pytest.raises(RunInterrupted, match="after step 4 of 6.*--resume"):
        run(config)
    run(dataclasses.replace(config, resume=True))
    assert len(calls) == 6
    run(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    files = [(tmp_path / name / token_routing.TOKEN_ROUTERS_FILE).read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_a_budget_has_to_be_said(folder, tmp_path):
    words = dict(dataset=["prose"], max_length=24, prefix_length=PROMPT, num_samples=2, num_validation=2, device="cpu")
    with pytest.raises(ValueError, match="Routers by token spend a budget"):
        run(RouterConfig(str(folder), granularity="token", output_dir=str(tmp_path / "run"), **words))
    assert not (tmp_path / "run").exists() and RouterConfig("quantized").granularity == "prompt"


def test_a_run_by_token_that_is_stopped_measures_nothing_twice(folder, tmp_path, monkeypatch, caplog):
    config = RouterConfig(str(folder), dataset=["prose"], granularity="token", target_bits=TARGET, precisions=[3, 4, 5, 8], max_length=24, prefix_length=PROMPT, num_samples=12, num_validation=8, output_dir=str(tmp_path / "cut"))
    calls, measure = [], token_routing.whole_token_costs

    def counted(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(token_routing, "whole_token_costs", counted)
    with pytest.raises(RunInterrupted, match="what was measured is in .*--resume"):
        run(config)
    monkeypatch.setattr(token_routing, "measured_costs", lambda *_, **__: pytest.fail("measured again"))
    run(dataclasses.replace(config, resume=True))
    assert len(calls) == 1 + 3  # of three batches one was there
    os.truncate(tmp_path / "cut" / "measured" / "levels_0.safetensors", 300)
    run(dataclasses.replace(config, resume=True))
    assert len(calls) == 1 + 3 + 1 and re.search(r"levels_0.safetensors cannot be read .*measured again", caplog.text)
    monkeypatch.undo()
    run(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    files = [(tmp_path / name / token_routing.TOKEN_ROUTERS_FILE).read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]
