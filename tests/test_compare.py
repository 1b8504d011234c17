"Opponents are what they are called, and a comparison that was stopped is the comparison it would have been."

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from merge_lab import compare, search
from merge_lab.chat import load_task, write_jsonl
from merge_lab.cli import main, parse
from merge_lab.compare import CompareConfig, read_suite, run, trained_config
from merge_lab.components import load_model
from merge_lab.config import config_from_yaml
from merge_lab.lineup import average, line_up, Lineup
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.opponents import as_recipe, merge_by_mergekit, merge_recipe, METHODS, OPPONENTS, start_of, starts_of, write_mergekit_recipe
from merge_lab.regmean import regmean, regmean_plus
from merge_lab.run_folder import begin_run, bundled_path, read_rows, RunInterrupted
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model
from small_runs import stopping_at

pytest.importorskip("optuna")
pytest.importorskip("mergekit.merge_methods.api")
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}  # what is dropped depends on the order of tensors


def lined_up(experts, base=None, paths=("a", "b"), rows=()):
    "A line-up of models in memory."
    states = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in experts]
    ancestor = None if base is None else {name: p.detach().clone() for name, p in base.named_parameters()}
    return Lineup([str(path) for path in paths], None if base is None else "base", list("abc"[: len(states)]), states, ancestor, experts[0], None, list(rows))


def read_rows_of(n_tokens, vocab=64, seed=0):
    "Random token rows."
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(4, vocab, (16,), generator=generator).tolist()} for _ in range(n_tokens // 16)]


# ---- mergekit ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_untrained_masks_are_mergekit_s_merge(method, tied):
    "float32, to 1e-6: one coefficient for each component, and the arc between two."
    lineup = lined_up(tiny_experts(n=2, tie_word_embeddings=tied))
    if method == "linear":
        config, setting = MergerConfig(mode="scalar", constrain_mode="identity", mask_init={"strategy": "uniform", "factors": [0.3, 0.7]}), {"weight 1": 0.3, "weight 2": 0.7}
    else:
        config, setting = MergerConfig(mode="scalar", constrain_mode="spherical", mask_init={"strategy": "spherical", "parameters": 0.3}), {"t": 0.3}
    ours = Merger(tiny_experts(n=2, tie_word_embeddings=tied), config).merged_state_dict()
    theirs = merge_by_mergekit(lineup, method, setting)
    assert set(theirs) == set(ours) and ("lm_head.weight" in ours) != tied
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    alone = average(lineup)
    assert any((theirs[name] - alone[name]).abs().max() > 1e-2 for name in alone)


def test_what_is_merged_in_memory_is_what_the_yaml_makes(tmp_path):
    "Every method of mergekit that drops nothing at random, by its own run_merge."
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    experts, base = tiny_experts(n=2), tiny_model(seed=0)
    lineup = lined_up(experts, base, [save_tiny(model, tmp_path / name) for name, model in zip("ab", experts)])
    lineup.base_path = str(save_tiny(base, tmp_path / "base"))
    for method in set(METHODS) - RANDOM:
        settings = [start_of(OPPONENTS[method].space(2))]
        settings += [{name: dial.choices[-1] for name, dial in OPPONENTS[method].space(2).items() if dial.choices}] if any(d.choices for d in OPPONENTS[method].space(2).values()) else []
        for k, setting in enumerate(settings):
            setting = settings[0] | setting | ({"weight 1": 0.9, "weight 2": 0.4} if "weight 1" in settings[0] else {})
            out = tmp_path / f"{method}-{k}"
            recipe = as_recipe(method, setting, lineup.paths, lineup.base_path)
            run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(copy_tokenizer=True, quiet=True))
            ours, theirs = merge_by_mergekit(lineup, method, setting), dict(load_model(out).named_parameters())
            assert set(ours) == set(theirs), method
            for name, tensor in theirs.items():
                torch.testing.assert_close(ours[name], tensor.detach(), rtol=1e-6, atol=1e-6, msg=f"{method} {setting} {name}")


