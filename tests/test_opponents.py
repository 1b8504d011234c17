"Each opponent's row is what another computation makes of the same tiny models."

import itertools
import json

import numpy as np
import pytest
import torch
from merge_lab import together
from merge_lab.adapters import load_base, make_lora_config, quiet_peft
from merge_lab.chat import ChatCollator, load_task
from merge_lab.checkpoints import load_tokenizer
from merge_lab.compare import CompareConfig, trained_config
from merge_lab.components import load_model
from merge_lab.evaluation import evaluate_tasks
from merge_lab.lineup import Lineup, training_rows
from merge_lab.merger import Merger
from merge_lab.regmean import collect_grams, delta_grams, gram_names
from merge_lab.run_folder import bundled_path
from merge_lab.search import Judge
from merge_lab.systems.lora_merge import BASELINES, peft_baselines
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_model, tiny_tokenizer
from merge_lab.training import objective_of
from peft import get_peft_model
from torch.func import functional_call

TASKS = ("rewrite", "summarize")


@pytest.fixture
def lineup(tmp_path):
    "Two tiny experts, their base, and random rows."
    experts, base = tiny_experts(n=2), tiny_model(seed=0)
    paths = [str(save_tiny(model, tmp_path / name)) for name, model in zip("ab", experts)]
    states = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in experts]
    ancestor = {name: p.detach().clone() for name, p in base.named_parameters()}
    return Lineup(paths, str(save_tiny(base, tmp_path / "base")), ["a", "b"], states, ancestor, experts[0], tiny_tokenizer())


# ---- closed forms (RegMean and RegMean++ are in test_compare.py) ----


@pytest.mark.parametrize("ridge", [0.01, 0.1, 10.0])
def test_wudi_like_is_the_foot_of_the_pulled_loss(lineup, ridge):
    "Its weights are what a descent on the loss with the ridge comes to, in numpy."
    found = delta_grams(lineup, ridge)
    for name in list(gram_names(lineup))[:4]:
        base = lineup.base[f"{name}.weight"].double().numpy()
        deltas = [state[f"{name}.weight"].double().numpy() - base for state in lineup.states]
        grams = [delta.T @ delta / (delta**2).sum() for delta in deltas]
        middle, pull = sum(deltas) / 2, ridge * np.diag(sum(grams)).mean()
        tau = np.zeros_like(base)
        step = 1 / (np.linalg.eigvalsh(sum(grams)).max() + pull)
        momentum, before = tau, tau
        for k in range(2000):  # Nesterov, which knows nothing of a solution
            slope = sum((momentum - delta) @ gram for delta, gram in zip(deltas, grams)) + pull * (momentum - middle)
            tau, before = momentum - step * slope, tau
            momentum = tau + k / (k + 3) * (tau - before)
        np.testing.assert_allclose(found[f"{name}.weight"].double().numpy() - base, tau, atol=1e-3 * np.abs(tau).max(), err_msg=name)


def test_rows_that_are_read_together_are_rows_that_are_read_alone(lineup):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(4, 64, (length,), generator=generator).tolist()} for length in (5, 9, 5, 5, 9, 12)]
    modules = gram_names(lineup)
    whole, alone = collect_grams(lineup.model, rows, modules), {}
    for row in rows:
        for name, gram in collect_grams(lineup.model, [row], modules).items():
            alone[name] = alone.get(name, 0) + gram * len(row["input_ids"])
    for name, gram in whole.items():
        torch.testing.assert_close(gram, alone[name] / sum(len(row["input_ids"]) for row in rows), rtol=1e-5, atol=1e-6, msg=name)


# ---- AdaMerging ----


