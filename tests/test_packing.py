"Rows that share lines give what padded rows give, and models that cannot share them are found out."

import copy
import importlib.util
import threading
from types import SimpleNamespace

import pytest
import torch
from merge_lab import packing
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import Objective
from merge_lab.packing import Packed, agrees, lines_of, shared_lines
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)
FAMILIES = {
    "llama": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=8),
    "gpt_neox": {},
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": dict(num_key_value_heads=2, head_dim=8, sliding_window=4),
    "mistral": dict(num_key_value_heads=2, head_dim=8, sliding_window=4),
    "bloom": dict(n_layer=2, n_head=4),
    "mixtral": dict(num_key_value_heads=2, num_local_experts=4),
    "lfm2": dict(num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
}


def merger_of(family, **options):
    "Two random models of one family, merged."
    own = FAMILIES[family]
    config = AutoConfig.for_model(family, **(own if family == "gpt2" else TINY | own) | dict(vocab_size=64))
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config))
        for name, parameter in models[-1].named_parameters():
            parameter.data.mul_(10 if "conv." in name else 1)  # a trained convolution carries over more than a fresh one
    return Merger(models, MergerConfig(["a", "b"], base_model="mean", **options))


def batch_of(lengths=(16, 5, 4, 6, 3, 9)):
    "Rows of random tokens, padded."
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 64, mask.shape, generator=generator) * mask
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), source=torch.arange(len(lengths)) % 2)


def loss_and_gradients(merger, packs):
    merger.packs = packs
    merger.zero_grad()
    loss = merger(objective=Objective(), **batch_of())["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in merger.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_step_is_the_padded_step(family):
    merger = merger_of(family)
    wanted, gradients = loss_and_gradients(merger, False)
    got, found = loss_and_gradients(merger, None)  # finds out whether it can
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_carry_over_from_row_to_row_are_padded(family):
    merger = merger_of(family)
    merger.hidden(**{name: value for name, value in batch_of().items() if name in ("input_ids", "attention_mask")})
    assert merger.packs is (family not in ("bloom", "lfm2"))


def test_a_packed_forward_reads_fewer_positions():
    merger, seen = merger_of("llama"), []
    merger.model.base_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    batch = batch_of()
    merger.packs = True
    merger.hidden(batch["input_ids"], batch["attention_mask"])
    assert seen[0] < 0.7 * batch["input_ids"].numel()


def plain_model(family):
    "A random model of a family, with a rank 4 adapter whose factors are not zero."
    from peft import LoraConfig, get_peft_model

    config = AutoConfig.for_model(family, **TINY | FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(10 if "conv." in name else 1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def gradients_of(model):
    batch = {name: value for name, value in batch_of().items() if name != "source"}
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2"])
def test_an_adapter_learns_from_shared_lines_what_it_learns_from_padded_rows(family):
    model, widths = plain_model(family).eval(), []  # no dropout, which would fall otherwise
    wanted, gradients = gradients_of(model)
    model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[:2].numel()))
    with shared_lines(model):
        got, found = gradients_of(model)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert (widths[-1] < widths[0]) is (family != "lfm2")


def test_dropout_does_not_hide_that_a_model_can_share_lines():
    model, widths = plain_model("llama").train(), []
    modes = {name: module.training for name, module in model.named_modules()}
    model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[:2].numel()))
    with shared_lines(model):
        gradients_of(model)
    assert widths[-1] < widths[0] and {name: module.training for name, module in model.named_modules()} == modes


def test_shared_lines_leave_everything_else_alone():
    model = plain_model("llama").eval()
    batch = {name: value for name, value in batch_of().items() if name in ("input_ids", "attention_mask")}
    plain = model.get_decoder().forward
    with shared_lines(model):
        assert model(**batch, use_cache=False, output_hidden_states=True).hidden_states[0].shape[:2] == batch["input_ids"].shape
        assert model.generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False).shape[1] > batch["input_ids"].shape[1]
    assert model.get_decoder().forward == plain
    with pytest.raises(KeyError), shared_lines(model):
        raise KeyError
    assert model.get_decoder().forward == plain