def test_a_recipe_without_base_has_the_first_model_s_settings(tmp_path):
    "mergekit takes them from any of its models, by chance."
    for name, model, end in zip("ab", tiny_experts(n=2), (2, 9)):
        model.config.eos_token_id = model.generation_config.eos_token_id = end
        save_tiny(model, tmp_path / name)
    models = "".join(f"  - model: {tmp_path / name}\n    parameters: {{weight: 0.5}}\n" for name in "ba")
    (tmp_path / "linear.yml").write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\n")
    merge_recipe(tmp_path / "linear.yml", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 9
    merged, a, b = (dict(load_model(tmp_path / name).named_parameters()) for name in ("out", "a", "b"))
    for name in a:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


def test_weights_are_normalised_or_not_as_the_yaml_says(tmp_path):
    lineup = lined_up(tiny_experts(n=2), tiny_model(seed=0))
    lineup.base_path = "base"
    for method, opponent in OPPONENTS.items():
        if opponent.mergekit and "weight 1" in opponent.space(2):
            write_mergekit_recipe(lineup, method, start_of(opponent.space(2)), tmp_path / "it.yml")
            said = (tmp_path / "it.yml").read_text()
            assert "normalize" in said or method == "nuslerp", method  # whose weights are a ratio
    for method in ("linear", "ties"):
        once, twice = (merge_by_mergekit(lineup, method, {"weight 1": w, "weight 2": w} | ({"density": 1.0} if method == "ties" else {})) for w in (0.4, 0.8))
        same = all(torch.allclose(once[name], twice[name], atol=1e-6) for name in once)
        assert same == (method == "linear")


@pytest.mark.parametrize("dropped, whole", [("dare_linear", "task_arithmetic"), ("dare_ties", "ties")])
def test_where_nothing_is_dropped_dare_is_what_it_drops_from(dropped, whole):
    lineup = lined_up(tiny_experts(n=2), tiny_model(seed=0))
    weights = {"weight 1": 0.7, "weight 2": 0.4}
    ours = merge_by_mergekit(lineup, dropped, weights | {"density": 1.0})
    theirs = merge_by_mergekit(lineup, whole, weights | ({"density": 1.0} if whole == "ties" else {}))
    half = merge_by_mergekit(lineup, dropped, weights | {"density": 0.5})
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert any((half[name] - ours[name]).abs().max() > 1e-2 for name in ours)


# ---- closed forms ----


def inputs_of(model, rows, names):
    "What goes into linears, by a full forward of each row: numpy, one row for each token."
    caught = {name: [] for name in names}
    hooks = [model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: caught[name].append(args[0][0].double().numpy())) for name in names]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(x) for name, x in caught.items()}


