"""What CONTRIBUTING.md, CHANGELOG.md and the hooks promise holds."""

import ast
import contextlib
import dataclasses
import html
import importlib.util
import io
import json
import re
import subprocess
import sys
import tokenize
import types
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from merge_lab import merger as merger_module
from merge_lab.cli import AlignConfig, help_of, main, parse, usage
from merge_lab.commands import COMMANDS, SYSTEMS
from merge_lab.config import config_from_yaml
from merge_lab.constraints import constrain, CONSTRAINTS, OF_ANY_NUMBER, OF_DELTAS, unconstrain
from merge_lab.hub_folder import named_places
from merge_lab.losses import LOSSES, PENALTIES
from merge_lab.masks import MergeState
from merge_lab.merger import CONFIG_FILE, Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.objective import coefficient_penalty, Objective
from merge_lab.run_folder import alone_in, begin_run, bundled_path, RunInterrupted
from merge_lab.runs import find_runs, read_alphas, Run
from merge_lab.session import adjustable, new_weights
from merge_lab.systems import lora_merge, mask_merge
from merge_lab.systems.dam import DAMConfig, DAMMerger, NON_LINEARITIES
from merge_lab.systems.layer_merge import ALPHA_LOSSES, LayerMergeConfig
from merge_lab.systems.mask_merge import demo_config, MaskMergeConfig, run
from merge_lab.systems.router import GATES, RouterConfig
from merge_lab.tinylm import architectures, save_tiny, tiny_experts
from merge_lab.vocabulary import POLICIES
from merge_lab.widgets import ConfigPanel
from small_runs import SignalAt

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
IDS = torch.tensor([[1, 5, 9, 13, 7, 21], [1, 8, 3, 40, 2, 11]])


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def test_changelog_tells_of_the_version_that_is_built():
    "Newest first, each release with its day; what is not released yet stands above."
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    releases = [head for head in heads if head != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", head) for head in releases)
    versions = [tuple(map(int, head.split(" ")[0].split("."))) for head in releases]
    assert versions == sorted(versions, reverse=True) and len(set(versions)) == len(versions)
    assert tuple(map(int, settings()["version"].split("."))) == versions[0]
    assert "Unreleased" not in heads[1:]
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def hooks() -> list[dict]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    return [hook for repo in config["repos"] for hook in repo["hooks"]]


def test_hooks_run_what_a_change_must_pass():
    "By the project's own tools, so that neither a network nor another version of them is asked."
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for hook in hooks():
        assert hook["language"] == "system" and not hook["pass_filenames"], hook["id"]
        assert " ".join([hook["entry"], *hook.get("args", ())]) in lines
        program = Path(hook["entry"].split()[0])
        if program.parent.name:  # of .venv; make is everybody's
            program = Path(sys.executable).parent / program.name
            assert program.exists(), f"{program}: not among the requirements of 'dev'?"
    assert [hook["id"] for hook in hooks()] == ["nbdev-clean", "nbdev-export", "ruff"]


def test_the_hook_of_the_export_writes_all_that_is_exported():
    "The modules, and what the command line's help was written down as."
    (hook,) = (hook for hook in hooks() if hook["id"] == "nbdev-export")
    assert hook["entry"] == "make export"
    assert all(re.search(hook["files"], f"merge_lab/{name}") for name in ("options.json", "cli.py", "systems/dam.py"))


def test_hooks_look_at_every_notebook_and_module():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    patterns = {hook["id"]: re.compile(hook["files"]) for hook in hooks() if "files" in hook}
    seen = 0
    for name in tracked.stdout.splitlines():
        if name.endswith(".ipynb"):
            assert patterns["nbdev-clean"].search(name), name
        if name.endswith(".ipynb") or re.match(r"merge_lab/.*\.py", name):
            assert patterns["nbdev-export"].search(name), name
            seen += 1
    assert seen > 50 or not tracked.stdout  # an archive without its history has nothing to look at


def test_table_of_rooms_is_that_of_the_notebooks():
    found = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    rooms = importlib.util.module_from_spec(found)
    found.loader.exec_module(rooms)
    assert rooms.fill(GUIDE, rooms.table()) == GUIDE, "make readme writes it anew"
    named = re.findall(r"^\| \[.+?\]\((.+?)\) \| .+ \|$", GUIDE, re.MULTILINE)
    numbered = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert set(named) == numbered and len(named) == len(numbered)
    with pytest.raises(ValueError, match="no place for the table"):
        rooms.fill("# Contributing", "")


def test_headline_of_the_readme_is_that_of_the_raw_data():
    found = importlib.util.spec_from_file_location("headline", ROOT / "docs" / "headline.py")
    headline = importlib.util.module_from_spec(found)
    found.loader.exec_module(headline)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert headline.table() in readme and headline.fill(readme, headline.table()) == readme, "make readme writes it anew"
    assert headline.kills() in readme and headline.fill(readme, headline.kills(), headline.KILLS, headline.END_OF_KILLS) == readme, "make readme writes it anew"
    assert headline.shown([0.9, 0.94]) == "0.920 ±0.020 (2)" and headline.shown([]) == "-"
    with pytest.raises(ValueError, match="no place for the table"):
        headline.fill("# A page", "")


def test_guide_leads_to_files_and_targets_that_there_are():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", GUIDE):
        assert (ROOT / target).exists(), target
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?=\s+#|`)", GUIDE)) <= targets
    for name in re.findall(r"`(tests/\w+\.py)", GUIDE):
        assert (ROOT / name).exists(), name


def recipe(title: str) -> list[str]:
    "The code of a recipe, block by block."
    section = GUIDE.split(f"\n### {title}\n", 1)[1].split("\n### ", 1)[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def execute(code: str, names: dict):
    "Run a recipe's code where `names` are."
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)  # noqa: S102  the guide is ours


@contextlib.contextmanager
def as_they_were(*registries: dict):
    "Rows that are added inside are gone outside."
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, rows in zip(registries, before):
            registry.clear()
            registry.update(rows)


@pytest.fixture
def softplus():
    assert "softplus" not in CONSTRAINTS
    with as_they_were(CONSTRAINTS):
        execute(recipe("A constraint")[0], {})
        yield "softplus"
    with pytest.raises(ValueError, match="constrain_mode='softplus'"):
        MergerConfig(constrain_mode="softplus")


def test_recipe_of_a_constraint_can_be_chosen_everywhere(softplus, tmp_path):
    words = ["--model_paths", "a", "b", "--dataset_configs", "{a.jsonl: null, b.jsonl: null}", "--constrain_mode", softplus]
    config = parse("mask-merge", words)
    assert config.constrain_mode == softplus
    panel = ConfigPanel(MaskMergeConfig, checks={})
    assert softplus in panel.controls["constrain_mode"].choices
    panel.set("constrain_mode", softplus)
    assert "constrain_mode" not in panel.errors
    folder = begin_run(config, tmp_path / "run")
    assert config_from_yaml(MaskMergeConfig, folder / "config.yaml").constrain_mode == softplus


def test_recipe_of_a_constraint_starts_where_it_is_told_trains_and_comes_back(softplus, tmp_path):
    start = torch.tensor([[0.3, 2.0], [0.7, 1e-3]])
    assert_close(torch.stack(constrain(unconstrain(start, softplus), softplus)), start)
    with pytest.raises(ValueError, match="alpha=-1: expected alpha > 0"):
        unconstrain(torch.tensor([0.5, -1.0]), softplus)

    merger = Merger(tiny_experts(n=2), MergerConfig(constrain_mode=softplus))
    assert ((merger.alphas()["mean"] - 0.5).abs() < 1e-6).all()
    optimizer = torch.optim.SGD([p for p in merger.parameters() if p.requires_grad], lr=0.1)
    merger(input_ids=IDS, labels=IDS, source=torch.tensor([0, 1]), objective=Objective())["loss"].backward()
    optimizer.step()
    moved = merger.alphas()["mean"]
    assert (moved > 0).all() and (moved - 0.5).abs().max() > 1e-6
    merger.save_pretrained(tmp_path / "masks")
    assert_close(sorted(read_alphas(tmp_path / "masks")["mean"]), sorted(moved))


def test_views_of_the_registry_follow_it(softplus):
    assert softplus in OF_ANY_NUMBER and softplus not in OF_DELTAS
    assert lora_merge.LoRAMergeConfig(constrain_mode=softplus).constrain_mode == softplus
    assert merger_module.OF_DELTAS is OF_DELTAS
    row = CONSTRAINTS[softplus]
    CONSTRAINTS[softplus] = dataclasses.replace(row, keeps_shared=True)
    assert Merger(tiny_experts(n=2), MergerConfig(constrain_mode=softplus)).moves_deltas
    CONSTRAINTS[softplus] = dataclasses.replace(row, components=2)
    with pytest.raises(ValueError, match="constrain_mode='softplus'"):
        lora_merge.LoRAMergeConfig(constrain_mode=softplus)


def test_registries_are_asked_when_an_option_is_checked(softplus, hellinger, monkeypatch):
    "Also by options with names or captions of their own."
    assert DAMConfig(non_linearity=softplus).non_linearity == softplus and NON_LINEARITIES[softplus] == softplus
    assert LayerMergeConfig(loss_func_name=hellinger).loss_func_name == hellinger
    assert ALPHA_LOSSES[hellinger] is LOSSES[hellinger]
    monkeypatch.setitem(GATES, "hardmax", lambda logits: logits)
    assert RouterConfig(gate="hardmax").gate == "hardmax"
    monkeypatch.setitem(POLICIES, "first", "the first component's tokens")
    assert parse("align", ["a", "b", "--policy", "first"]).policy == "first"
    assert ConfigPanel(AlignConfig, checks={}).controls["policy"].choices == tuple(POLICIES)


def test_dam_knows_each_constraint_by_one_name():
    assert [name for name in NON_LINEARITIES if NON_LINEARITIES[name] == "01"] == ["sigmoid"]
    assert sorted(NON_LINEARITIES.values()) == sorted(OF_ANY_NUMBER)
    for name in ("sum1", "cosine"):
        merger = DAMMerger(tiny_experts(n=2), MergerConfig(["a", "b", "base"], constrain_mode=NON_LINEARITIES[name]), tiny_experts(n=1, seed=7)[0])
        assert ((merger.alphas()["mean"] - 0.5).abs() < 1e-6).all() and not merger.has_base
    with pytest.raises(ValueError, match="non_linearity='01'"):
        DAMConfig(non_linearity="01")


@pytest.fixture
def bounded_delta():
    assert "bounded_delta" not in CONSTRAINTS
    names = {}
    with as_they_were(CONSTRAINTS):
        for code in recipe("A constraint"):
            execute(code, names)
        yield "bounded_delta"


@pytest.mark.parametrize("anchor", [None, 0, 2, 3])
def test_recipe_of_a_constraint_with_an_anchor_has_an_inverse(bounded_delta, anchor):
    "Also with an anchor that is held beside the components."
    start = torch.tensor([[0.3, 0.5], [-0.4, 0.25], [1.1, 0.25]] if anchor in (None, 2) else [[1.1, 0.25], [-0.4, 0.5], [0.3, 0.25]])
    start = start * 0.8 if anchor == 3 else start
    masks = unconstrain(start, bounded_delta, anchor=anchor)
    assert len(masks) == 3
    assert_close(torch.stack(constrain(masks, bounded_delta, anchor=anchor)), start)


def saved_models(folder: Path) -> list[str]:
    "Two experts and their base, as folders."
    paths = [str(folder / name) for name in ("one", "two", "base")]
    for model, path in zip(tiny_experts(n=3), paths):
        save_tiny(model, path)
    return paths


def test_recipe_of_a_constraint_with_an_anchor_loads_its_base(bounded_delta, tmp_path):
    "And what is saved, read back, exported and drawn is measured from it."
    *paths, base = saved_models(tmp_path)
    merger = Merger.from_config(MergerConfig(paths, constrain_mode=bounded_delta, base_model=base, dtype="float32"))
    assert merger.has_base and merger.n_components == 2 and merger.moves_deltas
    with torch.no_grad():
        for parameter in merger.parameters():
            if parameter.requires_grad:
                parameter += torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter)
    ones, twos, bases = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in (*paths, base))
    leaf, name = next((leaf, name) for name, leaf, key in merger.masked_parameters() if key == "weight")
    alphas = leaf.masks["weight"].tanh()
    wanted = bases[name] + alphas[0] * (ones[name] - bases[name]) + alphas[1] * (twos[name] - bases[name])
    assert_close(merger.merged_state_dict()[name], wanted)
    merger.save_pretrained(tmp_path / "masks")
    again = Merger.from_pretrained(tmp_path / "masks")
    assert_close(again.merged_state_dict(), merger.merged_state_dict())
    assert_close(sorted(read_alphas(tmp_path / "masks")["mean"]), sorted(merger.alphas()["mean"]))
    saved = json.loads((tmp_path / "masks" / CONFIG_FILE).read_text(encoding="utf-8"))
    assert named_places(saved) == [*paths, base]