def test_contexts_nest_and_a_forward_of_its_own_comes_back():
    model = plain_model("llama").eval()
    decoder = model.get_decoder()
    own = decoder.forward = lambda *args, **kwargs: type(decoder).forward(decoder, *args, **kwargs)
    with shared_lines(model), shared_lines(model):
        wanted, _ = gradients_of(model)
    assert decoder.forward is own
    del decoder.forward
    torch.testing.assert_close(gradients_of(model)[0], wanted, rtol=1e-5, atol=1e-6)


def test_nothing_agrees_with_what_is_no_number():
    states, mask = torch.ones(4, 3, 8), torch.ones(4, 3)
    for dtype in (torch.float32, torch.bfloat16):
        assert agrees(states.to(dtype), states.to(dtype), mask)
        assert not agrees(torch.full_like(states, float("nan")).to(dtype), states.to(dtype), mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_cannot_are_found_out_in_16_bits(family):
    merger = merger_of(family).to(torch.bfloat16)
    merger.hidden(**{name: value for name, value in batch_of().items() if name in ("input_ids", "attention_mask")})
    assert merger.packs is (family not in ("bloom", "lfm2"))


def test_fp32_weights_under_autocast_are_judged_as_16_bits():
    merger = merger_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        merger.hidden(**{name: value for name, value in batch_of().items() if name in ("input_ids", "attention_mask")})
    assert merger.packs


def test_what_is_left_of_a_line_has_no_position_that_no_row_has():
    "A row may be as long as a model has positions."
    packed = Packed(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]]), [[0, 1]], 12)
    assert packed.positions.max() == 2 and packed.positions[0, :5].tolist() == [0, 1, 2, 0, 1]


