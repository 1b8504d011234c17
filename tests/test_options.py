"One name for each option, whatever others it is known by: in Python, YAML, on the command line and in panels."

import dataclasses
import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

from merge_lab.cli import help_of, main, parse, parser_of, told_options
from merge_lab.commands import COMMANDS, find_object, kind_of, SYSTEMS, Viewed, VIEWS
from merge_lab.config import alias_names, config_from_yaml, config_to_cli, config_to_python, config_to_yaml, recipe_options, resumable_options
from merge_lab.losses import LOSSES, loss_of_rows
from merge_lab.merger_config import MergerConfig
from merge_lab.panel import ConfigPanel
from merge_lab.run_folder import begin_run, check_resumed
from merge_lab.runs import Run
from merge_lab.systems.dam import dam_objective, DAMMerger, DAMTrainConfig
from merge_lab.systems.layer_merge import LayerMergeConfig
from merge_lab.systems.router import RouterConfig
from merge_lab.teacher_dataset import changes, DAMTopkConfig, dataset_facts, DATASET_FILE, open_dataset, read_facts
from merge_lab.tinylm import tiny_experts, tiny_model
from merge_lab.token_losses import mse_rows

CONFIGS = {name: command.find(command.config) for name, command in COMMANDS.items()}
ALIASED = []  # of each command: one alias of each option, then another
for _name, _cls in CONFIGS.items():
    _mains = alias_names(_cls)
    _first = {main: alias for alias, main in reversed(_mains.items())}.values()
    ALIASED += [(_name, sorted(some)) for some in (_first, _mains.keys() - _first) if some]
OTHERS = {
    "output_path", "save_dir", "random_state", "n_samples", "num_examples", "example_count", "num_steps", "num_epochs", "schedule",
    "base_model_id", "base_model_name", "model_ids", "dataset_names", "score_rows", "test_rows", "seq_len", "loss", "export", "merged",
}  # fmt: skip
PUBLISHED = {
    "router": ["seq_len", "num_examples", "batch_size", "num_epochs", "save_dir", "random_state"],
    "quantize": ["seq_len", "num_examples", "random_state"],
    "dam-merge": ["base_model_id", "model_ids", "output_path"],
    "dam-topk": ["dataset_names", "model_ids", "base_model_name", "example_count", "hf_disk_dataset_dir"],
    "dam-train": ["base_model_name"],
    "layer-merge": ["num_steps", "batch_size"],
    "lora": ["n_samples", "batch_size", "merge"],
    "lora-merge": ["n_samples"],
    "memory": ["seq_len", "batch_size"],
}


def sample(cls: type, name: str):
    "A value of an option that is not its default, and one more."
    (field,) = [field for field in dataclasses.fields(cls) if field.name == name]
    if "choices" in field.metadata:
        return next(choice for choice in field.metadata["choices"] if choice != field.default), field.default
    kind = str(typing.get_type_hints(cls)[name]).removeprefix("<class '")
    if kind.startswith("list"):
        return ["a", "b"], ["c"]
    if "bool" in kind:
        return field.default, not field.default
    if kind.startswith("str"):
        return "one", "two"
    return (101, 102) if name == "max_length" else (3, 0 if field.default == 0 else 4)


def words(alias: str, value) -> list[str]:
    return [f"--{alias}", *(map(str, value) if isinstance(value, list) else ["none" if value is None else str(value)])]


