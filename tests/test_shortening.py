"Shorter models without pairs: what is chosen, mapped, learned and fused, for every kind of decoder."

import copy
import dataclasses
import json
import logging

import pandas as pd
import pytest
import torch
import transformers
from test_architectures import IDS, logits_of, MORE, shrunk
from torch.testing import assert_close
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merge_lab import block_training, cuts, depth_scores, linear_maps, strategies, student
from merge_lab.architecture import decoder_layers
from merge_lab.block_layer import block_leaves, fuse_block_layer, mean_model, with_block_layer
from merge_lab.calibration import prepare_calibration_data
from merge_lab.checkpoints import load_tokenizer
from merge_lab.components import load_model
from merge_lab.cuts import shared_copy
from merge_lab.depth import check_depth_free, period_of, remove_layers, unusual_order
from merge_lab.held_out import HeldOut
from merge_lab.run_folder import bundled_path
from merge_lab.runs import Run
from merge_lab.systems import layer_merge as lm
from merge_lab.tinylm import perturb, tiny_model

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
FAMILIES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "phi", "phi3", "opt", "falcon", "bloom", "olmo2", "olmo3", "cohere2",
    "granite", "smollm3", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba", "lfm2",
]  # fmt: skip
MAPPED = ["llama", "gpt2", "gpt_neox", "phi", "opt", "bloom", "deepseek_v3"]