def nearest(inputs, weights):
    "Least squares over all components' tokens, each component's counted as one: (in, out)."
    scaled = [x / math.sqrt(len(x)) for x in inputs]
    return np.linalg.lstsq(np.concatenate(scaled), np.concatenate([x @ w for x, w in zip(scaled, weights)]), rcond=None)[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_regmean_is_least_squares_on_the_experts_own_inputs(architecture):
    experts = tiny_experts(architecture, n=2)
    rows = [read_rows_of(320, seed=1), read_rows_of(480, seed=2)]
    turned = architecture == "gpt2"  # stores (in, out)
    found, mean = regmean(lined_up(tiny_experts(architecture, n=2), rows=rows), scale=1.0), average(lined_up(experts))
    names = [name for name, module in experts[0].named_modules() if type(module).__name__ in ("Linear", "Conv1D") and f"{name}.weight" in found]
    assert len(names) > 7 or turned
    inputs = [inputs_of(model, some, names) for model, some in zip(experts, rows)]
    for name in names:
        weights = [model.get_submodule(name).weight.detach().double().numpy() for model in experts]
        expected = nearest([x[name] for x in inputs], [w if turned else w.T for w in weights])
        torch.testing.assert_close(found[f"{name}.weight"].double(), torch.tensor(expected if turned else expected.T), rtol=1e-3, atol=1e-3, msg=name)
    rest = set(found) - {f"{name}.weight" for name in names}
    assert rest and all(torch.equal(found[name], mean[name]) for name in rest)


def test_regmean_plus_takes_inputs_from_the_merged_layers_before():
    experts, rows = tiny_experts(n=2), [read_rows_of(320, seed=1), read_rows_of(320, seed=2)]
    found = regmean_plus(lined_up(tiny_experts(n=2), rows=rows), scale=1.0)
    merged = tiny_model()
    merged.load_state_dict(average(lined_up(experts)), strict=False)
    for layer in range(2):
        names = [name for name, module in merged.named_modules() if isinstance(module, torch.nn.Linear) and f"layers.{layer}." in name]
        whole, inputs = {name: p.detach().clone() for name, p in merged.named_parameters()}, []
        for expert, some in zip(experts, rows):
            own = {name: p.detach() for name, p in expert.named_parameters() if f"layers.{layer}." in name}
            merged.load_state_dict(whole | own, strict=False)
            inputs.append(inputs_of(merged, some, names))
        for name in names:
            weights = [expert.get_submodule(name).weight.detach().double().numpy().T for expert in experts]
            whole[f"{name}.weight"] = torch.tensor(nearest([x[name] for x in inputs], weights).T, dtype=torch.float32)
            torch.testing.assert_close(found[f"{name}.weight"], whole[f"{name}.weight"], rtol=2e-3, atol=2e-3, msg=name)
        merged.load_state_dict(whole, strict=False)


# ---- a comparison ----

SMALL = dict(suite="toy-pair", methods=["linear", "ties", "karcher"], trials=4, max_steps=2, train_rows=8, val_rows=8, eval_samples=8, metric="loss", minutes=60.0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Options of a small comparison, on a few rows of the bundled tasks."
    root, datasets = tmp_path_factory.mktemp("compare"), []
    for task in ("rewrite", "summarize"):
        for split in ("train", "validation", "test"):
            write_jsonl(root / task / f"{split}.jsonl", load_task(bundled_path(f"tasks/{task}"), split)[:16])
        datasets.append(str(root / task))
    return SMALL | {"datasets": datasets}
TOOK = ("seconds", "peak GiB")


def what_was_found(result):
    "The table without what the clock says."
    return result.table.drop(columns=[("cost", name) for name in TOOK])


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    return run(CompareConfig(**small, output_dir=str(tmp_path_factory.mktemp("compare") / "whole")))


def test_a_comparison_that_is_stopped_goes_on_to_the_same_table(small, whole, tmp_path, monkeypatch):
    "Stopped in the search, and again in training; a line that was cut off is made again."
    config = CompareConfig(**small, output_dir=str(tmp_path / "cut"))
    usual = search.try_setting
    monkeypatch.setattr(search, "try_setting", stopping_at(3, usual))
    with pytest.raises(RunInterrupted, match="merge-lab compare .*config.yaml --resume"):
        run(config)
    with open(tmp_path / "cut" / "seed-0" / "trials" / "linear.jsonl", "a") as out:
        out.write('{"trial": 1, "set')
    resumed = dataclasses.replace(config, resume=True)
    monkeypatch.setattr(search, "try_setting", usual)
    monkeypatch.setattr(compare, "merge_masks", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(RunInterrupted):
        run(resumed)
    monkeypatch.undo()
    monkeypatch.setattr(compare, "write_compare_report", lambda *_: None)
    assert what_was_found(run(resumed)).equals(what_was_found(whole))
    assert [len(read_rows(file)) for file in sorted((tmp_path / "cut" / "seed-0" / "trials").iterdir())] == [len(read_rows(file)) for file in sorted((whole.folder / "seed-0" / "trials").iterdir())]


def test_rows_after_a_stop_know_whose_manner_answers_have(small, tmp_path, monkeypatch):
    "Base, experts and opponents are there, and masks are not: the experts are not asked again, and masks are compared with what they said."
    config = CompareConfig(**small | dict(metric="exact_match", answered=4, methods=["linear"], trials=1, max_steps=1, together=False), output_dir=str(tmp_path / "run"))
    usual = compare.merge_masks
    monkeypatch.setattr(compare, "merge_masks", stopping_at(1, usual))
    with pytest.raises(RunInterrupted):
        run(config)
    monkeypatch.setattr(compare, "merge_masks", usual)
    monkeypatch.setattr(compare, "line_up", lambda *_: pytest.fail("nothing asks for the experts again"))
    run(dataclasses.replace(config, resume=True))
    told = {row["model"]: [score.get("manners") for score in row["scores"] if score["split"] == "test"] for row in read_rows(tmp_path / "run" / "rows.jsonl")}
    assert {len(manners) for manners in told.values()} == {2}
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-5) for manners in told.values() for shares in manners)
    assert "learned masks" in (tmp_path / "run" / "confusion.csv").read_text()


def test_a_comparison_leaves_what_it_promises(small, whole):
    for name in ("config.yaml", "rows.jsonl", "table.csv", "verdict.txt", "results.json", "report.html", "deltas.csv", "plots/share_against_seconds.png", "plots/deltas.png", "seed-0/best/linear.yml"):
        assert (whole.folder / name).is_file(), name
    assert "no spread is known (one seed)" in whole.verdict and "more than the spread" not in whole.verdict
    assert whole.verdict.startswith("Use ") and whole.verdict.split(";")[0] in (whole.folder / "report.html").read_text()
    assert whole.table.loc["base", ("worst task", "recovered")] == 0 and ("cost", "steps") not in whole.table
    assert [row["steps"] for row in read_rows(whole.folder / "rows.jsonl") if row["model"] in ("learned masks", "trained on all data")] == [2, 2]
    trained = whole.table.loc["learned masks", ("cost", "trained numbers")]
    assert trained == sum(np.prod(shape) for shape in mask_shapes(whole.folder / "seed-0" / "learned-masks" / "masks"))
    with pytest.raises(ValueError, match="resume: trials=9"):
        run(CompareConfig(**small | {"trials": 9}, output_dir=str(whole.folder), resume=True))
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(CompareConfig(**small, output_dir=str(whole.folder)))


def test_finished_merges_are_chosen_on_more_rows_than_settings(small, whole, tmp_path):
    "Each row's nats are kept, so that the verdict knows how far the rows can be trusted; raw data hold what came of them."
    rows = read_rows(whole.folder / "rows.jsonl")
    kept = [score for row in rows for score in row["scores"] if score["split"] == "validation"]
    assert {len(score["nats"]) for score in kept} == {16} and small["val_rows"] == 8
    for score in kept:
        assert score["loss"] == pytest.approx(sum(score["nats"]) / sum(score["tokens"]), rel=1e-12)
    record = compare.Record(whole.folder)
    tried = json.loads((whole.folder / "seed-0" / "trials" / "karcher.jsonl").read_text().splitlines()[0])  # it has nothing to set
    assert record.on_validation(0, "karcher", 8) == pytest.approx(tried["losses"], rel=1e-5) != record.on_validation(0, "karcher", 16)
    assert "nats" not in (whole.folder / "results.json").read_text()
    table, deltas, _ = compare.read_comparison(whole.folder / "results.json")
    assert compare.verdict(table, deltas) == whole.verdict and table[("worst task", "error")].max() > 0
    (older_folder := tmp_path / "older").mkdir()
    older = [{**row, "scores": [{name: value for name, value in score.items() if name not in ("nats", "tokens")} for score in row["scores"]]} for row in rows]
    assert ("worst task", "error") not in compare.comparison_table(compare.scores_of(older), compare.costs_of(older), {"rewrite": "expert: rewrite", "summarize": "expert: summarize"})
    (older_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    with pytest.raises(ValueError, match="an older build wrote these rows"):
        compare.Record(older_folder)


@pytest.mark.parametrize("expert", [1.0, 1.04])
def test_a_merge_that_is_worse_than_the_base_is_never_chosen(expert):
    "An expert may be hardly better than its base on these rows, or no better: then nothing is said."
    draw, losses = np.random.default_rng(0), {"base": 1.03, "expert: a": expert, "good": 1.005, "poor": 1.06}
    hard = draw.gamma(4, 0.25, 40)
    rows = [
        dict(seed=0, model=model, task="a", split=split, nats=list(nats), tokens=[10] * 40, loss=sum(nats) / 400)
        for model, loss in losses.items() for nats in [10 * loss * (hard / hard.mean()) + 0.3 * draw.standard_normal(40)] for split in ("validation", "test")
    ]  # fmt: skip
    costs = [dict(seed=0, model=model, seconds=seconds, peak_bytes=1, trained=1, trials=1) for model, seconds in (("good", 100.0), ("poor", 1.0))]
    table = compare.comparison_table(pd.DataFrame(rows), pd.DataFrame(costs), {"a": "expert: a"})
    assert compare.verdict(table).startswith("Use good." if expert == 1.0 else "Nothing can be said")


def mask_shapes(folder):
    "Shapes of a merger's masks, without the base's own."
    from safetensors import safe_open

    with safe_open(str(folder / "masks.safetensors"), "pt") as file:
        return [(2, *file.get_slice(name).get_shape()[1:]) for name in file.keys()]  # noqa: SIM118


@pytest.mark.parametrize(
    "words, said",
    [
        (["--suite", "toy-par"], "none of the bundled suites: mergebench-llama-3.2-3b, real-pair, real-triple, toy-pair, toy-six, toy-triple"),
        (["a", "b"], "expected one for each of 2 models"),
        (["only"], "at least two models"),
        (["--suite", "toy-pair", "--recipes", "recipe.yml"], "recipe.yml: not a YAML file"),
        (["--suite", "toy-pair", "--recipes", "other.yml"], "it needs merge_method and models"),
        (["--suite", "suite.yaml"], "unknown option 'model_pats'"),
        (["--suite", "toy-triple", "--methods", "slerp"], "it merges two components, and there are 3"),
        (["--suite", "toy-pair", "--base", "nowhere", "--methods", "ties"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text("merge_method: [ties\n")
    Path("other.yml").write_text("models: 3\n")
    Path("suite.yaml").write_text("model_pats: [a, b]\n")
    assert main(["compare", *words]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told and told.startswith("merge-lab compare:") and "Traceback" not in told
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["compare", "ablate"])
def test_a_suite_may_stand_where_a_file_with_options_may(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("about: my pair\nmodel_paths: [a, b]\ndatasets: [c, d]\nmax_steps: 3\n")
    asked = parse(command, ["mine.yaml", "--seeds", "2"])
    assert [asked.suite, asked.seeds] == ["mine.yaml", 2]
    assert compare.with_suite(asked).max_steps == 3


def test_paths_of_a_suite_stand_beside_it_or_where_the_command_starts(tmp_path, monkeypatch):
    (tmp_path / "suites").mkdir()
    for name in ("suites/a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "suites" / "mine.yaml").write_text("about: two of mine\nmodels: [a, b]\ndata: [a, nowhere]\nminutes: 3\n")
    monkeypatch.chdir(tmp_path)
    read = read_suite("suites/mine.yaml")
    assert read == {"model_paths": [str(tmp_path / "suites" / "a"), "b"], "datasets": [str(tmp_path / "suites" / "a"), "nowhere"], "minutes": 3}
    asked = compare.with_suite(CompareConfig(suite="suites/mine.yaml", trials=2))
    assert (asked.minutes, asked.trials) == (3.0, 2)


def test_a_flag_wins_over_the_suite_also_where_it_is_the_default(tmp_path, monkeypatch):
    "Also when the run is taken up again from its config.yaml, which says everything."
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("trials: 3\nminutes: 5\ntogether: false\n")
    usual = CompareConfig()
    asked = compare.with_suite(parse("compare", ["--suite", "mine.yaml", "--trials", str(usual.trials), "--together", "True"]))
    assert (asked.trials, asked.minutes, asked.together) == (usual.trials, 5.0, True)
    begin_run(dataclasses.replace(asked, output_dir="run"))
    again = compare.with_suite(parse("compare", ["run/config.yaml", "--resume"]))
    assert (again.trials, again.minutes, again.together) == (usual.trials, 5.0, True)
    assert compare.with_suite(CompareConfig(suite="mine.yaml", trials=usual.trials)).trials == usual.trials
    assert compare.with_suite(CompareConfig(suite="mine.yaml")).trials == 3


def test_a_method_stays_on_the_ladder_by_its_better_beginning(tmp_path, monkeypatch):
    "Sums of deltas begin at 1.6/n each and at 1/n; the first alone would have lost them."
    made = []
    for n in (2, 3, 6):
        first, second = starts_of(OPPONENTS["ties"].space(n))
        assert (first["weight 1"], second["weight 1"]) == (pytest.approx(min(1, 1.6 / n)), pytest.approx(1 / n)) and first["density"] == second["density"]

    def tried(lineup, judge, method, setting, seed=0):
        made.append(method)
        worst = {"ties": 0.9 if setting.get("weight 1") == 0.5 else 0.1, "linear": 0.5, "karcher": 0.4, "sce": 0.3}[method]
        return {"setting": setting, "losses": {}, "worst": worst, "error": None, "seconds": 0.0}

    monkeypatch.setattr(search, "try_setting", tried)
    files = {method: tmp_path / f"{method}.jsonl" for method in ("linear", "karcher", "ties", "sce")}
    compare.climb(lined_up(tiny_experts(n=2)), None, files, 4, math.inf, 0)
    assert {method: made.count(method) for method in files} == {"linear": 1, "karcher": 1, "ties": 4, "sce": 1}


def test_nobody_gets_a_second_trial_before_everybody_had_the_first(tmp_path, monkeypatch):
    "Time for five trials: closed forms, which stand last in the list, are among them."
    made = []

    def tried(lineup, judge, method, setting, seed=0):
        made.append(method)
        return {"setting": setting, "losses": {}, "worst": 0.5, "error": None, "seconds": 1.0}

    monkeypatch.setattr(search, "try_setting", tried)
    methods = ["linear", "karcher", "task_arithmetic", "ties", "dare_ties", "della", "regmean", "regmean++", "wudi-like"]
    files = {method: tmp_path / f"{method}.jsonl" for method in methods}
    late = search.climb(lined_up(tiny_experts(n=2)), None, files, 4, 5.0, 0)
    assert made == ["linear", "task_arithmetic", "ties", "regmean++", "wudi-like"]
    assert late == ["karcher", "dare_ties", "della", "regmean"]
    assert search.climb(lined_up(tiny_experts(n=2)), None, files, 4, 9.0, 0) == [] and len(made) == len(set(made)) == 9


@pytest.mark.parametrize("methods", [["linear"], ["linear", "ties"]])
def test_opponents_without_time_are_named(small, methods, tmp_path, caplog):
    asked = small | dict(methods=methods, minutes=0, trained=["none"], together=False)
    result = run(CompareConfig(**asked, output_dir=str(tmp_path / "run")))
    named = f"{', '.join(methods)}, since there was no time for any setting"
    assert result.verdict.startswith("Use uniform average.") and named in result.verdict and named in caplog.text
    assert named in (tmp_path / "run" / "report.html").read_text()
    table, deltas, facts = compare.read_comparison(tmp_path / "run" / "results.json")
    assert compare.verdict(table, deltas, facts["left_out"]) == result.verdict


def test_training_that_time_ended_is_told(small, tmp_path, caplog):
    "One step of sixty, of masks and of the model that is trained on all data; rows of older builds do not know."
    asked = small | dict(methods=["linear"], minutes=0, max_steps=60)
    result = run(CompareConfig(**asked, output_dir=str(tmp_path / "run")))
    rows = {row["model"]: row for row in read_rows(tmp_path / "run" / "rows.jsonl")}
    for name in ("learned masks", "trained on all data"):
        assert (rows[name]["steps"], rows[name]["planned"]) == (1, 60) == tuple(result.table.loc[name, [("cost", "steps"), ("cost", "planned steps")]])
        assert f"{name} after 1 of 60 steps" in result.verdict and f"{name}: time was over after 1 of 60 steps" in caplog.text
    assert rows["base"]["steps"] is None and "after 1 of 60 steps" in (tmp_path / "run" / "report.html").read_text()
    older = compare.costs_of([{name: value for name, value in row.items() if name not in ("steps", "planned")} for row in rows.values()])
    assert "after 1 of 60" not in compare.verdict(compare.comparison_table(compare.scores_of(list(rows.values())), older, {"rewrite": "expert: rewrite", "summarize": "expert: summarize"}))


def a_recipe(file, weight="weight"):
    "The bundled pair as YAML."
    models = "".join(f"  - model: {bundled_path(f'models/{task}')}\n    parameters: {{{weight}: 0.5}}\n" for task in ("rewrite", "summarize"))
    stored = json.loads((bundled_path("models/rewrite") / "config.json").read_text())["dtype"]
    file.write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\nout_dtype: {stored}\n")
    return str(file)


def test_a_recipe_that_cannot_be_merged_is_left_out_before_the_search(small, tmp_path, monkeypatch, caplog):
    "mergekit finds the mistake; the other recipe is a row, the same as the method's, also after a stop."
    recipes = [a_recipe(tmp_path / "bad.yml", weight="wieght"), a_recipe(tmp_path / "good.yml")]
    asked = small | dict(methods=["linear"], trials=1, trained=["none"], together=False, recipes=recipes)
    config, usual, merged = CompareConfig(**asked, output_dir=str(tmp_path / "run")), compare.climb, []
    monkeypatch.setattr(compare, "climb", stopping_at(1, usual))
    with pytest.raises(RunInterrupted):
        run(config)
    assert "left out: recipe: bad, since mergekit cannot merge this" in caplog.text and "weight" in caplog.text
    monkeypatch.setattr(compare, "climb", usual)
    monkeypatch.setattr(compare, "merge_recipe", lambda recipe, *rest: merged.append(Path(recipe).stem) or merge_recipe(recipe, *rest))
    result = run(dataclasses.replace(config, resume=True))
    assert merged == ["bad"] and "recipe: bad" not in result.table.index  # what is merged stays
    assert "Left out: recipe: bad, since mergekit cannot merge this" in result.verdict and "recipe: bad" in (tmp_path / "run" / "report.html").read_text()
    ours, theirs = (result.table.loc[name] for name in ("linear", "recipe: good"))
    for column in (("rewrite", "loss"), ("summarize", "loss"), ("worst task", "recovered"), ("worst task", "on validation")):
        assert theirs[column] == pytest.approx(ours[column], abs=1e-5), column
    assert str(tmp_path) not in (tmp_path / "run" / "results.json").read_text()


def test_models_are_not_held_once_a_search_is_over(tmp_path):
    "In a process of its own, where nothing was imported before: what optuna keeps of its first import kept the line-up."
    script = """
import dataclasses, gc, sys, weakref
from merge_lab.lineup import Lineup
from merge_lab.search import Judge, search
from merge_lab.opponents import OPPONENTS

class Judged(Judge):
    def losses(self, lineup, tensors):
        return {"a": 1.0}

class Few(Lineup):
    def __init__(self):
        self.states = [{}, {}]

def searched():
    lineup = Few()
    judge = Judged({"a": []}, {"a": 0}, {"a": 0.0}, {"a": 2.0})
    OPPONENTS["task_arithmetic"] = dataclasses.replace(OPPONENTS["task_arithmetic"], merge=lambda *_: {})
    search(lineup, judge, "task_arithmetic", sys.argv[1], trials=8)
    return weakref.ref(lineup)

held = searched()
gc.collect()
assert "optuna" in sys.modules and held() is None
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "trials.jsonl")], check=True)


def test_a_common_strength_is_found_with_few_trials(tmp_path):
    "Eight trials are as good as 0.6 each; the first rung makes the two beginnings only."
    tasks = {name: bundled_path(f"tasks/{name}") for name in ("rewrite", "summarize")}
    lineup = line_up([bundled_path(f"models/{name}") for name in tasks], bundled_path("models/base"), list(tasks.values()), rows=1)
    judge = search.judge_of(lineup, {name: load_task(folder, "validation")[:16] for name, folder in tasks.items()})
    trials = search.search(lineup, judge, "task_arithmetic", tmp_path / "trials.jsonl", trials=8)
    alike = search.try_setting(lineup, judge, "task_arithmetic", {"weight 1": 0.6, "weight 2": 0.6})
    assert search.best_of(trials)["worst"] >= alike["worst"] - 1e-6
    assert search.quotas(["task_arithmetic", "ties", "wudi-like", "regmean"], 0.0, 16, 2) == {"task_arithmetic": 2, "ties": 2, "wudi-like": 2, "regmean": 1}
    assert search.quotas(["task_arithmetic", "regmean"], 0.25, 8, 2) == {"task_arithmetic": 5, "regmean": 2}


def test_the_training_of_masks_is_told_where_it_is_asked(tmp_path):
    asked = CompareConfig(["a", "b"], datasets=["c", "d"], report_to="tensorboard")
    assert trained_config(asked, "learned masks", tmp_path / "run", 0).report_to == "tensorboard"
    suite = CompareConfig(suite="toy-pair", report_to="nobody", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="report_to='nobody'"):
        run(suite)


NUMBERS = dict(suite="toy-six", components=[2, 3], methods=["linear"], trials=1, max_steps=1, train_rows=4, val_rows=4, eval_samples=6, answered=4, together=False)


def test_several_numbers_of_components_are_one_study_that_goes_on(tmp_path, monkeypatch):
    "Stopped in the second; the first is not made again."
    config = CompareConfig(**NUMBERS, output_dir=str(tmp_path / "run"))
    usual = compare.merge_masks
    monkeypatch.setattr(compare, "merge_masks", stopping_at(2, usual))
    with pytest.raises(RunInterrupted, match="merge-lab compare .*run/config.yaml --resume"):
        run(config)
    made = (tmp_path / "run" / "components-2" / "rows.jsonl").read_bytes()
    monkeypatch.setattr(compare, "merge_masks", usual)
    result = run(parse("compare", [str(tmp_path / "run" / "config.yaml"), "--resume"]))
    assert (tmp_path / "run" / "components-2" / "rows.jsonl").read_bytes() == made
    assert list(result.table.index) == [2, 3] and set(result.table["best other merge", "which"]) == {"linear"}
    for name in ("components.csv", "verdict.txt", "report.html", "plots/share_against_number.png", "components-3/report.html", "components-3/confusion.csv"):
        assert (tmp_path / "run" / name).is_file(), name
    three, _, facts = compare.read_comparison(tmp_path / "run" / "components-3" / "results.json")
    assert "--components 3" in facts["command"] and set(facts["experts"]) == {"rewrite", "summarize", "extract"}
    assert three.loc["expert: extract", ("rewrite", "confused")] == 1 and three.loc["expert: extract", ("rewrite", "as")] == "extract"
    assert three.loc["expert: rewrite", ("rewrite", "confused")] == 0 and three.loc["expert: rewrite", ("rewrite", "as")] == ""
    told = (tmp_path / "run" / "components-3" / "report.html").read_text()
    assert "In whose manner" in told and "confused" in (tmp_path / "run" / "components-3" / "table.csv").read_text()
    with pytest.raises(ValueError, match="there are 6 models"):
        run(CompareConfig(suite="toy-six", components=[7], output_dir=str(tmp_path / "seven")))


def test_what_is_done_goes_on_with_more_seeds(small, tmp_path):
    "As if they had been asked for at once."
    few = dict(small, methods=["ties"], together=False)
    once = run(CompareConfig(**few, seeds=2, output_dir=str(tmp_path / "once")))
    run(CompareConfig(**few, output_dir=str(tmp_path / "more")))
    first = (tmp_path / "more" / "rows.jsonl").read_bytes()
    more_asked = parse("compare", [str(tmp_path / "more" / "config.yaml"), "--seeds", "2", "--resume"])
    more = run(more_asked)
    assert (tmp_path / "more" / "rows.jsonl").read_bytes().startswith(first)
    with pytest.raises(ValueError, match="seeds=1: rows of seed 1 are in .* Give 2 or more"):
        run(dataclasses.replace(more_asked, seeds=1))
    with pytest.raises(ValueError, match="minutes=7: the run in .* was begun with 120, which would now be 120"):
        run(dataclasses.replace(more_asked, minutes=7.0))
    with pytest.raises(ValueError, match="seed=3, but the run in .* was begun with 0"):
        run(dataclasses.replace(more_asked, seed=3))
    assert [config_from_yaml(CompareConfig, tmp_path / name / "config.yaml").minutes for name in ("once", "more")] == [60, 120]  # as much for each seed as the first had
    assert what_was_found(more).equals(what_was_found(once)) and more.table.loc["learned masks", ("worst task", "spread")] > 0


def test_mergebench_s_layout_is_a_suite(tmp_path, monkeypatch):
    "The toys, called as its models and data are, with training rows in its columns."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGE_LAB_CACHE", str(tmp_path / "cache"))
    for domain, task, question, answer in (("math", "rewrite", "query", "response"), ("multilingual", "summarize", "inputs", "targets")):
        Path(f"bench/{domain}_val").mkdir(parents=True)
        Path(f"bench/Toy_{domain}").symlink_to(bundled_path(f"models/{task}"))
        rows = [row["messages"] for row in load_task(bundled_path(f"tasks/{task}"), "train")[:60]]
        Path(f"bench/{domain}_val/train.jsonl").write_text("".join(json.dumps({question: asked["content"], answer: said["content"]}) + "\n" for asked, said in rows))
    Path("bench/Toy").symlink_to(bundled_path("models/base"))
    Path("mine.yaml").write_text("mergebench: {base: bench/Toy, root: bench, domains: [math, multilingual]}\nmetric: loss\n")
    result = run(CompareConfig(suite="mine.yaml", methods=["linear"], trained=["none"], trials=1, train_rows=4, together=False, output_dir="run"))
    assert {"math.jsonl", "multilingual.jsonl"} <= set(result.table.columns.get_level_values(0))
    assert result.table.loc["expert: Toy_math", ("worst task", "recovered")] < 0 < result.table.loc["linear", ("worst task", "recovered")]
