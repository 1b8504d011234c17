"What a curve of losses says, on curves of which the answer is known, and on runs that were recorded."

import math
import random

import pytest

from merge_lab.diagnosis import advice, training_diagnostics

STEPS = 200
SCHEDULES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "warm-up": lambda share: min(10 * share, 1) * (1 - share),
}


def log_of_run(pace, schedule="linear", noise=0.0, seed=0, rate=2e-4, start=3.5, floor=1.5, validated=False, drift=0.0, every=10):
    "A run that learns 1 - exp(-pace) of what there is to learn; `drift`: validation loss that is lost again by the end."
    rates = [SCHEDULES[schedule](step / STEPS) for step in range(STEPS)]
    spent, chance, log, losses = 0.0, random.Random(seed), [], []
    for step, share in enumerate(rates, 1):
        spent += share / sum(rates)
        losses.append(floor + (start - floor) * math.exp(-pace * spent))
        if step % every == 0:
            mean = sum(losses[-every:]) / every + chance.gauss(0, noise)
            log.append({"step": step, "loss": mean, "learning_rate": rate * share})
        if validated and step % (2 * every) == 0:
            log.append({"step": step, "eval_loss": losses[-1] + 0.05 + drift * max(step / STEPS - 0.4, 0)})
    return log


def faults(log):
    found = training_diagnostics(log)
    return {name for name in found.index if not found.ok[name]}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("validated", [False, True], ids=["training loss", "validation"])
def test_a_run_is_short_by_what_it_learned_and_not_by_how_its_rate_went(schedule, validated):
    for pace in (5, 8, 12):
        assert "too short" not in faults(log_of_run(pace, schedule, validated=validated)), pace
    for pace in (0.3, 1, 2):
        assert "too short" in faults(log_of_run(pace, schedule, validated=validated)), pace


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_losses_still_tell(schedule):
    "A run that was cut is told so also where the noise is a tenth of the loss, as rows of French gave in batches of 80."
    short = sum("too short" in faults(log_of_run(1, schedule, 0.15, seed)) for seed in range(20))
    done = sum("too short" in faults(log_of_run(10, schedule, 0.05, seed)) for seed in range(20))
    assert short >= 18 and done <= 1, (short, done)


def test_each_fault_by_its_name():
    assert faults(log_of_run(8, validated=True)) == set()
    assert "too short" in faults(log_of_run(1, validated=True))
    assert "underfitting" in faults(log_of_run(0.01, "constant", noise=0.001))  # a rate that is far too small
    overfit = faults(log_of_run(8, validated=True, drift=1.0))
    assert "overfitting" in overfit and "too short" not in overfit
    high = [{"step": 10 * k, "loss": loss, "learning_rate": 1e-1} for k, loss in enumerate([3.5, 9.8, 6.6, 10.1, 7.4, 8.0, 6.9, 7.7, 8.1, 7.0], 1)]
    assert "loss rising" in faults(high) and "too short" not in faults(high)
    assert "learning rate" in faults([entry | {"learning_rate": 1e-8} for entry in log_of_run(8)])


RECORDED = {  # LoRA of SmolLM2-135M on French, 8 rows a step: the first entry is one step, each other the mean of ten
    "2e-4, conservative": (
        2e-4, [2.636, 3.836, 2.762, 3.14, 2.671, 2.942, 2.666, 2.935, 2.561, 2.918, 2.751, 2.825, 2.656],  # test loss 2.48
    ),
    "1e-3, conservative": (
        1e-3, [2.636, 3.143, 2.41, 2.662, 2.236, 2.366, 2.137, 2.346, 1.887, 2.302, 2.145, 2.254, 2.113],  # 1.92
    ),
    "2e-4, all linears": (
        2e-4, [2.636, 3.551, 2.604, 2.88, 2.443, 2.581, 2.319, 2.536, 2.078, 2.449, 2.321, 2.384, 2.242],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_runs_that_were_cut_by_their_schedule_are_told_so(name):
    "500 steps, other targets or a larger rate brought the same data to 1.5 nats."
    rate, losses = RECORDED[name]
    at = [1, *range(10, 121, 10)]
    log = [{"step": step, "loss": loss, "learning_rate": rate * (1 - (step - 1) / 120), "epoch": step / 135} for step, loss in zip(at, losses)]
    found = training_diagnostics(log)
    assert not found.ok["too short"] and found.advice["too short"] == advice["too short"]
    assert "learning rate" in advice["too short"] and found.ok["loss rising"] and found.ok["learning rate"]