def deep(kind, depth=6, **more):
    "A tiny model of a type, deep enough to lose layers; a layer's kind goes by its place where the type has several."
    config_class = CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = shrunk(config_class) | MORE.get(kind, {})
    values |= {name: depth for name in DEPTHS if name in values or name == "num_hidden_layers" and name in fields}
    if values.get("layer_types"):
        values["layer_types"] = (depth * list(values["layer_types"]))[:depth]
    if kind == "gpt_neo":
        values["attention_types"] = [[["global", "local"], depth // 2]]
    torch.manual_seed(0)
    config = config_class(**values | more)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    perturb(model, 0.2, 0)
    return model.requires_grad_(False)


def batches_of(n=3, shape=(2, 12), top=90):
    ids = torch.randint(3, top, (n, *shape), generator=torch.Generator().manual_seed(0))
    return [dict(input_ids=x, attention_mask=torch.ones_like(x), labels=x) for x in ids]


def moved(student, by=0.02):
    "The student after something was learned."
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return student


def assert_fused_is(fused, learned, folder):
    "A fused model, and the one that is read of its files, have the logits of the trained form; it generates the same with and without a cache."
    assert_close(logits_of(fused, use_cache=False), learned, atol=1e-5, rtol=0)
    fused.save_pretrained(folder)
    read, info = type(fused).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits_of(read, use_cache=False), learned, atol=1e-5, rtol=0)
    options = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(*(read.generate(IDS, use_cache=cached, **options) for cached in (True, False)))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_block_learned_is_what_is_fused_saved_and_read(kind, tmp_path):
    model = deep(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = moved(with_block_layer(model, [1, 2, 3], rank=2))
    learned = logits_of(student, use_cache=False)
    assert not torch.allclose(learned, logits_of(remove_layers(cuts.shared_copy(model), [2, 3]), use_cache=False), atol=1e-4)
    assert_fused_is(fuse_block_layer(student), learned, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_pairs_learned_is_what_is_fused_saved_and_read(kind, tmp_path):
    model = lm.replace_layers_with_mergeable(deep(kind), [(1, 2, 0.8), (3, 4, 0.3)], "given", per_module=True)
    learned = logits_of(moved(model, 1.0), use_cache=False)
    fused = lm.fuse_mergeable_layers(model)
    assert len(decoder_layers(fused)) == 4
    assert_fused_is(fused, learned, tmp_path)


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_of_several_fine_tunes_are_blended_fused_saved_and_read(kind, tmp_path):
    tunes = [deep(kind) for _ in range(3)]
    for seed, tune in enumerate(tunes):
        perturb(tune, 0.2, seed)
    before = [{name: tensor.clone() for name, tensor in tune.state_dict().items()} for tune in tunes]
    mean = mean_model(tunes)
    made = with_block_layer(mean, [1, 2, 3], tunes, rank=2)
    whole = remove_layers(cuts.shared_copy(mean), [2, 3])
    assert_close(logits_of(made, use_cache=False), logits_of(whole, use_cache=False), atol=1e-5, rtol=0)
    assert {len(leaf.masks[name]) for leaf in block_leaves(made) for name in leaf.masks} == {3, 9}
    learned = logits_of(moved(made), use_cache=False)
    assert not torch.allclose(learned, logits_of(whole, use_cache=False), atol=1e-3)
    assert_fused_is(fuse_block_layer(made), learned, tmp_path)
    assert all(torch.equal(held[name], tensor) for tune, held in zip(tunes, before) for name, tensor in tune.state_dict().items())


def test_each_fine_tune_teaches_its_own_rows():
    "A student that begins as one of two teachers has nothing to learn from that one's rows, and something from the other's."
    tunes = [tiny_model("llama", num_hidden_layers=6, seed=seed).requires_grad_(False) for seed in (0, 1)]
    apart = []
    for source in (0, 1):
        (batch,) = batches_of(1, top=60)
        patient = block_training.Patient(cuts.shared_copy(tunes[0]), tunes)
        with student.studying(patient):
            found = patient(**student.tidy({**batch, "source": torch.full((2,), source)}), objective=block_training.Objective({"kl": 1.0}))
        apart.append(found["loss"].item())
    assert apart[0] == pytest.approx(0, abs=1e-6) and apart[1] > 1e-3


@pytest.mark.parametrize("kind", MAPPED)
def test_a_folded_map_is_the_map(kind):
    model, batches = deep(kind), batches_of()
    (call, *_) = calls = linear_maps.catch_calls(model, batches, 2, 4)
    layer = decoder_layers(model)[2]
    writer = linear_maps.find_writer(layer, call)
    matrix = linear_maps.least_squares_map(linear_maps.map_rows(layer, writer, calls))
    rows = linear_maps.map_rows(layer, writer, [call])
    short = linear_maps.map_block(model, [3, 4], batches)
    with torch.no_grad():
        made = call.again(decoder_layers(short)[2])
    assert_close(made.flatten(0, 1), rows.rest + rows.added @ matrix.T, atol=1e-4, rtol=1e-4)
    assert (made - call.left).norm() < (call.again(layer) - call.left).norm()


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_no_map_is_written_behind_a_norm(kind, caplog):
    model, batches = deep(kind), batches_of()
    with pytest.raises(ValueError, match="a map cannot be written into it"):
        linear_maps.map_block(model, [3, 4], batches)
    begun = block_training.begin_block(model, [2, 3, 4], batches, [], rank=2)
    assert_close(logits_of(begun.student), logits_of(remove_layers(cuts.shared_copy(model), [3, 4])))


SHARED = dict(layer_types=["sliding_attention", "full_attention"] * 4, num_kv_shared_layers=2)


@pytest.mark.parametrize(
    ("kind", "gone", "more", "said"),
    [
        ("rwkv", [2], {}, "rescale_every=6"),
        ("gemma3n_text", [1, 2], SHARED, "embed_tokens_per_layer.weight would have another shape"),
        ("gemma4_text", [1, 2], SHARED, "cannot be read again with fewer layers: .*per_layer_config"),
        ("llama4_text", [2], {}, "becomes layer"),
        ("cohere", [2], {}, None),
    ],
)
def test_layers_that_would_be_others_under_another_number_are_refused(kind, gone, more, said):
    model = deep(kind, len(more.get("layer_types", "123456")), **more)
    if said is None:
        check_depth_free(model, gone)
        return
    with pytest.raises(ValueError, match=said):
        check_depth_free(model, gone)


def test_a_setting_that_goes_by_the_number_is_seen(monkeypatch):
    "Shapes are the same; the layer that would be read has another window."
    model = tiny_model("qwen2", num_hidden_layers=6, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    check_depth_free(model, [1])  # the config says which layers slide
    said = type(model.config).to_dict
    monkeypatch.setattr(type(model.config), "to_dict", lambda self: {k: v for k, v in said(self).items() if k != "layer_types"})
    with pytest.raises(ValueError, match="layer 3 becomes layer 2.*compute something else"):
        check_depth_free(model, [1])


def test_modules_that_call_their_number_otherwise_are_renumbered():
    model = remove_layers(deep("gpt_neo"), [2, 3])
    assert [layer.attn.layer_id for layer in decoder_layers(model)] == [0, 1, 2, 3]


def test_cuts_by_hand():
    "A layer that does nothing has no influence, costs nothing, and is the block of the smallest angle."
    model = tiny_model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for name, parameter in decoder_layers(model)[3].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    batches = batches_of(top=60)
    assert all(cuts.CUTS[name](model, 1, batches) == [3] for name in ("block", "influence"))
    assert cuts.text_loss(remove_layers(cuts.shared_copy(model), [3]), batches) == pytest.approx(cuts.text_loss(model, batches), abs=1e-6)
    losses = [cuts.text_loss(remove_layers(cuts.shared_copy(model), [i]), batches) for i in range(6)]
    assert cuts.greedy_layers(model, 1, batches) == [losses.index(min(losses))]
    assert cuts.CUTS["last"](model, 2, batches) == [4, 5]


def test_padding_is_not_fitted_on():
    "Neither in the rows of a map nor in the loss on hidden states."
    model, (batch,) = tiny_model("llama", num_hidden_layers=6), batches_of(1, top=60)
    batch["attention_mask"][0, 8:] = 0
    (call,) = linear_maps.catch_calls(model, [batch], 2, 3)
    writer = linear_maps.find_writer(decoder_layers(model)[2], call)
    assert len(linear_maps.map_rows(decoder_layers(model)[2], writer, [call]).rest) == 8 + 12
    spoiled = call.left.clone()
    spoiled[0, 8:] += 100
    assert block_training.missed(spoiled, call) == 0


@pytest.fixture
def made(tmp_path):
    "The bundled deep model and some text."
    folder = bundled_path("models/deep")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return model, list(lm.prepare_calibration_data(tokenizer, bundled_path("tasks/rewrite"), 24, 4, 48))


FEW = block_training.BlockSteps(rank=4, hidden_steps=6, steps=6, learning_rate=3e-3)


def test_a_learned_block_begins_as_the_map_and_never_ends_worse(made):
    model, batches = made
    start = linear_maps.map_block(model, [5, 6], batches[:4])
    wild = dataclasses.replace(FEW, learning_rate=1.0, hidden_steps=0)
    short = block_training.learn_block(model, [4, 5, 6], batches[:4], batches[4:], wild, eval_steps=1, progress=False).model
    with torch.no_grad():
        apart = [divergence(m, model, batches[4:]) for m in (short, start)]
    assert apart[0] <= apart[1] + 1e-5


def divergence(model, teacher, batches):
    "Mean KL of the teacher's predictions to the model's."
    sums = []
    for batch in batches:
        student, wanted = (m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1) for m in (model, teacher))
        scored = batch["labels"][:, 1:] != -100
        sums.append((wanted.exp() * (wanted - student)).sum(-1)[:, :-1][scored])
    return torch.cat(sums).mean().item()


def test_a_learned_block_that_was_stopped_goes_on_to_the_same(made, tmp_path):
    model, batches = made

    def learn(folder, resume=False, on_step=None):
        return block_training.learn_block(
            model, [4, 5, 6], batches[:4], batches[4:], FEW, folder=tmp_path / folder, resume=resume, on_step=on_step, eval_steps=2, save_steps=2, progress=False
        ).model

    whole = learn("whole")

    def ask(step, loss):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        learn("cut", on_step=ask)
    again = learn("cut", resume=True)
    for one, other in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, other)


class Killed(BaseException):
    "What a run dies of."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_map_and_residuals_are_all_learned(made, dtype):
    model, batches = made
    model = model.to(dtype)
    begun = block_training.begin_block(model, [4, 5, 6], batches[:2], [], rank=4)
    before = {name: parameter.clone() for name, parameter in begun.student.named_parameters() if parameter.requires_grad}
    objective = block_training.HiddenObjective(calls=begun.calls, place=4)
    begun.loop(objective, block_training.numbered(batches[:2]), [], student.rate_of(3, 1e-2), None, "hidden", progress=False)
    after = dict(begun.student.named_parameters())
    assert {name.rpartition(".")[2] for name in before} >= {"weight", "matrix", "left", "right"}
    assert all(parameter.dtype == torch.float32 and not torch.equal(parameter, after[name]) for name, parameter in before.items())
    assert next(fuse_block_layer(begun.student).parameters()).dtype == dtype


def test_what_an_architecture_does_not_allow_is_left_out_of_a_comparison(made, caplog):
    caplog.set_level(logging.WARNING, "merge_lab.strategies")
    model, batches = deep("gemma2"), batches_of()
    tokenizer = load_tokenizer(bundled_path("models/deep"))
    table = strategies.compare_variants(model, tokenizer, [(1, 2, 0.5)], lambda: batches, ["linear map for a block", "remove the last layers"])
    assert list(table.index) == ["original", "remove the last layers"] and "linear map for a block: left out" in caplog.text


def test_every_strategy_of_the_command_line_makes_a_model_that_loads(tmp_path):
    for name in lm.COMMANDED:
        config = lm.LayerMergeConfig(
            strategy=name, n_pairs=2, data_dir=str(bundled_path("tasks/rewrite")), num_samples=8, max_length=64, max_steps=1, hidden_steps=2, block_steps=2,
            block_rank=2, block_tries=1, heal_steps=1, held_out_rows=4, output_dir=str(tmp_path / name), dtype="float32", similarity_method="cka", search_start=False,
        )  # fmt: skip
        result = lm.run(config, progress=False)
        read = load_model(result.folder / "merged")
        assert len(decoder_layers(read)) == 10 and result.table.loc["this run", "seconds"] > 0
        assert_close(read(IDS).logits, result.model(IDS).logits, atol=1e-5, rtol=0)
        assert "2 layers shorter" in (result.folder / "merged/README.md").read_text() and str(result)


def test_healing_leaves_the_teacher_alone(tmp_path):
    "A shorter model shares its tensors with the original, and an adapter is merged in place."
    config = lm.LayerMergeConfig(
        strategy="remove-last", n_pairs=1, data_dir=str(bundled_path("tasks/rewrite")), num_samples=8, max_length=64, heal_steps=2, held_out_rows=4,
        output_dir=str(tmp_path / "run"), similarity_method="cka", dtype="float32",
    )  # fmt: skip
    made = lm.prepare(config)
    before = copy.deepcopy(made.model.state_dict())
    short = strategies.shorten(cuts.shared_copy(made.model), made.pairs, strategies.STRATEGIES["remove-last"], made.loader())[0]
    lm.heal(copy.deepcopy(short), made.loader(), 2, teacher=made.model, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())


def test_the_rate_of_healing_falls_to_nothing(monkeypatch):
    "And no step is made at a rate of nothing, however few there are."
    rates = []

    class Noted(student.StudentTrainer):
        def training_step(self, *args, **kwargs):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(student, "StudentTrainer", Noted)
    short, whole = (tiny_model("llama", num_hidden_layers=n) for n in (2, 3))
    lm.heal(copy.deepcopy(short), batches_of(8, top=60), 24, teacher=whole, progress=False)
    assert max(rates) == rates[1] == 1e-3 and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 2e-5
    rates.clear()
    lm.heal(short, batches_of(8, top=60), 2, teacher=whole, progress=False)
    assert rates[0] == 1e-3


class Scripted(HeldOut):
    "Held-out rows whose losses are known beforehand."

    def __call__(self, merger, objective):
        loss = self.losses.pop(0)
        return {"loss": loss, "source_0": loss}


@pytest.mark.parametrize(("losses", "halved"), [([0.324, 0.326, 0.325, 0.31, 0.3], False), ([0.324, 0.35, 0.35, 0.31, 0.3], True)])
def test_healing_may_begin_with_a_little_noise(losses, halved, caplog):
    "What a block has learned is at its best on held-out rows; a rate that is halved for a few thousandths leaves nothing to heal with."
    caplog.set_level(logging.WARNING, "merge_lab")
    held = student.held_batches(batches_of(1, top=60))
    scripted = Scripted(held.batches, student.first_of, 1, 0)
    scripted.losses = losses
    short, whole = (tiny_model("llama", num_hidden_layers=n) for n in (2, 3))
    lm.heal(short, batches_of(8, top=60), 8, teacher=whole, progress=False, held_out=scripted, eval_steps=10, save_steps=0)
    assert ("learning rate 0.0005 instead of 0.001" in caplog.text) == halved


def test_pairs_by_hand_are_for_pairs(tmp_path):
    with pytest.raises(ValueError, match="pairs by hand are for 'pairs'"):
        lm.LayerMergeConfig(strategy="block", merge_pairs=["3,4"], output_dir=str(tmp_path / "run"))


def test_a_run_of_a_block_that_was_stopped_goes_on(tmp_path):
    options = dict(
        strategy="block", n_pairs=2, data_dir=str(bundled_path("tasks/rewrite")), num_samples=16, max_length=64, hidden_steps=3, block_steps=6, block_rank=2, block_tries=2,
        held_out_rows=4, similarity_method="cka", dtype="float32", eval_steps=2, save_steps=2,
    )  # fmt: skip
    whole = lm.run(lm.LayerMergeConfig(output_dir=str(tmp_path / "whole"), **options), progress=False)
    with pytest.raises(Killed):
        lm.run(lm.LayerMergeConfig(output_dir=str(tmp_path / "cut"), **options), on_step=die_at_three, progress=False)
    again = lm.run(lm.LayerMergeConfig(output_dir=str(tmp_path / "cut"), resume=True, **options), progress=False)
    files = [(run.folder / "merged/model.safetensors").read_bytes() for run in (whole, again)]
    assert files[0] == files[1] and json.loads((again.folder / "held_out.json").read_text())["looks"]
    assert whole.coefficients.equals(again.coefficients)


def die_at_three(step, loss):
    if step == 3:
        raise Killed


FAST = dict(num_samples=8, max_length=64, hidden_steps=2, block_steps=2, block_rank=2, block_tries=1, held_out_rows=4, similarity_method="cka", dtype="float32")


def test_what_a_user_gets_is_a_learned_block_unless_an_option_of_pairs_is_given():
    ways = {"": "block", "max_steps=9": "pairs", "merge_pairs=['3,4']": "pairs", "num_samples=9": "block", "patience=9": "block", "strategy='map', learning_rate=1.0": "map"}
    for given, way in ways.items():
        assert eval(f"lm.LayerMergeConfig({given})").way == way, given


@pytest.mark.parametrize("strategy", ["block", "map", "remove-last"])
def test_more_than_half_of_the_layers_go_where_no_pairs_are_needed(strategy, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "merge_lab.strategies")
    options = dict(data_dir=str(bundled_path("tasks/rewrite")), n_pairs=8, strategy=strategy, compare=strategy == "remove-last", **FAST)
    result = lm.run(lm.LayerMergeConfig(output_dir=str(tmp_path / "run"), **options), progress=False)
    assert len(decoder_layers(load_model(result.folder / "merged"))) == 4
    card = (result.folder / "merged/README.md").read_text()
    assert "8 layers shorter" in card and "Adapters that were trained on the original do not fit" in card
    if options["compare"]:
        assert "remove the least influence" in result.table.index and "uniform 0.5: left out. 8 layers are to go, and there are 0 pairs" in caplog.text


@pytest.mark.parametrize("strategy", ["pairs", "remove-same"])
def test_pairs_have_room_for_half_of_the_layers(strategy, tmp_path):
    with pytest.raises(ValueError, match="n_pairs=7: expected 1 to 6; each of 12 layers is in one pair at most"):
        lm.prepare(lm.LayerMergeConfig(data_dir=str(bundled_path("tasks/rewrite")), n_pairs=7, strategy=strategy, output_dir=str(tmp_path / "run"), **FAST))


def test_a_run_goes_on_in_the_way_that_it_began(tmp_path):
    options = dict(data_dir=str(bundled_path("tasks/rewrite")), output_dir=str(tmp_path / "run"), n_pairs=1, **FAST)
    lm.run(lm.LayerMergeConfig(**options), progress=False)
    with pytest.raises(ValueError, match=r"strategy='pairs' \(max_steps\): the run in .* was begun by 'block'. Give --strategy block"):
        lm.run(lm.LayerMergeConfig(**options, resume=True, max_steps=9), progress=False)
    again = lm.run(lm.LayerMergeConfig(**options, resume=True, max_steps=9, strategy="block"), progress=False)
    assert len(again.coefficients) and Run(again.folder).wanted == FAST["block_steps"]


def test_what_a_run_reads_is_not_written_over(tmp_path):
    options = dict(data_dir=str(bundled_path("tasks/rewrite")), output_dir=str(tmp_path / "run"), strategy="remove-last", n_pairs=1, **FAST)
    lm.run(lm.LayerMergeConfig(**options), progress=False)
    (tmp_path / "run/other.txt").write_text("Text that is held out.")
    config = lm.LayerMergeConfig(**options, overwrite=True, more_eval_text=[str(tmp_path / "run/other.txt")])
    with pytest.raises(ValueError, match="other.txt"):
        lm.run(config, progress=False)
    assert (tmp_path / "run/other.txt").exists() and (tmp_path / "run/merged").exists()


def test_a_run_of_several_fine_tunes_is_shorter_and_taught_by_each(tmp_path, monkeypatch):
    paths = [str(bundled_path(f"models/{name}")) for name in ("rewrite", "summarize")]
    tasks = [str(bundled_path(f"tasks/{name}")) for name in ("rewrite", "summarize")]
    given = dict(model_path=paths[0], other_models=paths[1:], data_dir=tasks[0], other_data=tasks[1:], n_pairs=1, heal_steps=2, compare=True, **FAST)
    monkeypatch.setattr(lm, "UNTRAINED", {name: row for name, row in lm.UNTRAINED.items() if row.cut == "last"})
    result = lm.run(lm.LayerMergeConfig(output_dir=str(tmp_path / "run"), **given), progress=False)
    depth = len(decoder_layers(load_model(paths[0])))
    assert len(decoder_layers(load_model(result.folder / "merged"))) == depth - 1 and set(result.coefficients["component"]) == {0, 1}
    assert set(result.history) >= {"loss_source_0", "loss_source_1"} and result.table.loc["this run", "heal_seconds"] > 0
    healed = [json.loads(line) for line in (result.folder / "healing.jsonl").read_text().splitlines()]
    assert {"loss_source_0", "loss_source_1"} <= set(healed[0]) | set(healed[1])
    with pytest.raises(ValueError, match="expected data of every fine-tune"):
        lm.LayerMergeConfig(**given | dict(other_data=None))
    with pytest.raises(ValueError, match="blended by 'block' only"):
        lm.LayerMergeConfig(**given, strategy="map")


def test_healing_is_compared_and_has_a_cost_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "UNTRAINED", {name: row for name, row in lm.UNTRAINED.items() if row.cut == "last"})
    (tmp_path / "text.txt").write_text("\n\n".join(f"{w} words of a text that is held out. " * 6 for w in ("Some", "Other", "More", "Few", "No")))
    options = dict(data_dir=str(bundled_path("tasks/rewrite")), strategy="remove-last", n_pairs=1, heal_steps=2, compare=True, eval_text=str(tmp_path / "text.txt"), more_eval_text=[str(tmp_path / "text.txt")])
    table = lm.run(lm.LayerMergeConfig(output_dir=str(tmp_path / "run"), **options, **FAST), progress=False).table
    assert list(table.index) == ["original", "remove the last layers", "remove the last layers, healed", "this run"]
    assert (table["heal_seconds"] > 0).tolist() == [False, False, True, True] and (table["cache_agrees"] == 1).all()
    assert {"perplexity", "cloze", "seconds_per_new_token", "weight_bytes", "cache_bytes_per_token"} <= set(table)


def test_an_order_of_layers_that_others_take_for_another_is_told(caplog):
    kinds = {"gemma3_text": 6, "smollm3": 4, "gemma2": 2, "llama": 1}
    for kind, period in kinds.items():
        model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shrunk(CONFIG_MAPPING[kind]) | dict(num_hidden_layers=12, layer_types=None)))
        assert (period_of(model), unusual_order(model)) == (period, [])
        gone = remove_layers(copy.deepcopy(model), [1])
        lm.tell_unusual(gone, [], period)
        assert bool(unusual_order(gone)) == (period > 1) == (f"multiple of {period} layers" in caplog.text), kind
        assert not unusual_order(remove_layers(model, range(1, 1 + period)))
        caplog.clear()