def test_adamerging_descends_on_the_entropy_of_what_the_merge_says(tmp_path):
    "One number for each tensor and component: the loss, and the slope of each number, by torch.func on a plain model."
    suite = CompareConfig([str(bundled_path(f"models/{task}")) for task in TASKS], datasets=[str(bundled_path(f"tasks/{task}")) for task in TASKS], base_model=str(bundled_path("models/base")), dtype="float32")
    config = trained_config(suite, "adamerging", tmp_path / "run", 0)
    assert (config.mode, config.learning_rate, config.loss_func_name, config.mask_init["factors"]) == ("scalar", 1e-3, "entropy", [0.3, 0.3])
    merger, base = Merger.from_config(config), load_model(suite.base_model)
    experts = [load_model(path) for path in suite.model_paths]
    tokenizer = load_tokenizer(suite.base_model)
    rows = [row | {"source": source} for source, some in enumerate(training_rows(suite.datasets, tokenizer, 3)) for row in some]
    batch = ChatCollator(tokenizer)(rows)
    loss = merger(**batch, objective=objective_of(config))["loss"]
    loss.backward()

    shares = {name: torch.full((2,), 0.3, requires_grad=True) for name, _ in base.named_parameters()}
    start = {name: p.detach() for name, p in base.named_parameters()}
    whole = {name: start[name] + sum(shares[name][i] * (expert.get_parameter(name).detach() - start[name]) for i, expert in enumerate(experts)) for name in shares}
    logits = functional_call(base, whole, (batch["input_ids"],), {"attention_mask": batch["attention_mask"]}).logits[:, :-1]
    said = batch["labels"][:, 1:] != -100
    chances = logits[said].softmax(-1)
    entropy = -(chances * chances.clamp(min=1e-30).log()).sum(-1).mean()
    entropy.backward()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-4)
    for name, leaf, key in merger.masked_parameters():
        slope = leaf.masks[key].grad[:2].flatten()
        torch.testing.assert_close(slope, shares[name].grad, rtol=2e-3, atol=1e-5, msg=name)


# ---- one model that is trained on all data ----


def test_training_on_all_data_is_adamw_on_the_labels(lineup):
    "Three steps by hand: warm-up of a tenth, a cosine to zero, gradients clipped at 1."
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": (ids := torch.randint(4, 64, (7,), generator=generator).tolist()), "labels": [-100] * 3 + ids[3:]} for _ in range(8)]
    found, made = together.train_together(lineup, rows, steps=3, rate=1e-3, batch_size=4, seed=5)
    assert made == 3
    model = tiny_model(seed=0)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    batches = itertools.islice(together.shuffled_batches(rows, ChatCollator(lineup.tokenizer), 4, 5), 3)
    for step, batch in enumerate(batches):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / 3))  # a tenth of three steps is none
        with torch.no_grad():
            for (name, p), grad in zip(model.named_parameters(), grads):
                grad, (first, second) = grad * min(1.0, 1.0 / (norm + 1e-6)), moments[name]
                first.mul_(0.9).add_(grad, alpha=0.1)
                second.mul_(0.999).addcmul_(grad, grad, value=0.001)
                p.mul_(1 - rate * 0.01)
                p.sub_(rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=2e-5, msg=name)


def test_the_step_size_of_the_row_is_the_best_on_validation_rows(lineup, monkeypatch):
    tasks = {name: load_task(bundled_path(f"tasks/{name}"), "validation")[:4] for name in TASKS}
    judge = Judge(tasks, dict(zip(tasks, range(2))))
    shares = {1e-3: 0.2, 3e-4: 0.7, 1e-4: 0.4}
    monkeypatch.setattr(together, "train_together", lambda lineup, rows, steps, rate, *_: (rate, steps))

    def losses(lineup, rate):
        if rate == 3e-3:
            raise ValueError("the loss is nan")
        return rate

    monkeypatch.setattr(judge, "losses", losses)
    monkeypatch.setattr(judge, "worst", lambda rate: shares[round(rate, 6)])
    assert together.best_together(lineup, judge, [], 1) == (3e-4, 3e-4, 0.7, 4, 1)
    shares |= {9e-3: 0.9, 0.027: 0.8}
    monkeypatch.setattr(judge, "losses", lambda lineup, rate: rate)
    shares[3e-3] = 0.75
    assert together.best_together(lineup, judge, [], 1)[1:] == (pytest.approx(9e-3), 0.9, 6, 1)  # followed upwards until it gets worse


def test_what_does_not_fit_is_left_out(lineup, monkeypatch):
    assert together.why_no_room(lineup) == ""
    monkeypatch.setattr(together, "free_memory", lambda _: 16 * sum(p.numel() for p in lineup.states[0].values()) - 1)
    assert "are free" in together.why_no_room(lineup)