def test_recipe_of_a_constraint_with_an_anchor_finds_the_base_of_a_run(bounded_delta, tmp_path):
    "As the components name it; the mean where they name none."
    *paths, base = saved_models(tmp_path)
    config = MaskMergeConfig(model_paths=[*paths, base], base_model=base, constrain_mode=bounded_delta, dataset_configs={"a.jsonl": None, "b.jsonl": None})
    assert mask_merge.with_base(config).model_paths == paths
    assert mask_merge.with_base(dataclasses.replace(config, model_paths=paths, base_model=None)).base_model == "mean"
    merger = DAMMerger(tiny_experts(n=2), MergerConfig([*paths, base], constrain_mode=bounded_delta), tiny_experts(n=1, seed=7)[0])
    assert merger.has_base and not merger.use_base_model


def test_recipe_of_a_constraint_with_an_anchor_measures_adapters_from_their_base(bounded_delta):
    "Which has no mask there: an alpha is the adapter's own."
    factors = [(torch.randn(2, 6), torch.randn(4, 2)) for _ in range(2)]
    leaf = lora_merge.AdapterLinear(torch.nn.Linear(6, 4), factors, MergeState(), "vector_output", bounded_delta)
    assert_close(torch.stack(leaf.alphas()), torch.full((2, 4, 1), 0.5))
    leaf.set_alphas("weight", [0.9, -0.3])
    assert_close(leaf.masks["weight"].tanh().mean((1, 2)), torch.tensor([0.9, -0.3]))


