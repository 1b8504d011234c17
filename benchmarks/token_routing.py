"""Precision by token on a real model: what oracles over tokens promise and save, and three ways to choose without knowing the future.

    python benchmarks/nested.py quantize --model runs/real/base      # makes the quantised folder
    python benchmarks/token_routing.py oracles layers states signals trained   # a part at a time, or several; what is there is kept

The base is off its grid (see nested.py). Levels are static mixes at several budgets. Divergence is from the model at 8 bits, in nats a token, on the tokens after
the prompt of test windows of one kind of text; training and validation windows are of the same kind. Ways that choose see no future token:

    states    a linear router in each layer, on the hidden state before it, fitted to the tokens' divergences
    signals   the same fit on a few signals: entropy and margin of the prediction before, the norm of the state, and what reading the layer's linears at
              the fewest bits does to their outputs (as in DP-LLM, arXiv 2508.06041; exact here, where a real system estimates it)
    trained   the routers of `states`, trained end to end: straight-through gates, the price of a bit met at each look

Raw data go to data/benchmarks/token_routing.json.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from merge_lab.checkpoints import load_tokenizer
from merge_lab.run_folder import write_json
from merge_lab.static_mix import measured_costs
from merge_lab.text_windows import collate, exact_logits, text_windows
from merge_lab.token_levels import best_mixes, layer_token_costs, level_costs, make_levels, oracle_table, run_choice, token_divergences, whole_token_costs
from merge_lab.token_routing import fit_ridge, fit_token_routers, log_factors, TokenwiseQuantizeForCausalLM
from merge_lab.token_training import gate_gradients, gate_loss

PREFIX, AT_ONCE = 32, 4  # tokens of a prompt; windows of a pass
BUDGETS = [3.2323, 3.5, 3.75, 4.0, 4.25, 4.5, 5.0, 6.0]  # bits a weight of the levels
TARGETS = [3.5, 4.0, 4.5]
FEW = [0, 1, 3, 5]  # levels that a layer goes through in company, and 6 bits throughout


class Bench:
    "A quantised model, windows, and what is measured once."

    def __init__(self, options):
        self.options, self.file, self.folder = options, Path(options.output), Path(options.cache)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known = json.loads(self.file.read_text()) if self.file.exists() else {"rows": {}}
        self.known["about"] = dict(windows=options.windows, train=options.train, seq_len=options.seq_len, prefix=PREFIX, text=options.text, budgets=BUDGETS)
        self.model = TokenwiseQuantizeForCausalLM.from_quantized(options.nested, [3, 4, 5, 6, 8])
        self.model.slot.keep_all, self.tokenizer = True, load_tokenizer(options.nested)
        self.mean = self.kept("mean", self.mean_costs)
        self.mixes = best_mixes(self.model, self.mean, BUDGETS)
        self.levels = make_levels(self.model, self.mixes)
        self.layer_costs = level_costs(self.mean, self.levels, self.model.precisions)

    def keep(self, key: str, **values):
        "Write a result down."
        self.known["rows"][key] = values
        write_json(self.file, self.known)
        print(key, values, flush=True)

    def kept(self, name: str, make):
        "What is in the cache, or is made and put there."
        file = self.folder / f"{name}.pt"
        if not file.exists():
            torch.save(make(), file)
        return torch.load(file, weights_only=True)

    def windows(self, split: str, n: int):
        "Windows of the text."
        return text_windows(self.tokenizer, [self.options.text], self.options.seq_len, n, split, 0)

    def mean_costs(self):
        "Mean cost of each linear at each precision, from training windows."
        return measured_costs(self.model, self.windows("train", 8), PREFIX).sum(2).mean((0, 1))

    def draw(self, split: str, n: int):
        "Ids and exact logits, some windows at a time."
        windows = self.windows(split, n)
        for first in range(0, n, AT_ONCE):
            part = windows[first : first + AT_ONCE]
            yield collate(part, PREFIX)[0], exact_logits(self.model, part)

    @torch.no_grad()
    def tokens(self, split: str, n: int, start: int = 3) -> dict[str, torch.Tensor]:
        "Divergences at all levels, and at one level states and signals, of the tokens after the prompt."
        parts, model = [], self.model
        for ids, exact in self.draw(split, n):
            errors: list = []
            hooks = [linear.register_forward_hook(partial(note_error, errors)) for own in model._linears for linear in own]
            with model.set_precision(self.mixes[start]):
                model.start_plan(torch.ones_like(ids), None)
                output = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
            for hook in hooks:
                hook.remove()
            entropy, margin = uncertainty(output.logits)
            before = torch.stack([entropy, margin], -1)[:, PREFIX - 1 : -2]
            own = dict(
                costs=whole_token_costs(model, self.levels, ids, exact)[:, PREFIX:],
                states=torch.stack(output.hidden_states[: len(self.levels.bits)], 2)[:, PREFIX:-1],
                before=before,
                errors=torch.stack(errors, -1)[:, PREFIX:-1],
            )
            parts.append(own)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def few_levels(self):
        "Levels that a layer goes through in company."
        return make_levels(self.model, [*(self.mixes[k] for k in FEW), dict.fromkeys(self.mixes[0], 6)])

    def company(self, start: int = 3):
        "How each prediction changes when one layer goes through some levels, all others at the budget's."
        few = self.few_levels()
        parts = []
        for ids, exact in self.draw("test", self.options.oracle_windows):
            choice = torch.full((*ids.shape, len(few.bits)), FEW.index(start))
            parts.append(layer_token_costs(self.model, few, ids, exact, choice)[1][:, PREFIX:])
        return torch.cat(parts)


def note_error(errors, linear, args, output):
    "Note the squared norm of what the fewest bits do to a linear's output, (windows, tokens)."
    error = linear.slot.get(linear, linear.precisions[0]) - linear.slot.get(linear, linear.precisions[-1])
    errors.append(F.linear(args[0].to(error.dtype), error).float().square().sum(-1))


def uncertainty(logits):
    "Entropy and margin of each prediction."
    found = logits.float().log_softmax(-1)
    best = found.topk(2, -1).values
    return -(found.exp() * found).sum(-1), best[..., 0] - best[..., 1]


def oracles(bench: Bench):
    "What oracles over prompts and tokens promise and save at each budget."
    costs = bench.kept("test", lambda: bench.tokens("test", bench.options.windows))["costs"]
    ids, exact = (torch.cat(parts) for parts in zip(*bench.draw("test", bench.options.windows)))
    for target in TARGETS:
        start, key = BUDGETS.index(target), f"oracles {target:g}"
        if key in bench.known["rows"]:
            continue
        kinds = {"by prompt": costs.mean(1, keepdim=True).expand_as(costs)[:, :, None], "by token": costs[:, :, None]}
        factors = log_factors(costs, start).exp()
        kinds["by token, factors"] = (factors / factors.mean())[..., None, None] * bench.layer_costs
        table = oracle_table(bench.model, bench.levels, ids, exact, kinds, start)
        bench.keep(key, windows=len(ids), rows=table.to_dict("records"))


def by_layer(bench: Bench, target: float = 4.0):
    "What an oracle by token and layer promises and saves, by true costs in company; and one that takes no error for a gift."
    if f"layers {target:g}" in bench.known["rows"]:
        return
    n, start = bench.options.oracle_windows, FEW.index(BUDGETS.index(target))
    changes, few = bench.kept("company", bench.company), bench.few_levels()
    ids, exact = (torch.cat(parts) for parts in zip(*bench.draw("test", n)))
    careful = torch.cat([changes[..., :start].clamp_min(0), changes[..., start : start + 1], changes[..., start + 1 :].clamp_max(0)], -1)
    table = oracle_table(bench.model, few, ids, exact, {"in company": changes, "in company, no gifts": careful}, start)
    down = (changes[..., :start] < 0).double().mean().item()
    bench.keep(f"layers {target:g}", windows=n, layers=len(few.bits), fewer_bits_better=down, rows=table.to_dict("records"))



def measured(bench: Bench, key: str, shares: list[float], choose, target: float, **facts):
    "Run choices on the test windows: divergence, bits, and share of the static mix's divergence that is saved, with its error over windows."
    start, found = BUDGETS.index(target), []
    layers, first = len(bench.levels.bits), 0
    for ids, exact in bench.draw("test", bench.options.windows):
        part = slice(first, first + len(ids))
        first += len(ids)
        tokens = ids.shape[1] - PREFIX - 1
        for row in range(len(ids)):
            own, one = exact[row : row + 1], ids[row : row + 1]
            static = run_choice(bench.model, bench.levels, one, own, torch.full((1, tokens, layers), start), start)
            found.append((static, choose(one, own, part.start + row)))
    kl = torch.tensor([[static["kl"], routed["kl"]] for static, routed in found], dtype=torch.float64)
    gain = kl[:, 0] - kl[:, 1]
    real = sum(routed["real_bits"] for _, routed in found) / len(found)
    error = (gain.std() / len(gain) ** 0.5 / kl[:, 0].mean()).item()
    static_bits = found[0][0]["real_bits"]
    bench.keep(f"{key} {target:g}", static=kl[:, 0].mean().item(), kl=kl[:, 1].mean().item(), real_bits=real, static_bits=static_bits, saved=(gain.mean() / kl[:, 0].mean()).item(), error=error, explained=shares, **facts)


def prepare(bench: Bench, target: float):
    "Let the model have levels and routers for a budget."
    bench.model.set_levels(bench.mixes, BUDGETS.index(target), bench.layer_costs)
    return bench.kept("train", lambda: bench.tokens("train", bench.options.train))


def run_routers(bench: Bench):
    "A function that scores a window by the model's routers."

    def choose(ids, exact, number):
        labels = ids.clone()
        labels[:, :PREFIX] = -100
        output = bench.model.infer_forward(ids, labels=labels)
        return dict(kl=token_divergences(output.logits, exact)[:, PREFIX:].mean().item(), real_bits=output.bits[:, PREFIX:-1].double().mean().item())

    return choose


def way_states(bench: Bench, target: float):
    "Linear routers on hidden states."
    known, start = prepare(bench, target), BUDGETS.index(target)
    shares = fit_token_routers(bench.model.token_routers, known["states"], log_factors(known["costs"], start))
    validation = bench.windows("validation", 8)
    price = bench.model.fit_token_price(validation, PREFIX, target)
    bench.model.save_token_routers(bench.folder / f"states-{target:g}.safetensors")
    measured(bench, "states", shares, run_routers(bench), target, validation_bits=price)


def signals_of(known: dict, n: int, own: list[int]):
    "Signals of layer `n`: the prediction before, the norm of the state, errors of the layer's linears, in logarithms."
    norm = known["states"][:, :, n].float().square().mean(-1, keepdim=True)
    return torch.cat([known["before"].float(), norm.clamp_min(1e-9).log(), known["errors"][..., own].float().clamp_min(1e-9).log()], -1)


def way_signals(bench: Bench, target: float):
    "The same fit on signals, which are those of a pass at the budget's static mix; the price is found on the training windows."
    known, start = prepare(bench, target), BUDGETS.index(target)
    test, position, shares, train_costs, test_costs = bench.kept("test", lambda: bench.tokens("test", bench.options.windows)), 0, [], [], []
    factors = log_factors(known["costs"], start)
    for n, own in enumerate(bench.levels.bits):
        places = list(range(position, position + len(own)))
        position += len(own)
        weight, bias, share = fit_ridge(signals_of(known, n, places), factors)
        shares.append(share)
        level = (signals_of(known, n, places) @ weight + bias).exp().mean()
        for source, costs in ((known, train_costs), (test, test_costs)):
            costs.append((signals_of(source, n, places) @ weight + bias).exp()[..., None] / level * bench.layer_costs[n])
    choice = at_price_of(torch.stack(train_costs, 2), torch.stack(test_costs, 2), bench.levels, start)

    def choose(ids, exact, number):
        return run_choice(bench.model, bench.levels, ids, exact, choice[number : number + 1], start)

    measured(bench, "signals", shares, choose, target)


def at_price_of(train, test, levels, start):
    "Choices by predicted costs, (windows, tokens, layers, levels), at the price that spends the budget on the training windows."
    sizes, budget = levels.sizes.double(), levels.sizes[:, start].sum().item()
    low, high = -60.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        choice = (train + torch.tensor(middle).exp() * sizes).argmin(-1)
        spent = sizes.expand_as(train).gather(-1, choice[..., None]).sum((-1, -2)).mean()
        low, high = (middle, high) if spent > budget else (low, middle)
    return (test + torch.tensor(high).exp() * sizes).argmin(-1)


def way_trained(bench: Bench, target: float):
    "Routers of `states` trained end to end."
    prepare(bench, target)
    model, options = bench.model, bench.options
    model.load_token_routers(bench.folder / f"states-{target:g}.safetensors")
    routers, looks = model.token_routers, []
    optimizer = torch.optim.Adam(routers.parameters(), options.rate)
    validation = bench.windows("validation", AT_ONCE)
    checks = list(bench.draw("validation", AT_ONCE))
    windows, best = bench.windows("train", options.train), None
    scorer = run_routers(bench)
    for step in range(options.steps + 1):
        if step % 6 == 0:
            model.fit_token_price(validation, PREFIX, target)
            kl = sum(scorer(ids, exact, 0)["kl"] for ids, exact in checks) / len(checks)
            looks.append(dict(step=step, kl=kl))
            print(looks[-1], flush=True)
            if best is None or kl < best:
                best = kl
                model.save_token_routers(bench.folder / f"trained-{target:g}.safetensors")
        if step == options.steps:
            break
        part = [windows[(2 * step + k) % len(windows)] for k in range(2)]
        optimizer.zero_grad()
        gate_loss(routers, gate_gradients(model, part, PREFIX)).backward()
        optimizer.step()
    model.load_token_routers(bench.folder / f"trained-{target:g}.safetensors")
    measured(bench, "trained", [], scorer, target, looks=looks, steps=options.steps)


WAYS = {"states": way_states, "signals": way_signals, "trained": way_trained}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["oracles", "layers", *WAYS])
    parser.add_argument("--nested", default="runs/nested-benchmark/nested-permute-compensated", help="quantised folder")
    parser.add_argument("--cache", default="runs/token-routing-benchmark", help="what is measured once")
    parser.add_argument("--text", default="prose", choices=["prose", "code"], help="kind of text, of which every token counts (default: prose)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--train", type=int, default=40)
    parser.add_argument("--oracle_windows", type=int, default=4, help="windows of the oracle by layer (default: 4)")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="of end-to-end training, two windows each (default: 12)")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--output", default="data/benchmarks/token_routing.json")
    options = parser.parse_args()
    begun = time.process_time()
    bench = Bench(options)
    for part in options.parts:
        if part == "oracles":
            oracles(bench)
        if part == "layers":
            by_layer(bench)
        for target in options.targets if part in WAYS else []:
            if f"{part} {target:g}" not in bench.known["rows"]:
                WAYS[part](bench, target)
    print(f"{time.process_time() - begun:.0f} s of a processor", flush=True)


if __name__ == "__main__":
    main()