def test_no_line_is_wider_than_a_chunk_of_attention():
    "transformers 5.0 to 5.22 count chunks from the beginning of the line, so a row on the border of two would be cut."
    config = AutoConfig.for_model(
        "llama4_text", **TINY, intermediate_size_mlp=64, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=24
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for lengths, width in (((16, 5, 4, 6, 3, 9), 24), ((16, 3, 2, 2), 23), ((30, 5, 4, 6), None)):
        batch = batch_of(lengths)
        packed = lines_of(SimpleNamespace(packs=None), model.model, batch["input_ids"], batch["attention_mask"], 32)
        assert packed is None if width is None else packed.ids.shape[1] <= width, lengths


@pytest.fixture
def by_rows(monkeypatch):
    "Attention is taken row by row on tiny models, too, where a call costs more than it saves."
    monkeypatch.setattr(packing, "ROW_COST", 0)


def spied_rows(monkeypatch):
    "Lengths of the rows whose attention transformers' `sdpa` was asked for, and whether under a mask."
    from transformers.integrations import sdpa_attention

    seen, plain = [], sdpa_attention.sdpa_attention_forward

    def spy(module, query, key, value, attention_mask, **options):
        seen.append((query.shape[2], attention_mask is not None))
        return plain(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", spy)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_row_by_row_is_the_padded_step(family, by_rows):
    merger = merger_of(family)
    wanted, gradients = loss_and_gradients(merger, False)
    got, found = loss_and_gradients(merger, None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    eager_or_padded = family in ("gemma2", "bloom", "lfm2")
    assert getattr(merger, "packs_by_rows", None) is (None if eager_or_padded else True)


def test_attention_on_a_line_is_taken_row_by_row_without_a_mask(monkeypatch, by_rows):
    merger, batch, seen = merger_of("llama"), batch_of(), spied_rows(monkeypatch)
    merger.packs = merger.packs_by_rows = True
    merger.hidden(batch["input_ids"], batch["attention_mask"])
    assert seen == [(length, False) for length in (16, 5, 4, 6, 3, 9)] * 2  # two layers


def test_a_window_stays_a_window_on_a_line(monkeypatch, by_rows):
    merger, batch, seen = merger_of("mistral"), batch_of(), spied_rows(monkeypatch)
    merger.packs = merger.packs_by_rows = True
    merger.hidden(batch["input_ids"], batch["attention_mask"])
    assert {length for length, masked in seen if masked} == {16, 5, 6, 9} and {length for length, masked in seen if not masked} == {4, 3}


def test_what_an_indexer_chose_holds_on_a_line(by_rows):
    "DeepSeek V3.2 applies it where attention is called `sdpa`, and two short rows do not tell."
    config = AutoConfig.for_model(
        "deepseek_v32", vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_topk=16, index_n_heads=32, index_head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    decoder, batch = AutoModelForCausalLM.from_config(config).eval().model, batch_of((60, 10, 9, 12, 40, 11))
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():  # wide enough that no two scores of the indexer are alike
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 if parameter.ndim > 1 else parameter.data
    taken = batch["attention_mask"].bool()
    packed = packing.lines_of(SimpleNamespace(packs=None), decoder, batch["input_ids"], batch["attention_mask"], 32)
    with torch.no_grad():
        padded = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
        torch.testing.assert_close(packed.through(decoder).last_hidden_state[taken], padded[taken], rtol=1e-4, atol=1e-5)
    assert packed.line is not None


def test_each_way_is_asked_for_itself(by_rows):
    "Under gradient checkpointing only the plain way is asked; what comes later without it asks for the other."
    model, batch = merger_of("llama"), batch_of()
    decoder, asked = model.model.model, (batch["input_ids"], batch["attention_mask"], 32)
    owner = SimpleNamespace(packs=None)
    model.train()
    model.checkpoint_activations()
    assert lines_of(owner, decoder, *asked).line is None and not hasattr(owner, "packs_by_rows")
    with torch.no_grad():
        assert lines_of(owner, decoder, *asked).line is not None and owner.packs_by_rows is True
        owner.packs_by_rows = False
        assert lines_of(owner, decoder, *asked).line is None and owner.packs


def test_only_who_wants_it_gets_another_attention(by_rows):
    "What one thread wants is nothing to another, nor to a copy of the config."
    merger, batch, said = merger_of("llama"), batch_of(), []
    wanted = merger.hidden(batch["input_ids"], batch["attention_mask"])

    def other(module, args):
        if not said:
            said.append(copy.deepcopy(merger.config)._attn_implementation)
            thread = threading.Thread(target=lambda: said.append(merger.model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state))
            thread.start()
            thread.join()

    merger.model.model.norm.register_forward_pre_hook(other)
    found, taken = merger.hidden(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"].bool()
    assert said[0] == "sdpa" and packing._wanted.get() is None
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(said[1][taken], wanted[taken], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_computed_twice_do_the_same_twice(checkpointing, by_rows):
    merger = merger_of("llama")
    wanted, gradients = loss_and_gradients(merger, False)
    merger.train()
    if checkpointing:
        merger.checkpoint_activations()
    got, found = loss_and_gradients(merger, None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_an_error_in_the_middle_of_a_line_leaves_the_model_as_it_was(by_rows):
    merger, batch = merger_of("llama"), batch_of()
    merger.packs = merger.packs_by_rows = True
    hook = merger.model.base_model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merger.hidden(batch["input_ids"], batch["attention_mask"])
    hook.remove()
    assert packing._wanted.get() is None
    wanted = merger.hidden(batch["input_ids"], batch["attention_mask"])
    merger.packs = False
    taken = batch["attention_mask"].bool()
    torch.testing.assert_close(wanted[taken], merger.hidden(batch["input_ids"], batch["attention_mask"])[taken], rtol=1e-4, atol=1e-5)


def test_a_model_that_is_compiled_later_is_compiled_in_one_piece():
    "The function behind transformers' `sdpa` stays there, and a compiler cannot read what a thread wants."
    with packing.other_attention(None):
        pass
    model, batch = plain_model("llama").base_model.model.eval(), batch_of((9, 9))
    wanted = model(batch["input_ids"], use_cache=False).logits
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(batch["input_ids"], use_cache=False).logits, wanted)


def test_a_module_that_is_loaded_again_knows_who_took_attention():
    "As where a notebook reloads what was edited: otherwise rows would be taken the slow way without a word."
    spec = importlib.util.spec_from_file_location("merge_lab.packing_again", packing.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    config = SimpleNamespace(_attn_implementation="sdpa")
    for first, second in ((again, packing), (packing, again)):
        with first.other_attention(lambda *_, **__: "taken"):
            assert second.has_torch_attention(config)
        with second.other_attention(lambda *_, **__: "taken"):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"](None) == "taken"
    with packing.other_attention(lambda *_, **__: None):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is packing._asking_attention