@pytest.mark.parametrize("name, given", ALIASED)
def test_other_names_are_understood_in_every_face_and_never_written(name, given, tmp_path):
    cls, mains = CONFIGS[name], alias_names(CONFIGS[name])
    values = {alias: sample(cls, mains[alias]) for alias in given}
    config = cls(**{alias: value for alias, (value, _) in values.items()})
    faces = [config_to_yaml(config), config_to_cli(config, "merge-lab"), config_to_python(config), str(recipe_options(config)), repr(config)]
    file, written, panel = tmp_path / "config.yaml", faces[0], ConfigPanel(cls, checks={})
    for alias, (value, _) in values.items():
        assert getattr(config, alias) == getattr(config, mains[alias]) == value
        assert not any(re.search(rf"--{alias}(?![\w-])|(?<!\w){alias}['\"]?[:=]", face) for face in faces), alias
        written = re.sub(rf"(?m)^{mains[alias]}:", f"{alias}:", written)
        panel.set(alias, value)
    assert {field.name for field in dataclasses.fields(config)} <= panel.values.keys() and not panel.values.keys() & mains.keys()
    file.write_text(written)
    assert config_from_yaml(cls, file) == config and not [alias for alias in given if f"{alias}:" not in written]
    flags = [word for alias, (value, _) in values.items() for word in words(alias, value)]
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in flags]
    assert parse(name, flags) == parse(name, dashed) == config
    more = [word for alias, (_, other) in values.items() for word in words(mains[alias], other)]
    over = parse(name, [str(file), *more])  # flags win over a file, whatever the names
    for alias, (value, other) in values.items():
        assert getattr(over, mains[alias]) == other
        setattr(config, alias, other)
    assert config == over == dataclasses.replace(over)
    assert dataclasses.replace(over, **{alias: value for alias, (value, _) in values.items()}) == cls(**{alias: value for alias, (value, _) in values.items()})


@pytest.mark.parametrize("name, given", ALIASED)
def test_two_names_with_two_values_are_refused(name, given, tmp_path):
    cls, mains, file = CONFIGS[name], alias_names(CONFIGS[name]), tmp_path / "config.yaml"
    for alias in given:
        main, (value, other) = mains[alias], sample(cls, mains[alias])
        message = rf"{main}=.* and {alias}=.* are one option, {main}"
        with pytest.raises(ValueError, match=message):
            cls(**{main: value, alias: other})
        file.write_text(f"{main}: {value}\n{alias}: {other}\n")
        with pytest.raises(ValueError, match=message):
            config_from_yaml(cls, file)
        assert cls(**{main: value, alias: value}) == cls(**{main: value})
    with pytest.raises(ValueError, match=message):
        parse(name, words(main, value) + words(alias, other))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_an_alias_once_beside_its_option(name):
    lines = " ".join(help_of(name).split())
    for alias, own in alias_names(CONFIGS[name]).items():
        assert len(re.findall(rf"--{alias}(?![\w-])", lines)) == 1, alias
        assert re.search(rf"--{own}\b.*; also [^(]*--{alias}\b", lines), alias


def test_no_quantity_has_two_names():
    "Also what was published under another name is an option by the one name."
    for name, cls in CONFIGS.items():
        fields = {field.name for field in dataclasses.fields(cls)}
        assert not fields & OTHERS, name
        assert not fields & alias_names(cls).keys(), name
        assert set(PUBLISHED.get(name, ())) <= alias_names(cls).keys(), name


def test_an_option_means_the_same_in_every_command():
    "What is left open is what the help says, rows to score are a number, all or none, and steps and patience may grow."
    for name, cls in CONFIGS.items():
        fields = {field.name: field for field in dataclasses.fields(cls)}
        told = {field.name: field.metadata.get("help", "") for field in fields.values()}
        open_ones = {option for option, field in fields.items() if field.default is None or field.default_factory is not dataclasses.MISSING and not field.default_factory()}
        assert not {option for option, text in told.items() if "none given" in text} - open_ones, name
        if "eval_samples" in fields:
            assert cls(eval_samples="none").eval_samples is None and "none: all" in told["eval_samples"], name
            assert name in ("real", "compare", "ablate") or cls(eval_samples=0).eval_samples == 0 and "0: no scores" in told["eval_samples"], name  # those give nothing else
        if "resume" in fields and name in SYSTEMS:
            assert {"max_steps", "patience", "gradient_checkpointing", "eval_samples"} & fields.keys() <= resumable_options(cls), name
    assert "Epochs" in CONFIGS["router"].__dataclass_fields__["patience"].metadata["help"]
    assert "Updates" in CONFIGS["layer-merge"].__dataclass_fields__["patience"].metadata["help"]
    assert CONFIGS["lora-merge"]().gradient_checkpointing is False and CONFIGS["lora-merge"](gradient_checkpointing=None).adapters == []