# ---- adapters: peft's combinations ----


def elected(tensors, density):
    "TIES of weighted tensors: the largest entries of each, the sign with more weight, the mean of what has it."
    kept = []
    for tensor in tensors:
        k = int(density * tensor.numel())
        rest = torch.zeros_like(tensor).flatten()
        places = tensor.abs().flatten().topk(k).indices
        rest[places] = tensor.flatten()[places]
        kept.append(rest.view_as(tensor))
    sign = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [tensor.sign() == sign for tensor in kept]
    return sum(torch.where(mask, tensor, torch.zeros(())) for tensor, mask in zip(kept, agree)) / sum(mask.float() for mask in agree).clamp(min=1)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("method", list(BASELINES))
def test_peft_s_combination_is_what_its_formula_says(method, weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tiny_model("llama"), "base")
    for seed, folder in enumerate(("one", "two")):
        torch.manual_seed(seed)
        base = load_base("base", "cpu")
        with quiet_peft():
            model = get_peft_model(base, make_lora_config(base, dict(r=4, lora_alpha=8, use_rslora=False)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    ((_, model),) = peft_baselines("base", ["one", "two"], weight, [method], device="cpu")
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or "blend" not in module.lora_A:
            continue
        A, B = ([part[one].weight.detach() for one in ("default", "adapter_1")] for part in (module.lora_A, module.lora_B))
        scale = 8 / 4
        delta = module.get_delta_weight("blend").detach()
        if method in ("average", "cat"):
            wanted = sum((0.5 if method == "average" else weight) * scale * b @ a for a, b in zip(A, B))
        elif method in ("linear", "ties"):
            part = (weight * scale) ** 0.5  # of each factor
            join = sum if method == "linear" else lambda some: elected(some, BASELINES["ties"]["density"])
            wanted = join([part * b for b in B]) @ join([part * a for a in A])
        else:  # what is dropped is chance: every entry is made of those that stayed, each twice as large
            part, ways = (weight * scale) ** 0.5 / BASELINES[method]["density"], list(itertools.product((0, 1), repeat=2))
            for blended, factors in ((module.lora_A["blend"].weight, A), (module.lora_B["blend"].weight, B)):
                share = [max(1, sum(way)) if method == "dare_ties" else 1 for way in ways]  # of one sign, the mean
                sums = torch.stack([sum(on * part * factor for on, factor in zip(way, factors)) / n for way, n in zip(ways, share)])
                near = (sums - blended.detach()).abs().min(0).values
                assert near.max() < 1e-5, name
                stayed = (blended != 0).float().mean().item()
                assert 0.4 < stayed < 0.95
            continue
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5, msg=name)


# ---- what a row is scored by ----


def test_scores_of_a_row_are_evaluate_tasks_own(tmp_path):
    "Loss and exact match as the evaluation gives them, and manners that sum to 1."
    from merge_lab.compare import Scorer
    from merge_lab.lineup import line_up

    config = CompareConfig([str(bundled_path(f"models/{task}")) for task in TASKS], datasets=[str(bundled_path(f"tasks/{task}")) for task in TASKS], val_rows=4, eval_samples=12, answered=8)
    bench, lined = Scorer.of(config), line_up(config.model_paths, datasets=config.datasets, rows=1)
    bench.learn_manners(lined, tmp_path / "manners.json")
    found = {(row["task"], row["split"]): row for row in bench.scores(lined.put(lined.states[0]))}
    table = evaluate_tasks(lined.model, bench.tokenizer, bench.test, answered=8, progress=False)
    for task in TASKS:
        row = found[task, "test"]
        assert row["loss"] == pytest.approx(table.loss[task]) and row["exact_match"] == table.exact_match[task]
        assert row["manners"].get("rewrite") == pytest.approx(1.0) and sum(row["manners"].values()) == pytest.approx(1.0)
        assert set(found[task, "validation"]) == {"task", "split", "loss", "nats", "tokens"}
    assert set(json.loads((tmp_path / "manners.json").read_text())) == set(TASKS)