def test_what_is_as_long_as_the_model_is_deep_by_chance_is_not_of_its_layers():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shrunk(transformers.LlamaConfig) | dict(num_hidden_layers=3, eos_token_id=[1, 2, 3])))
    model.config.architectures = ["LlamaForCausalLM"]
    short = remove_layers(model, [0])
    assert short.config.eos_token_id == [1, 2, 3] and not unusual_order(short)
    short = remove_layers(short, [0])  # as many layers as architectures
    assert short.config.architectures == ["LlamaForCausalLM"] and not unusual_order(short)


def test_pairs_are_chosen_by_what_they_cost_where_similarity_cannot_tell(monkeypatch):
    model, tokenizer = load_model(bundled_path("models/deep"), dtype="float32"), load_tokenizer(bundled_path("models/deep"))
    batches = list(prepare_calibration_data(tokenizer, bundled_path("tasks/rewrite"), 8, 4, 64))
    similarity = pd.DataFrame(0.5, range(12), range(12))
    similarity.loc[3, 4] = 0.52  # by the noise of an estimate; 3 and 4 were not grown from one layer
    config = lm.LayerMergeConfig(strategy="pairs", n_pairs=1)
    likely = lm.choose_pairs(config, similarity, [])
    chosen = lm.best_pairs(dataclasses.replace(config, pair_tries=11), model, batches, similarity, likely)
    assert [pair[:2] for pair in likely] == [(3, 4)]
    costs = {}
    for into in range(11):
        blend = lm.replace_layers_with_mergeable(shared_copy(model), [(into, into + 1)], "uniform")
        costs[into] = min(lm.mean_loss(set_shares(blend, share), batches) for share in (0.02, 0.5, 0.98))
    assert chosen[0][:2] == (min(costs, key=costs.get), min(costs, key=costs.get) + 1) and costs[chosen[0][0]] < costs[3]
    assert lm.best_pairs(dataclasses.replace(config, pair_tries=1), model, batches, similarity, likely) == likely
    monkeypatch.setattr(lm, "can_merge", lambda model, pairs, strategy: pairs[0][0] > 9)
    assert [pair[:2] for pair in lm.best_pairs(dataclasses.replace(config, pair_tries=11), model, batches, similarity, likely)] == [(10, 11)]