ALONE = {  # command -> options that it cannot do without
    "dam-merge": {"base_model": "b", "model_paths": ["x", "y"]}, "dam-topk": {}, "layer-merge": {}, "lora": {}, "lora-merge": {},
    "quantize": {"model_path": "x"}, "router": {"model_path": "x"}, "compare": {}, "ablate": {}, "export": {"path": "x"},
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_runs_in_one_process_says_so_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = COMMANDS[name]
    with pytest.raises(ValueError, match=f"{name}: torchrun started 2 processes, and this command runs in one"):
        command.find(command.function)(CONFIGS[name](**ALONE[name]))
    assert not list(tmp_path.iterdir())
    assert SYSTEMS.keys() <= {*ALONE, *TOGETHER}


TOGETHER = {"mask-merge", "dam-train", "memory", "preflight"}  # commands of which several processes work as one, or write nothing


def test_a_command_is_started_twice_only_where_both_are_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in COMMANDS.keys() - TOGETHER:
        assert main([name]) == 2, name
        assert f"merge-lab {name}: {name}: torchrun started 2 processes" in capsys.readouterr().err
    assert {name for name, command in COMMANDS.items() if command.together} == TOGETHER and not list(tmp_path.iterdir())


OLD = {
    "dam-merge": "base_model_id: base\nmodel_ids: [a, b]\noutput_path: out\nmerge_layernorms: false\n",
    "dam-train": "untrained_merged_model_name: x\nbase_model_name: null\nexport: true\nscore_rows: 0\nmax_steps: 7\n",
    "layer-merge": "n_pairs: 2\nnum_steps: 7\nbatch_size: 2\nloss: kl\n",
    "lora": "lora_dropout: 0.1\nn_samples: 5\nmerge: true\nmax_steps: 7\n",
    "lora-merge": "adapters: [a, b]\nmerged: true\nn_samples: 5\nmax_steps: 7\n",
    "router": "router_hidden: 64\nsave_dir: out\nrandom_state: 1\nnum_epochs: 2\n",
    "quantize": "parent_precision: 8\nrandom_state: 1\nseq_len: 64\n",
}


@pytest.mark.parametrize("name", OLD)
def test_a_run_from_before_is_known_and_can_be_gone_on_with(name, tmp_path):
    cls, file = CONFIGS[name], tmp_path / "config.yaml"
    file.write_text(OLD[name])
    config = config_from_yaml(cls, file)
    run = Run(tmp_path)
    assert run.kind == name and (run.wanted == 7 or "7" not in OLD[name])
    check_resumed(config, tmp_path)
    begin_run(config, tmp_path / "new")
    assert Run(tmp_path / "new").kind == name and config_from_yaml(cls, tmp_path / "new" / "config.yaml") == config
    assert kind_of(dict.fromkeys(field.name for field in dataclasses.fields(cls))) == name and name in SYSTEMS


def test_a_changed_option_of_a_run_from_before_is_still_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("num_steps: 100\nseed: 3\n")
    check_resumed(LayerMergeConfig(max_steps=100, seed=3), tmp_path)
    with pytest.raises(ValueError, match="seed=4, but the run in .* was begun with 3"):
        check_resumed(LayerMergeConfig(num_steps=200, random_state=4), tmp_path)


def test_a_dataset_from_before_is_not_made_again(tmp_path):
    config = DAMTopkConfig(datasets=["a", "b"], model_paths=["m", "n"], base_model="base", num_samples=4)
    facts = dataset_facts(config)
    olds = {"datasets": "dataset_names", "model_paths": "model_ids", "base_model": "base_model_name", "num_samples": "example_count"}
    (tmp_path / DATASET_FILE).write_text(json.dumps({olds.get(name, name): value for name, value in facts.items()} | {"complete": True}))
    held = read_facts(tmp_path)
    assert held["model_paths"] == ["m", "n"] and not changes(held, facts)
    assert open_dataset(tmp_path, facts, overwrite=False) is True


def test_a_nearby_name_is_suggested_whichever_it_is():
    with pytest.raises(ValueError, match="Did you mean '--save_dir'"):
        parse("router", ["--save_dri", "x"])
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(RouterConfig(), "nonsense")  # noqa: B009


VIEW = """
import sys
from merge_lab.losses import LOSSES, loss_of_rows
from merge_lab.merger_config import MergerConfig
from merge_lab.panel import ConfigPanel
from merge_lab.systems.dam import dam_objective, DAMMerger, DAMTrainConfig
from merge_lab.systems.layer_merge import LayerMergeConfig

class Mine(ConfigPanel):
    pass

panel = Mine(LayerMergeConfig, checks={})
assert not {"merge_lab.widgets", "merge_lab.panel_view", "ipywidgets"} & set(sys.modules)
shown = panel._repr_mimebundle_()
assert "application/vnd.jupyter.widget-view+json" in shown and "merge_lab.panel_view" in sys.modules
assert "ml-panel" in panel.view()._dom_classes
sys.modules["ipywidgets"] = None
assert list(panel._repr_mimebundle_()) == ["text/plain"]
"""


def test_a_panel_shows_its_view_whatever_was_imported(forked):
    "It has one without `merge_lab.widgets`, which is imported when it is looked at; and without ipywidgets it is text."
    subprocess.run([sys.executable, "-c", VIEW], check=True)


@pytest.mark.parametrize("name", VIEWS)
def test_each_view_is_that_of_its_class(name):
    home = {"ConfigPanel": "panel", "TrainingSession": "session", "MergeExplorer": "explorer", "TokenBoard": "token_board", "Asking": "asking"}[name]
    cls, view = find_object(f"merge_lab.{home}.{name}"), find_object(VIEWS[name])
    assert issubclass(cls, Viewed) and "view" not in vars(cls)
    (hint,) = [parameter.annotation for parameter in inspect.signature(view).parameters.values()]
    assert hint is cls


def test_a_loss_of_ones_own_is_known_to_dam(monkeypatch):
    "A row of LOSSES, added in one place, is a choice in Python, on the command line and in the panel, and is what is trained towards."
    assert DAMTrainConfig().loss_func_name is None and "loss_func_name=None" in repr(DAMTrainConfig())
    with pytest.raises(ValueError, match="loss_func_name='mine': expected one of 'kl'"):
        DAMTrainConfig(loss_func_name="mine")
    monkeypatch.setitem(LOSSES, "mine", loss_of_rows(mse_rows, "a loss of one's own"))
    assert parse("dam-train", ["--loss_func_name", "mine"]) == parse("dam-train", ["--loss", "mine"]) == DAMTrainConfig(loss="mine")
    assert parse("dam-train", ["--loss_func_name", "none"]) == DAMTrainConfig()
    told = {facts["flags"][0]: facts for facts in told_options(parser_of("dam-train", COMMANDS["dam-train"], DAMTrainConfig))}
    assert told["--loss_func_name"]["choices"] == [*LOSSES, "none"]
    panel = ConfigPanel(DAMTrainConfig, checks={})
    assert "mine" in panel.controls["loss_func_name"].choices
    panel.set("loss", "mine")
    assert panel.config.loss_func_name == "mine" and not panel.errors
    merger = DAMMerger(tiny_experts("llama", 2), MergerConfig(["a", "b", "base"], "vector_input", "delta"), tiny_model("llama"))
    objective = dam_objective(panel.config, merger)
    assert objective.losses == {"mine": 1.0}
    ids = torch.arange(8)[None] + 3
    results = merger(ids, labels=ids, source=torch.tensor([1]), objective=objective)
    assert results["mine"] > 0 and results["loss"].item() == pytest.approx(results["mine"].item())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_beside_the_switches_or_without_its_teachers_is_refused(name):
    assert DAMTrainConfig(loss_func_name=name).loss_func_name == name
    with pytest.raises(ValueError, match="takes the place of the switches"):
        DAMTrainConfig(loss_func_name=name, use_entropy=True)
    stored = dict(loss_func_name=name, generate_logits_on_fly=False)
    if LOSSES[name].is_taught and not LOSSES[name].topk:
        with pytest.raises(ValueError, match="asks whole teachers"):
            DAMTrainConfig(**stored)
    else:
        assert DAMTrainConfig(**stored).loss_func_name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "'seed' stands there twice .*line 3"),
        ("dataset_configs:\n  a.jsonl: 1\n  a.jsonl: 2\n", "'a.jsonl' stands there twice .*line 3"),
        ("output_dir: 2024-05-35\n", "o.yaml: not a YAML file: day"),
    ],
)
def test_yaml_that_would_lose_a_value_is_refused_with_file_and_line(text, message, tmp_path):
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"o\.yaml: not a YAML file: .*{message}" if "twice" in message else message):
        config_from_yaml(CONFIGS["mask-merge"], tmp_path / "o.yaml")
    with pytest.raises(ValueError, match="'a' stands there twice"):
        parse("mask-merge", ["--dataset_configs", "{a: 1, a: 2}"])