@pytest.fixture
def hellinger():
    assert "hellinger" not in LOSSES
    with as_they_were(LOSSES):
        execute(recipe("A loss")[0], {})
        yield "hellinger"
    for asked in (lambda: Objective({"hellinger": 1.0}), lambda: demo_config(loss_func_name="hellinger")):
        with pytest.raises(ValueError, match="loss_func_name='hellinger'"):
            asked()
    assert "hellinger" not in ConfigPanel(MaskMergeConfig, checks={}).controls["loss_func_name"].choices


def test_recipe_of_a_loss_can_be_chosen_everywhere(hellinger):
    words = ["--model_paths", "a", "b", "--dataset_configs", "{a.jsonl: null, b.jsonl: null}", "--loss_func_name", hellinger]
    assert parse("mask-merge", words).loss_func_name == hellinger
    panel = ConfigPanel(MaskMergeConfig, checks={})
    assert hellinger in panel.controls["loss_func_name"].choices
    panel.set("loss_func_name", hellinger)
    assert "loss_func_name" not in panel.errors
    assert adjustable("losses")[hellinger] == LOSSES[hellinger].caption
    assert new_weights("losses", {"kl": 1.0}, {hellinger: 0.5}) == {"kl": 1.0, hellinger: 0.5}


@pytest.mark.parametrize("others", [{}, {"kl": 0.5, "kl_mixture": 0.5, "ce": 0.5}])
@pytest.mark.parametrize("k", [None, 5])
def test_recipe_of_a_loss_is_the_formula_in_value_and_gradient(hellinger, others, k):
    "Also beside losses that see only the teachers' top-k, or all components."
    merger = Merger(tiny_experts(n=2), MergerConfig())
    merger.init_masks({"strategy": "uniform", "factors": [0.3, 0.7]})
    batch = dict(input_ids=IDS, labels=IDS, source=torch.tensor([0, 1]))

    def value_and_gradients(fused):
        objective = Objective({hellinger: 1.0, **others}, fused=fused, k=k, chunk_size=3)
        found = merger(**batch, objective=objective)
        return found[hellinger], torch.autograd.grad(found["loss"], [p for p in merger.parameters() if p.requires_grad])

    value, gradients = value_and_gradients(True)
    plain, plain_gradients = value_and_gradients(False)
    assert_close(value, plain)
    assert_close(gradients, plain_gradients, atol=1e-6, rtol=1e-4)
    log_q = merger.model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_p = torch.stack([merger.component_forward(i, input_ids=IDS[i : i + 1]).logits[0, :-1] for i in (0, 1)]).log_softmax(-1)
    wanted = 1 - ((log_q + log_p) / 2).exp().sum(-1).mean()
    assert_close(value, wanted.detach())
    if not others:
        assert_close(gradients, torch.autograd.grad(wanted, [p for p in merger.parameters() if p.requires_grad]), atol=1e-6, rtol=1e-4)


