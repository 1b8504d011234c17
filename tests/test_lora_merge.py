"""Blended adapters: equal to peft as components, equal to dense arithmetic as a blend, never dense themselves."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from merge_lab.adapters import check_adapter, load_adapter, load_base, make_lora_config, probe_logits, quiet_peft, read_adapters
from merge_lab.chat import chat_row, load_task, write_jsonl
from merge_lab.checkpoints import load_tokenizer
from merge_lab.cli import main
from merge_lab.evaluation import evaluate_tasks
from merge_lab.masks import MergeState, MODES
from merge_lab.run_folder import begin_run, bundled_path, RunInterrupted
from merge_lab.systems.lora import LoRAPipelineConfig, run as train_adapter
from merge_lab.systems.lora_merge import AdapterLinear, AdapterMerger, base_path, explain_baselines, LoRAMergeConfig, peft_baselines, run, save_adapter
from merge_lab.tinylm import save_tiny, tiny_model
from small_runs import SignalAt


pytestmark = pytest.mark.usefixtures("nothing_deprecated")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def adapter(folder, seed, **options):
    "Save a random adapter of the base that is there."
    torch.manual_seed(seed)
    base = load_base("base", "cpu")
    with quiet_peft():
        model = get_peft_model(base, make_lora_config(base, options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def random_merger(architecture="llama", mode="vector_output", rslora=True, **options):
    "A merger of two unlike adapters with random alphas."
    save_tiny(tiny_model(architecture), "base")
    adapter("one", 1, r=4, lora_alpha=8, use_rslora=rslora)
    adapter("two", 2, r=2, lora_alpha=6, target_modules="aggressive")
    config = dict(base_model="base", adapters=["one", "two"], mode=mode, device="cpu")
    merger = AdapterMerger.from_config(LoRAMergeConfig(**config | options))
    torch.manual_seed(3)
    for _, leaf, key in merger.masked_parameters():
        leaf.set_alphas(key, [torch.rand(leaf.masks[key].shape[1:]) for _ in range(2)])
    return merger


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_components_blend_and_exports_agree(architecture, mode):
    merger = random_merger(architecture, mode)
    for i, folder in enumerate(["one", "two"]):
        alone = load_adapter(load_base("base", "cpu"), folder)
        with merger.as_component(i):
            assert (probe_logits(merger.model) - probe_logits(alone)).abs().max() < 1e-4
    wanted = probe_logits(merger.model)
    dense = load_base("base", "cpu")
    for name, leaf in merger.leaves().items():
        if isinstance(leaf, AdapterLinear):
            dense.get_submodule(name).weight.data = leaf.tensor("weight")
    assert (probe_logits(dense) - wanted).abs().max() < 1e-4
    exported = load_adapter(load_base("base", "cpu"), save_adapter(merger, "blend"))
    assert (probe_logits(exported) - wanted).abs().max() < 1e-4
    assert merger.save_merged("plain")["max_logit_difference"] < 1e-4
    assert (probe_logits(load_base("plain", "cpu")) - wanted).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore::peft.PeftWarning", "ignore:Adapter 'default'")
@pytest.mark.parametrize(
    "options",
    [
        dict(lora_bias=True),
        dict(alora_invocation_tokens=[1, 2]),
        dict(layer_replication=[[0, 2], [1, 2]]),
        dict(trainable_token_indices=[1]),
        dict(bias="all"),
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="olora"),
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_that_are_more_than_deltas_are_refused_by_name(options):
    save_tiny(tiny_model(), "base")
    adapter("one", 1, r=2)
    adapter("more", 2, r=2, **options)
    with pytest.raises(
        ValueError, match=f"more: with {next(iter(options))}=.* cannot be blended"
    ):
        read_adapters(load_base("base", "cpu"), ["one", "more"])


@pytest.mark.parametrize(
    "name",
    [
        "kasa_config",
        "monteclora_config",
        "velora_config",
        "use_bdlora",
        "use_qalora",
        "arrow_config",
        "target_parameters",
    ],
)
def test_variants_that_peft_may_have_are_refused_by_name(name):
    save_tiny(tiny_model(), "base")
    adapter("more", 2, r=2)
    file = Path("more/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: {"any": 1}}))
    with pytest.raises(ValueError, match=f"more: with {name}="):
        check_adapter("more")


def test_the_exported_adapter_needs_plain_peft_only(forked):
    merger = random_merger()
    save_adapter(merger, "blend")
    torch.save(probe_logits(merger.model), "wanted.pt")
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained('base', dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(base, 'blend').eval()\n"
        "ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))\n"
        "gap = (model(input_ids=ids).logits - torch.load('wanted.pt', weights_only=True)).abs().max()\n"
        "assert 'merge_lab' not in sys.modules and gap < 1e-4, gap\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def leaf_and_dense(mode, dtype=torch.float64):
    "A leaf, and the same function with dense deltas and alphas of its own."
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, dtype=dtype).requires_grad_(False)
    factors = [
        (torch.randn(r, 24, dtype=dtype), torch.randn(40, r, dtype=dtype))
        for r in (3, 2)
    ]
    leaf = AdapterLinear(linear, factors, MergeState(), mode).to(dtype)
    shape = leaf.masks["weight"].shape[1:]
    leaf.set_alphas("weight", [torch.rand(shape, dtype=dtype) for _ in range(2)])
    alphas = [a.detach().clone().requires_grad_() for a in leaf.alphas("weight")]

    def dense(x):
        weight = linear.weight + sum(a * (b @ d) for a, (d, b) in zip(alphas, factors))
        return F.linear(x, weight, linear.bias)

    return leaf, dense, alphas


@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_equal_dense_arithmetic(mode):
    leaf, dense, alphas = leaf_and_dense(mode)
    x = torch.randn(5, 7, 24, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 7, 40, dtype=torch.float64)
    (dx_dense, *wanted) = torch.autograd.grad((dense(x) * y).sum(), [x, *alphas])
    dx, masks = torch.autograd.grad((leaf(x) * y).sum(), [x, leaf.masks["weight"]])
    assert torch.allclose(leaf(x), dense(x), atol=1e-10)
    assert torch.allclose(dx, dx_dense, atol=1e-10)
    for got, want in zip(masks, wanted):
        assert torch.allclose(got, want, atol=1e-9)


class Shapes(TorchDispatchMode):
    "Shapes of all tensors that operations put out."

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        view = function.is_view
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not view:
                self.seen.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_size_of_the_weight_is_made(mode):
    leaf, dense, _ = leaf_and_dense(mode)
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    sizes = {(40, 24), (24, 40)}
    with Shapes() as shapes:
        leaf(x).sum().backward()
    assert shapes.seen and not shapes.seen & sizes
    with Shapes() as shapes:
        dense(x).sum().backward()
    assert shapes.seen & sizes


@pytest.mark.parametrize("share, masks", [("adapter", 1), ("layer", 2), ("module", 14)])
def test_shared_scalars_are_saved_once_and_come_back(share, masks):
    merger = random_merger(mode="scalar", share=share)
    assert len(merger.mask_state()) == masks
    merger.save_pretrained("masks")
    again = AdapterMerger.from_pretrained("masks")
    assert torch.equal(probe_logits(again.model), probe_logits(merger.model))
    merger.model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    trained = [p for p in merger.parameters() if p.requires_grad]
    assert len(trained) == masks and all(p.grad is not None for p in trained)


def test_alpha_one_is_the_sum_and_one_hot_is_the_adapter():
    merger = random_merger(mode="scalar", share="adapter", rslora=False)
    merger.init_masks({"strategy": "uniform", "factors": [1.0, 1.0]})
    ((_, cat),) = peft_baselines("base", ["one", "two"], methods=["cat"], device="cpu")
    assert (probe_logits(cat) - probe_logits(merger.model)).abs().max() < 1e-4
    merger.init_masks({"strategy": "uniform", "factors": [0.0, 1.0]})
    wanted = probe_logits(merger.model)
    with merger.as_component(1):
        assert torch.allclose(probe_logits(merger.model), wanted, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_fair_combination_of_peft_is_the_average_of_the_deltas(rslora):
    merger = random_merger(mode="scalar", share="adapter", rslora=rslora)
    merger.init_masks({"strategy": "uniform", "factors": [0.5, 0.5]})
    ((_, fair),) = peft_baselines("base", ["one", "two"], methods=["average"], device="cpu")
    assert (probe_logits(fair) - probe_logits(merger.model)).abs().max() < 1e-4
    table = explain_baselines("base", ["one", "one"], ["average", "linear", "cat"])  # rank 4
    wanted = [1, 2 * 4**0.5, 8**0.5] if rslora else [1, 2, 1]
    assert table.times.tolist() == pytest.approx(wanted, rel=1e-4)
    assert table.distance["average"] == 0 and table.why.str.len().min() > 20


def test_dora_has_no_average_among_adapters():
    random_merger()
    adapter("three", 1, r=4, lora_alpha=8, use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        next(peft_baselines("base", ["one", "three"], methods=["average"], device="cpu"))


def ready(**options):
    "Two adapters, their data, and a config of a short run."
    random_merger()
    for name, answer in (("one", "the cat."), ("two", "a dog ran.")):
        write_jsonl(f"data/{name}/train.jsonl", [chat_row("who ran?", answer)] * 8)
    short = dict(max_steps=15, per_device_train_batch_size=4, learning_rate=0.1)
    short |= dict(adapters=["one", "two"], datasets=["data/one", "data/two"])
    short |= dict(base_model="base", device="cpu", output_dir="run")
    return LoRAMergeConfig(**short | options)


def test_a_run_moves_masks_towards_the_right_adapter():
    result = run(ready())
    assert result["history"].loss.iloc[-1] < 0.8 * result["history"].loss.iloc[0]
    exported = load_adapter(load_base("base", "cpu"), "run/adapter")
    merger = result["merger"].eval()
    assert (probe_logits(exported) - probe_logits(merger.model)).abs().max() < 1e-4
    again = AdapterMerger.from_pretrained("run/masks")
    assert torch.equal(probe_logits(again.model), probe_logits(merger.model))


def test_an_interrupted_run_goes_on_to_the_same_masks():
    config = ready(max_steps=4)
    with pytest.raises(RunInterrupted, match="stopped after step 2 of 4"):
        run(config, [SignalAt(1)])
    with pytest.raises(ValueError, match="mode='scalar', but the run in run"):
        run(dataclasses.replace(config, resume=True, mode="scalar"))
    resumed = run(dataclasses.replace(config, resume=True))
    whole = run(dataclasses.replace(config, output_dir="whole"))
    assert resumed["history"].loss.tolist() == whole["history"].loss.tolist()
    masks = [result["merger"].mask_state() for result in (resumed, whole)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])


def test_recomputed_activations_change_no_loss():
    config = ready(max_steps=3, constrain_mode="sum1")
    plain = run(config)["history"].loss
    thrifty = dict(gradient_checkpointing=True, output_dir="thrifty")
    result = run(dataclasses.replace(config, **thrifty))
    assert any(m.gradient_checkpointing for m in layers_of(result["merger"].model))
    assert torch.allclose(torch.tensor(plain), torch.tensor(result["history"].loss))


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(adapters=["one", "nowhere"]), "nowhere has no adapter_config.json"),
        (dict(base_model="other"), "one was trained on base, whose weights differ"),
        (dict(base_model="wide"), "an adapter of another base than wide"),
        (dict(datasets=["data/one", "data/three"]), "data/three"),
        (dict(initial_alpha=1.5, constrain_mode="01"), "alpha=1.5"),
        (dict(adapters=["one", "run"]), "overwrite would clear run"),
        (dict(optim="adamm"), "no such optimizer"),
    ],
)
def test_what_cannot_run_clears_nothing(options, says):
    config = ready(overwrite=True, **options)
    save_tiny(tiny_model(seed=7), "other")
    save_tiny(tiny_model(hidden_size=64), "wide")
    begin_run(config)
    adapter("run", 3, r=2)
    held = {p.name for p in Path("run").iterdir()}
    with pytest.raises((ValueError, OSError), match=says):
        run(config)
    assert {p.name for p in Path("run").iterdir()} == held


@pytest.mark.parametrize("held", ["base", "template"])
def test_base_and_template_in_the_folder_are_not_cleared(held):
    "The base that the first adapter names, and a chat template that is a file."
    config = ready(overwrite=True, output_dir="run")
    begin_run(config)
    if held == "base":
        Path("base").rename("run/base")
        for folder in ("one", "two"):
            file = Path(folder, "adapter_config.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "run/base"}))
        options, kept = dict(base_model=""), Path("run/base/config.json")
    else:
        kept = Path("run/mine.jinja")
        kept.write_text("{{ messages }}")
        options = dict(chat_template=str(kept))
    with pytest.raises(ValueError, match="overwrite would clear run, which holds run/"):
        run(dataclasses.replace(config, **options))
    assert kept.exists()


def test_a_run_of_the_pipeline_stands_for_its_adapter_and_names_its_base():
    random_merger()
    adapter("lora/adapter_checkpoint", 3, r=2)
    config = LoRAMergeConfig(adapters=["lora", "one"], device="cpu")
    assert base_path(config) == "base"
    merger = AdapterMerger.from_config(config)
    assert merger.names == ["lora", "one"]
    with merger.as_component(0):
        alone = load_adapter(load_base("base", "cpu"), "lora/adapter_checkpoint")
        assert torch.allclose(
            probe_logits(merger.model), probe_logits(alone), atol=1e-4
        )


def test_nothing_is_named_twice():
    with pytest.raises(ValueError, match="datasets=.* named twice"):
        LoRAMergeConfig(adapters=["a", "b"], datasets=["c", "c"])


def test_every_adapter_needs_its_data():
    with pytest.raises(ValueError, match="2 adapters and 1 datasets"):
        LoRAMergeConfig(adapters=["a", "b"], datasets=["c"])


def test_a_base_that_is_not_there_is_not_replaced_by_another(tmp_path):
    from merge_lab.systems.lora_merge import base_path

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    config = folder / "adapter_config.json"
    config.write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "/gone/other-base"}'
    )
    with pytest.raises(ValueError, match="names '/gone/other-base' as its base"):
        base_path(LoRAMergeConfig(adapters=[str(folder), "another"]))
    config.write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "/gone/models/base"}'
    )
    assert base_path(LoRAMergeConfig(adapters=[str(folder), "another"])).endswith(
        "models/base"
    )


def scores(model, questions):
    "Exact match on each task."
    tokenizer = load_tokenizer(bundled_path("models/base"))
    return evaluate_tasks(model, tokenizer, questions, progress=False).exact_match


def adapter_of(task, path, steps):
    "An adapter of the bundled base, trained for real; its merged model."
    adapter = dict(r=16, target_modules="aggressive", lora_dropout=0.0)
    pace = dict(max_steps=steps, batch_size=16, gradient_accumulation_steps=1)
    rate = dict(learning_rate=6e-3, lr_scheduler_type="cosine", warmup_steps=10)
    where = dict(datasets=[path], output_dir=task, device="cpu")
    train_adapter(
        LoRAPipelineConfig(**adapter, **pace, **rate, **where), disable_tqdm=True
    )
    return load_base(f"{task}/final_merged", "cpu")


def test_two_tasks_are_learned_and_one_blend_keeps_both():
    "The runs of the README in batches of half the size, on the two tasks that take the fewest steps."
    steps = {"summarize": 40, "extract": 90}
    paths = {task: str(bundled_path(f"tasks/{task}")) for task in steps}
    questions = {task: load_task(paths[task], "test", n=50) for task in steps}
    own = {}
    for task, path in paths.items():
        found = scores(adapter_of(task, path, steps[task]), questions)
        assert found[task] >= 0.9 and found.drop(task).max() <= 0.1
        own[task] = found[task]
    options = dict(adapters=list(steps), datasets=list(paths.values()), n_samples=500)
    options |= dict(max_steps=50, per_device_train_batch_size=32, dtype="float32")
    options |= dict(learning_rate=0.1, warmup_steps=0, save_steps=0, device="cpu")
    run(LoRAMergeConfig(**options, output_dir="both"))
    kept = scores(load_base("both/merged", "cpu"), questions)
    assert all(kept[task] >= 0.9 * own[task] for task in steps), (kept, own)
    folders = [f"{task}/adapter_checkpoint" for task in steps]
    base = bundled_path("models/base")
    ((_, linear),) = peft_baselines(base, folders, 0.5, ["linear"], device="cpu")
    assert scores(linear, questions).min() < 0.5


def test_commands_of_the_readme(readme_commands, tmp_path):
    "As printed there, from the root of a clone, on fewer rows and steps."
    commands = readme_commands("lora")
    assert [words[0] for words in commands] == ["lora", "lora", "lora-merge"]
    (tmp_path / "data").symlink_to(bundled_path())
    for words in commands:
        assert main([*words, "--max_steps", "2", "--num_samples", "64"]) == 0, words
    folder = tmp_path / "runs" / "lora"
    base = load_base(bundled_path("models/base"), "cpu")
    plain = probe_logits(AutoModelForCausalLM.from_pretrained(folder / "both/merged"))
    exported = probe_logits(load_adapter(base, folder / "both/adapter"))
    assert (plain - exported).abs().max() < 1e-4
    for task in ("rewrite", "summarize"):
        names = {path.name for path in (folder / task).iterdir()}
        assert {"adapter_checkpoint", "final_merged", "diagnostics.csv"} <= names