def test_values_are_not_cast_in_silence(tmp_path):
    for cls in CONFIGS.values():
        hints = typing.get_type_hints(cls)
        numbers = [field.name for field in dataclasses.fields(cls) if field.init and {hints[field.name], *typing.get_args(hints[field.name])} <= {int, float, type(None)}]
        for number in numbers:
            with pytest.raises(ValueError, match=rf"{number}=True: expected a number"):
                cls(**{number: True})
    (tmp_path / "o.yaml").write_text("output_dir: 2024-05-01\n")
    with pytest.raises(ValueError, match="output_dir=.*quote it"):
        config_from_yaml(CONFIGS["lora"], tmp_path / "o.yaml")
    for samples in (True, 2.5, "1e3", [1]):
        with pytest.raises(ValueError, match="the number of samples must be a whole number"):
            CONFIGS["mask-merge"](dataset_configs={"a.jsonl": samples})
    assert CONFIGS["mask-merge"](dataset_configs={"a": "all", "b": None, "c": "3", "d": 4}).dataset_configs == {"a": None, "b": None, "c": 3, "d": 4}


def test_what_is_printed_for_copying_uses_the_main_names():
    "Commands in README and notebooks, and what `merge-lab real` runs."
    from merge_lab.real import all_steps, RealConfig

    steps = [list(step.words) for step in all_steps(RealConfig(), Path("root"))]
    root = Path(__file__).resolve().parent.parent
    texts = [root / "README.md", root / "CONTRIBUTING.md", *root.glob("nbs/**/*.ipynb")]
    for file in texts:
        cells = json.loads(file.read_text())["cells"] if file.suffix == ".ipynb" else [{"cell_type": "markdown", "source": [file.read_text()]}]
        for text in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"):
            steps += [line.split("merge-lab ", 1)[1].split() for line in text.replace("\\\n", " ").splitlines() if "merge-lab " in line]
    found = [words for words in steps if words and words[0] in CONFIGS]
    assert len(found) > 20
    for name, *words in found:
        flags = {re.match(r"[\w-]*", word[2:])[0] for word in words if word.startswith("--")}
        assert not flags & alias_names(CONFIGS[name]).keys(), (name, words)


def test_the_module_is_the_command_too(tmp_path):
    words = ["mask-merge", "nowhere", "nor-here", "--datasets", "none", "--output_dir", str(tmp_path / "run")]
    found = subprocess.run([sys.executable, "-m", "merge_lab.cli", *words], check=False, capture_output=True, text=True)
    assert found.returncode == 2 and "merge-lab mask-merge: " in found.stderr and "Traceback" not in found.stderr