def test_recipe_of_a_loss_is_trained_resumed_and_told_of(hellinger, tmp_path):
    tasks = {str(bundled_path(f"tasks/{task}")): 16 for task in ("rewrite", "summarize")}
    config = demo_config(
        output_dir=str(tmp_path / "run"), dataset_configs=tasks, base_model=None, loss_func_name=hellinger, max_steps=2, eval_samples=2,
        per_device_train_batch_size=4, save_steps=0, save_merged=False, held_out_rows=4,
    )
    with pytest.raises(RunInterrupted, match="stopped after step 1 of 2"):
        run(config, callbacks=(SignalAt(0),), progress=False)
    again = config_from_yaml(MaskMergeConfig, tmp_path / "run" / "config.yaml")
    assert again.loss_func_name == hellinger
    result = run(dataclasses.replace(again, resume=True), progress=False)
    assert result.history.step.tolist() == [1, 2] and (result.history[hellinger] > 0).all()
    caption = LOSSES[hellinger].caption
    assert caption[1:] in html.unescape((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))


def test_every_loss_and_penalty_has_a_line_of_text():
    for row in [*LOSSES.values(), *PENALTIES.values()]:
        assert row.caption.strip() == row.caption and "\n" not in row.caption and len(row.caption) > 10
    assert LOSSES["mse"].unit == "squared logits per scored token"