def set_shares(model, share: float):
    for layer in lm.mergeable_layers(model).values():
        lm.set_alpha(layer, share)
    return model


def test_questions_made_of_text_have_one_right_end():
    tokenizer = load_tokenizer(bundled_path("models/deep"))
    texts = [" ".join(f"{word}{i}" for i in range(40)) for word in ("a", "b", "c", "d", "e")]
    copies = [f"other {text.partition(' ')[2]}" for text in texts]  # another beginning, the same end
    questions = depth_scores.cloze_questions([*texts, *copies], 9, words=(8, 4))
    assert len(questions) == 5 and len({right for *_, right in questions}) > 1 and all(len(set(ends)) == 4 for _, ends, _ in questions)
    assert {begun + ends[right] for begun, ends, right in questions} == {" ".join(text.split()[:12]) for text in copies}
    with pytest.raises(ValueError, match="positions"):
        depth_scores.cloze_accuracy(tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8), tokenizer, questions)


def test_likeliness_counts_per_token_and_not_in_all(monkeypatch):
    "Of two ends that are as likely per token, the long one is less likely as a whole, and no worse an answer."
    tails = [[1] * 4, [1], [1], [1]]
    monkeypatch.setattr(depth_scores, "option_tails", lambda *given: ([5], tails))
    monkeypatch.setattr(depth_scores, "option_scores", lambda *given: [[-2.0, -1.0, -1.0, -1.0]])
    assert depth_scores.cloze_accuracy(tiny_model("llama"), load_tokenizer(bundled_path("models/deep")), [("", ["w x y z", "a", "b", "c"], 0)]) == 1