def test_recipe_of_a_penalty_pulls_and_has_a_dial():
    merger = Merger(tiny_experts(n=2), MergerConfig(constrain_mode="identity"))
    merger.init_masks({"strategy": "uniform", "factors": [-0.25, 1.25]})
    with as_they_were(PENALTIES):
        execute(recipe("A loss")[1], {})
        assert "below_zero" in adjustable("penalties")
        objective = Objective(penalties={"below_zero": 2.0})
        assert_close(coefficient_penalty(merger, "below_zero", objective), torch.tensor(0.125))
        found = merger(input_ids=IDS, labels=IDS, source=torch.tensor([0, 1]), objective=objective)
        assert_close(found["loss"].detach(), found["kl"] + 2 * 0.125)
    assert "below_zero" not in adjustable("penalties")
    with pytest.raises(ValueError, match="penalty='below_zero'"):
        Objective(penalties={"below_zero": 1.0})


@pytest.fixture
def average(monkeypatch):
    module, rows = recipe("A system")
    made = types.ModuleType("merge_lab.systems.average")
    monkeypatch.setitem(sys.modules, made.__name__, made)  # in place of a file that make export writes
    execute(module, vars(made))
    with as_they_were(COMMANDS, SYSTEMS):
        execute(rows, {})
        yield made
    assert "average" not in usage()


def test_recipe_of_a_system_is_a_command_a_panel_and_a_run(average, tmp_path, capsys, monkeypatch):
    assert "average several models" in usage() and "--average_of" in help_of("average")
    panel = ConfigPanel(average.AverageConfig, checks={})
    assert panel.command == "merge-lab average" and not panel.errors

    paths = [str(bundled_path(f"models/{name}")) for name in ("rewrite", "summarize")]
    words = ["average", *paths, "--output_dir", str(tmp_path / "both")]
    assert main(words) == 0
    first, second, both = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (*paths, tmp_path / "both" / "merged"))
    for name, weight in both.items():
        assert_close(weight, (first[name] + second[name]) / 2)

    with monkeypatch.context() as patch:
        patch.setattr(average.Merger, "from_config", lambda config: pytest.fail("weights were loaded for what is refused"))
        assert main(words) == 2 and "already holds a run" in capsys.readouterr().err
        inside = ["average", *paths, str(tmp_path / "both" / "merged"), "--output_dir", str(tmp_path / "both"), "--overwrite"]
        assert main(inside) == 2 and "overwrite would clear" in capsys.readouterr().err
        with alone_in(tmp_path / "both"):
            assert main([*words, "--overwrite"]) == 2 and "at work" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    run = Run(tmp_path / "both")
    assert run.kind == "average" and run.merged == tmp_path / "both" / "merged"
    assert find_runs(tmp_path).loc["both", "system"] == "average"


def test_recipe_of_an_architecture_is_tried_like_the_others(tmp_path):
    with as_they_were(architectures):
        (code,) = recipe("An architecture")
        assert "olmo2" not in architectures, "take one that the project has no tiny twin of"
        execute(code, {})
        experts = tiny_experts(n=2, architecture="olmo2")
    assert "olmo2" not in architectures
    with torch.no_grad():
        wanted = experts[1](input_ids=IDS).logits
        merger = Merger(experts, MergerConfig())
        merger.init_masks({"strategy": "odd_one_out", "selected_idx": 1})
        assert torch.equal(merger(input_ids=IDS).logits, wanted)
        merger.init_masks({"strategy": "uniform", "factors": [0.3, 0.7]})
        merger.save_merged(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(reloaded(input_ids=IDS).logits, merger(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


KNOWN = {"model", "tokenizer", "config", "axis", "axes", "figure", "bar", "dataset"}  # what these are is said once, by their names
INHERITED = re.compile(r"on_\w+|forward|step|compute_loss|extra_repr|create_scheduler")  # described by torch and transformers


def told_parameters(file: Path):
    "Parameters of a module's public functions: name of the function, parameter, whether it has a type, whether a word beside it."
    text = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    said = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    tree = ast.parse(text)
    owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or INHERITED.fullmatch(node.name):
                continue
            for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                if each.arg not in ("self", "cls"):
                    yield f"{file.stem}.{node.name}", each.arg, each.annotation is not None, each.lineno in said


def test_hardly_a_parameter_is_without_type_and_word():
    "The number may only fall: describe what you add, then write the new one here."
    files = [file for file in (ROOT / "merge_lab").rglob("[a-z]*.py")]
    told = [found for file in files for found in told_parameters(file)]
    silent = [f"{name}({parameter})" for name, parameter, typed, said in told if not (typed or said or parameter in KNOWN)]
    assert len(told) > 1500 and len(silent) <= 39, silent


def test_every_parameter_of_a_constraint_is_described():
    silent = [(name, parameter) for name, parameter, _, said in told_parameters(ROOT / "merge_lab" / "constraints.py") if not said]
    assert not silent


def test_recipe_of_an_opponent_is_tried_and_searched(tmp_path):
    pytest.importorskip("optuna")
    from merge_lab.evaluation import load_tests
    from merge_lab.lineup import line_up
    from merge_lab.opponents import OPPONENTS
    from merge_lab.search import judge_of, search

    tasks = ("rewrite", "summarize")
    with as_they_were(OPPONENTS):
        for code in recipe("An opponent"):
            execute(code, {})
        lineup = line_up([bundled_path(f"models/{task}") for task in tasks], bundled_path("models/base"))
        judge = judge_of(lineup, load_tests([bundled_path(f"tasks/{task}") for task in tasks], "validation", 4))
        trials = search(lineup, judge, "pulled_to_base", tmp_path / "trials.jsonl", trials=3)
        assert trials[0]["setting"]["share"] == 0.1 and len({trial["worst"] for trial in trials}) == 3
        lineup.base_path = None
        assert_close(OPPONENTS["pulled_to_base"].merge(lineup, {"share": 1.0})["model.norm.weight"], lineup.base["model.norm.weight"].float())
