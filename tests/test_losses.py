"Losses: fused against plain in value and every gradient, memory, and the rules on averages and top-k."

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import merge_lab.losses as L
from merge_lab import token_losses
from merge_lab.loop_config import TrainConfig
from merge_lab.objective import Objective
from merge_lab.training import objective_of

T, D, V, N = 13, 6, 37, 3
EXACT = dict(rtol=1e-9, atol=1e-12)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class Case:
    "One student, three teachers, a mask, labels and a stored top-k."

    def __init__(self, dtype=torch.float64, shape=(T,)):
        self.hidden = normal(*shape, D, seed=1, dtype=dtype).requires_grad_()
        self.teacher_hidden = [
            normal(*shape, D, seed=10 + i, dtype=dtype) for i in range(N)
        ]
        self.weights = [normal(V, D, seed=20 + i, dtype=dtype) for i in range(N)]
        self.mask = normal(*shape, seed=3) < 0.5
        labels = torch.randint(V, shape, generator=torch.Generator().manual_seed(4))
        self.labels = labels.masked_fill(~self.mask, -100)
        self.stored = L.topk_teacher(self.teacher_hidden[0] @ self.weights[0].T, 5, 2.0)


def pair(name, case, weight, logits_of, **options):
    """The fused loss and the same loss written with PyTorch's own functions on full
    logits, both as means over the scored tokens."""
    mask, hidden = case.mask, case.hidden
    head = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
    z = logits_of(weight(hidden) if callable(weight) else hidden @ weight.T, **head)
    u = [logits_of(h @ w.T, **head) for h, w in zip(case.teacher_hidden, case.weights)]
    tau = 2.0
    log_q = (z / tau).log_softmax(-1)[mask]
    log_p = [(x / tau).log_softmax(-1)[mask] for x in u]

    def kl(log_p):
        return tau**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(
            -1
        )

    first = (case.teacher_hidden[0], weight, case.weights[0], mask)
    if name == "kl":
        return L.linear_kl_loss(hidden, *first, tau, **options), kl(log_p[0]).mean()
    if name == "mse":
        plain = (z - u[0])[mask].square().mean()
        return L.linear_mse_loss(hidden, *first, **options), plain
    if name in ("reverse_kl", "jsd"):
        fused = L.LOSSES[name].chunked(hidden, *first, temperature=tau, **options)
        log_m = log_p[0]
        if name == "jsd":
            log_m = torch.logaddexp(log_q, log_p[0]) - math.log(2)
        of_student = tau**2 * (log_q.exp() * (log_q - log_m)).sum(-1)
        of_teacher = tau**2 * (log_p[0].exp() * (log_p[0] - log_m)).sum(-1)
        plain = of_student if name == "reverse_kl" else (of_student + of_teacher) / 2
        return fused, plain.mean()
    if name == "kl_mixture":
        entropies = torch.stack([-(p.exp() * p).sum(-1) for p in log_p])
        share = (-entropies).exp() / (-entropies).exp().sum(0)
        mixture = sum(w[:, None] * p.exp() for w, p in zip(share, log_p)).log()
        fused = L.linear_mixture_kl_loss(
            hidden, case.teacher_hidden, weight, case.weights, mask, tau, **options
        )
        return fused, kl(mixture).mean()
    if name == "entropy":
        q = z[mask].log_softmax(-1)
        plain = -(q.exp() * q).sum(-1).mean()
        return L.linear_entropy_loss(hidden, weight, mask, **options), plain
    if name == "ce":
        plain = F.cross_entropy(z.flatten(0, -2), case.labels.flatten())
        return L.linear_ce_loss(hidden, weight, case.labels, **options), plain
    top, indices, tail = case.stored
    if name == "topk_mse":
        logits = u[0].gather(-1, indices)
        errors = (z.gather(-1, indices) - logits)[mask].square().sum(-1)
        plain = errors.mean() / z.shape[-1]
        stored = (logits, indices, mask)
        return L.linear_topk_mse_loss(hidden, weight, *stored, **options), plain
    kept = torch.zeros(*z.shape, dtype=torch.bool).scatter_(-1, indices, True)[mask]
    tail_q = log_q.masked_fill(kept, -torch.inf).logsumexp(-1)
    top_q = log_q.gather(-1, indices[mask])
    plain = (top.exp()[mask] * (top[mask] - top_q)).sum(-1)
    plain = tau**2 * (plain + tail.exp()[mask] * (tail[mask] - tail_q)).mean()
    fused = L.linear_topk_kl_loss(hidden, weight, *case.stored, mask, tau, **options)
    return fused, plain


def plain_head(logits, softcap=None, logit_scale=1.0):
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


OF_LOGITS = [name for name, row in L.LOSSES.items() if row.reads == "logits"]
NAMES = [*OF_LOGITS, "topk", "topk_mse"]


def test_the_matrix_covers_the_registry():
    of_logits = {"kl", "kl_mixture", "entropy", "ce", "mse", "reverse_kl", "jsd"}
    assert set(OF_LOGITS) == of_logits
    assert set(L.LOSSES) - of_logits == {"hidden", "hidden_cosine"}


@pytest.mark.parametrize("name", ["hidden", "hidden_cosine"])
def test_a_loss_of_states_in_parts_is_the_whole(name):
    row = L.LOSSES[name]
    states, teacher = (normal(T, 3, D, seed=seed) for seed in (1, 2))
    states.requires_grad_()
    parts = [slice(5), slice(5, None)]
    chunked = sum(row.chunked(states[p], teacher[p], num_items=T) for p in parts)
    whole = row.plain(states, teacher)
    if name == "hidden":
        apart = (states - teacher).norm(dim=-1) / teacher.norm(dim=-1)
        wanted = apart.square().mean()
    else:
        wanted = 1 - F.cosine_similarity(states, teacher, dim=-1).mean()
    assert_close([chunked, whole], [wanted, wanted], **EXACT)
    found = [torch.autograd.grad(loss, states)[0] for loss in (chunked, whole)]
    assert_close(*found, **EXACT)
    assert torch.autograd.gradcheck(row.plain, (states, teacher))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_row_holds_the_same_loss_twice(name):
    case, weight, row = Case(), normal(V, D, seed=5).requires_grad_(), L.LOSSES[name]
    case.labels = torch.arange(T) % V
    tempered = row.given(Objective(temperature=2.0, beta=0.2))
    logits = [h @ w.T for h, w in zip(case.teacher_hidden, case.weights)]
    given = {
        "own": (logits[:1], case.teacher_hidden[:1], case.weights[:1]),
        "all": ([logits], [case.teacher_hidden], [case.weights]),
        "labels": ([case.labels], [], [case.labels]),
        "none": ([], [], []),
    }
    to_plain, hidden, heads = given[row.teachers]
    plain = row.plain(case.hidden @ weight.T, *to_plain, **tempered)
    chunked = row.chunked(
        case.hidden, *hidden, weight, *heads, chunk_size=4, **tempered
    )
    assert_close(chunked, plain, **EXACT)
    wanted = [case.hidden, weight]
    gradients = [torch.autograd.grad(loss, wanted) for loss in (chunked, plain)]
    assert_close(*gradients, **EXACT)


def test_a_runs_beta_reaches_the_divergence():
    "By definition: each of the two against the mixture, weighed as it is mixed."
    case, objective = Case(), objective_of(TrainConfig(loss_func_name="jsd", beta=0.2))
    z, teacher = case.hidden.detach() @ case.weights[1].T, case.teacher_hidden[0] @ case.weights[0].T
    p, q = teacher.softmax(-1), z.softmax(-1)
    middle = 0.2 * p + 0.8 * q
    wanted = 0.2 * (p * (p / middle).log()).sum(-1) + 0.8 * (q * (q / middle).log()).sum(-1)
    row = L.LOSSES["jsd"]
    assert_close(row.plain(z, teacher, **row.given(objective)), wanted.mean(), **EXACT)
    assert not torch.isclose(row.plain(z, teacher), wanted.mean())
    with pytest.raises(ValueError, match="beta=1: expected a number between 0 and 1"):
        row.plain(z, teacher, beta=1)


@pytest.mark.parametrize("name", [n for n, row in L.LOSSES.items() if row.topk])
def test_the_whole_vocabulary_as_topk_is_the_loss(name):
    case, row, tau = Case(), L.LOSSES[name], 2.0
    teacher = case.teacher_hidden[0] @ case.weights[0].T
    stored = (*L.topk_teacher(teacher, V, tau), (teacher / tau).logsumexp(-1))
    cut = row.topk(case.hidden, case.weights[1], *stored, tau, chunk_size=4)
    tempered = {"temperature": tau} if row.tempered else {}
    whole = row.plain(case.hidden @ case.weights[1].T, teacher, **tempered)
    assert_close(cut, whole, **EXACT)


def test_a_loss_of_rows_honours_temperature_mask_bias_and_cap():
    "KL made of its rows is KL, in both forms."
    case, weight = Case(), normal(V, D, seed=5).requires_grad_()
    bias = normal(V, seed=7)
    made = L.loss_of_rows(L.kl_rows, "KL of rows", tempered=True)
    assert (made.teachers, made.unit) == ("own", "nats per scored token")
    first = (case.hidden, case.teacher_hidden[0], weight, case.weights[0])
    options = dict(mask=case.mask, temperature=2.0, teacher_bias=bias, softcap=3.0)
    losses = [f(*first, **options, chunk_size=4) for f in (made.chunked, L.linear_kl_loss)]
    assert_close(*losses, **EXACT)
    assert_close(*(torch.autograd.grad(x, case.hidden) for x in losses), **EXACT)
    student, teacher = case.hidden @ weight.T, case.teacher_hidden[0] @ weight.T
    assert_close(
        made.plain(student, teacher, case.mask, 2.0),
        L.kl_loss(student, teacher, case.mask, 2.0),
        **EXACT,
    )
    with pytest.raises(ValueError, match="Nothing is cut to fit"):
        made.plain(student, teacher[:, :-1], temperature=2.0)
    with pytest.raises(ValueError, match="temperature=0"):
        made.plain(student, teacher, temperature=0)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 100, None])
@pytest.mark.parametrize("head", [{}, dict(softcap=3.0, logit_scale=0.7)])
@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_pytorch(name, head, chunk_size):
    case = Case()
    weight = normal(V, D, seed=5).requires_grad_()
    fused, plain = pair(name, case, weight, plain_head, chunk_size=chunk_size, **head)
    assert_close(fused, plain, **EXACT)
    wanted = [case.hidden, weight]
    fused_gradients = torch.autograd.grad(3 * fused, wanted)
    plain_gradients = torch.autograd.grad(3 * plain, wanted)
    assert_close(fused_gradients, plain_gradients, **EXACT)
    assert fused_gradients[0][~case.mask].count_nonzero() == 0
    assert fused_gradients[0][case.mask].abs().min() > 0


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("name", NAMES)
def test_masked_tied_head(name, chunk_size):
    "Head and embedding share alphas: the head's part adds to the embedding's."
    case = Case()
    raw = normal(N, D, seed=6).requires_grad_()
    ids = torch.arange(T)

    def run(fused_side):
        alphas = torch.softmax(raw, 0)
        embedded = sum(a * w[ids] for a, w in zip(alphas, case.weights))
        case.hidden = torch.tanh(embedded)
        loss = pair(
            name,
            case,
            lambda x: x @ sum(a * w for a, w in zip(alphas, case.weights)).T,
            plain_head,
            parameters=[alphas],
            chunk_size=chunk_size,
        )[0 if fused_side else 1]
        return loss, torch.autograd.grad(loss, raw)

    assert_close(run(True), run(False), **EXACT)


class BlendedHead(nn.Module):
    "Frozen bf16 or fp64 weights under fp32 or fp64 masks."

    def __init__(self, weights, dtype):
        super().__init__()
        self.weights = weights
        self.masks = nn.Parameter(torch.full((len(weights), D), 0.4, dtype=dtype))

    def forward(self, x):
        blend = sum(a * w.to(a.dtype) for a, w in zip(self.masks, self.weights))
        return F.linear(x, blend.to(x.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_module_head_is_asked_for_its_parameters(name):
    case = Case()
    head = BlendedHead(case.weights, torch.float64)
    fused, plain = pair(name, case, head, plain_head, chunk_size=4)
    assert_close(
        torch.autograd.grad(fused, [case.hidden, head.masks]),
        torch.autograd.grad(plain, [case.hidden, head.masks]),
        **EXACT,
    )


@pytest.mark.parametrize("name", ["kl", "ce", "entropy"])
def test_bf16_hidden_with_fp32_parameters(name):
    "Softmax and the sums of mask gradients are fp32: chunking adds no error of bf16."
    case, exact = Case(torch.bfloat16, (400,)), Case(torch.float64, (400,))
    for attribute in ("hidden", "teacher_hidden", "weights"):
        value = getattr(case, attribute)
        value = [t.double() for t in value] if isinstance(value, list) else value
        setattr(exact, attribute, value)
    exact.hidden = case.hidden.detach().double().requires_grad_()
    head = BlendedHead(case.weights, torch.float32)
    fused = pair(name, case, head, plain_head, chunk_size=7)[0]
    exact_head = BlendedHead(exact.weights, torch.float64)
    reference = pair(name, exact, exact_head, plain_head)[1]
    assert fused.dtype == torch.float32
    assert_close(fused.double(), reference, rtol=3e-3, atol=0)
    hidden, masks = torch.autograd.grad(fused / 3, [case.hidden, head.masks])
    assert hidden.dtype == torch.bfloat16 and masks.dtype == torch.float32
    wanted = torch.autograd.grad(reference / 3, [exact.hidden, exact_head.masks])
    for got, true in zip((hidden, masks), wanted):
        assert (got.double() - true).norm() < 1e-2 * true.norm()
    whole = pair(name, case, head, plain_head, chunk_size=400)[0]
    assert_close(
        torch.autograd.grad(whole / 3, head.masks)[0], masks, rtol=1e-2, atol=1e-4
    )


def test_parameter_gradients_add_up_in_fp32():
    "400 chunks of one token: sums in bf16 would be off by several per cent."
    hidden, weight = normal(400, D, seed=1), normal(V, D, seed=2)
    hidden, weight = hidden.bfloat16(), weight.bfloat16().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    loss = L.linear_entropy_loss(hidden, weight, chunk_size=1)
    (got,) = torch.autograd.grad(loss, weight)
    (true,) = torch.autograd.grad(L.entropy_loss(hidden.double() @ exact.T), exact)
    assert got.dtype == torch.bfloat16
    assert (got.double() - true).norm() < 6e-3 * true.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_fp32_whatever_the_logits_are(dtype):
    student = (4 * normal(30, V)).to(dtype).requires_grad_()
    teacher, labels = (4 * normal(30, V, seed=1)).to(dtype), torch.arange(30)
    stored = L.topk_teacher(teacher, 5)
    exact = student.detach().double().requires_grad_()
    for loss in (
        lambda z: L.kl_loss(z, teacher.to(z.dtype)),
        lambda z: L.mixture_kl_loss(z, [teacher.to(z.dtype), -teacher.to(z.dtype)]),
        lambda z: L.mse_loss(z, teacher.to(z.dtype)),
        lambda z: L.entropy_loss(z),
        lambda z: L.ce_loss(z, labels),
        lambda z: L.topk_kl_loss(z, *stored),
    ):
        got, true = loss(student), loss(exact)
        assert got.dtype == torch.float32
        assert_close(got.double(), true, rtol=3e-6, atol=0)
        (gradient,) = torch.autograd.grad(got * 30, student)
        assert gradient.dtype == dtype
        (expected,) = torch.autograd.grad(true * 30, exact)
        assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-6)


def test_outer_factor_is_not_rounded_to_bf16():
    "1/N times a bf16 gradient: one rounding, so no common factor is off."
    hidden = normal(300, D, dtype=torch.bfloat16).requires_grad_()
    weight = normal(V, D, dtype=torch.bfloat16)
    loss = L.linear_entropy_loss(hidden, weight)
    got = torch.autograd.grad(loss * 0.99707, hidden, retain_graph=True)[0].double()
    unit = torch.autograd.grad(loss * 300, hidden)[0].double()
    ratio = (got * unit).sum() / (unit * unit).sum()
    assert abs(ratio.item() * 300 / 0.99707 - 1) < 3e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    case, weight = Case(), normal(V, D, seed=5).requires_grad_()

    def loss(hidden, weight):
        case.hidden = hidden
        return pair(name, case, weight, plain_head, softcap=4.0, chunk_size=3)[0]

    assert torch.autograd.gradcheck(loss, (case.hidden, weight), fast_mode=True)


def test_second_derivative_is_refused():
    case = Case()
    fused = L.linear_entropy_loss(case.hidden, case.weights[0])
    plain = L.entropy_loss(case.hidden @ case.weights[0].T)
    for loss in (fused, plain):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, case.hidden, create_graph=True)


def test_biases_of_student_and_teacher():
    case = Case()
    bias, teacher_bias = normal(V, seed=7).requires_grad_(), normal(V, seed=8)
    teacher, weight, teacher_weight = (case.teacher_hidden[0], *case.weights[:2])
    fused = L.linear_kl_loss(
        case.hidden,
        teacher,
        weight,
        teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
        chunk_size=4,
    )
    plain = L.kl_loss(
        F.linear(case.hidden, weight, bias),
        F.linear(teacher, teacher_weight, teacher_bias),
    )
    assert_close(fused, plain, **EXACT)
    wanted = [case.hidden, bias]
    assert_close(
        torch.autograd.grad(fused, wanted), torch.autograd.grad(plain, wanted), **EXACT
    )


def test_teachers_from_inference_mode():
    case = Case()
    with torch.inference_mode():
        teacher = case.teacher_hidden[0] * 1
        logits = teacher @ case.weights[0].T
    fused = L.linear_kl_loss(case.hidden, teacher, case.weights[1], case.weights[0])
    student = case.hidden @ case.weights[1].T
    for plain in (L.kl_loss(student, logits), L.mixture_kl_loss(student, [logits])):
        assert_close(fused, plain, **EXACT)
        plain.backward(retain_graph=True)
    L.mse_loss(student, logits).backward()
    fused.backward()


@pytest.mark.parametrize("name", NAMES)
def test_batch_shape_and_repetition_do_not_matter(name):
    case = Case(shape=(2, 7))
    flat, doubled = Case(shape=(2, 7)), Case(shape=(2, 7))
    for attribute, value in vars(case).items():
        if attribute == "weights":
            continue
        listed = isinstance(value, (list, tuple))
        values = value if listed else [value]
        lead = [t.flatten(0, 1) for t in values]
        setattr(flat, attribute, lead if listed else lead[0])
        twice = [torch.cat([t, t]) for t in values]
        setattr(doubled, attribute, twice if listed else twice[0])
    weight = case.weights[1]
    loss = [pair(name, c, weight, plain_head, chunk_size=3)[0] for c in (case, flat)]
    loss.append(pair(name, doubled, weight, plain_head, chunk_size=3)[0])
    assert_close(loss[0], loss[1], rtol=0, atol=0)
    assert_close(loss[0], loss[2], **EXACT)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_num_items_makes_micro_batches_add_up(name, as_tensor):
    case, weight = Case(), normal(V, D, seed=5).requires_grad_()
    n = int(case.mask.sum())
    num_items = torch.tensor(n) if as_tensor else n
    whole = pair(name, case, weight, plain_head)[0]
    total = 0
    for part in (slice(0, 2), slice(2, 9), slice(9, T)):
        micro = Case()
        micro.hidden = case.hidden[part]
        micro.teacher_hidden = [h[part] for h in case.teacher_hidden]
        micro.mask, micro.labels = case.mask[part], case.labels[part]
        micro.stored = [t[part] for t in case.stored]
        total = total + pair(name, micro, weight, plain_head, num_items=num_items)[0]
    assert_close(total, whole, **EXACT)
    wanted = [case.hidden, weight]
    assert_close(
        torch.autograd.grad(total, wanted), torch.autograd.grad(whole, wanted), **EXACT
    )


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("name", NAMES)
def test_no_scored_token_gives_zero_with_a_gradient(name, num_items):
    case = Case()
    case.mask = torch.zeros(T, dtype=torch.bool)
    case.labels = torch.full((T,), -100)
    case.hidden = torch.full((T, D), torch.nan, dtype=torch.float64).requires_grad_()
    weight = normal(V, D).requires_grad_()
    loss = pair(name, case, weight, plain_head, num_items=num_items)[0]
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [case.hidden, weight]):
        assert gradient.count_nonzero() == 0


def test_a_nan_in_a_scored_token_stays_visible():
    hidden = normal(3, D)
    hidden[1] = torch.nan
    weight, teacher = normal(V, D), normal(3, D)
    assert L.linear_kl_loss(hidden, teacher, weight, weight).isnan()
    assert L.linear_kl_loss(teacher, hidden, weight, weight).isnan()
    assert L.linear_entropy_loss(hidden, weight).isnan()
    stored = L.topk_teacher(teacher @ weight.T, 4)
    assert L.linear_topk_kl_loss(hidden, weight, *stored).isnan()


def test_ruled_out_tokens_cost_nothing():
    student = normal(2, 5).requires_grad_()
    teacher = normal(2, 5, seed=1)
    teacher[:, 0] = -torch.inf
    loss = L.kl_loss(student, teacher) + L.mixture_kl_loss(student, [teacher])
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()
    both = student.detach().clone()
    both[:, 0] = -torch.inf
    assert_close(L.kl_loss(both, teacher), L.kl_loss(both[:, 1:], teacher[:, 1:]))
    assert_close(L.entropy_loss(both), L.entropy_loss(both[:, 1:]))


@pytest.mark.parametrize("name", ["kl", "ce"])
def test_token_losses_come_beside_the_mean(name):
    case = Case(shape=(2, 7))
    options = dict(return_token_losses=True, chunk_size=3)
    if name == "ce":
        arguments = (case.hidden, case.weights[1], case.labels)
        loss, tokens = L.linear_ce_loss(*arguments, **options)
        plain = L.ce_loss(
            case.hidden @ case.weights[1].T, case.labels, reduction="none"
        )
    else:
        teacher, weights = case.teacher_hidden[0], case.weights
        loss, tokens = L.linear_kl_loss(
            case.hidden, teacher, weights[1], weights[0], case.mask, **options
        )
        logits = case.hidden @ weights[1].T, teacher @ weights[0].T
        plain = L.kl_loss(*logits, case.mask, reduction="none")
    assert_close(tokens, plain.detach(), **EXACT)
    assert not tokens.requires_grad and tokens[~case.mask].count_nonzero() == 0
    assert_close(loss, tokens.sum() / case.mask.sum(), **EXACT)
    loss.backward()


def test_no_gradient_work_without_gradients():
    case = Case()
    seen = []

    def head(x):
        seen.append(torch.is_grad_enabled())
        return x @ case.weights[0].T

    with torch.no_grad():
        first = L.linear_entropy_loss(case.hidden, head, chunk_size=4)
    second = L.linear_entropy_loss(case.hidden.detach(), head, chunk_size=4)
    assert seen and not any(seen) and not first.requires_grad
    assert_close(first, second, rtol=0, atol=0)
    with torch.inference_mode():
        assert_close(L.linear_entropy_loss(case.hidden, head), first, **EXACT)


def test_a_forgotten_parameter_is_an_error():
    case = Case()
    alphas = normal(2, D).requires_grad_()
    doubled = alphas * 2

    def head(x):
        return x @ (doubled[0] * case.weights[0] + doubled[1] * case.weights[1]).T

    with pytest.raises(ValueError, match="not in parameters"):
        L.linear_entropy_loss(case.hidden, head)
    loss = L.linear_entropy_loss(case.hidden, head, parameters=[doubled], chunk_size=4)
    plain = L.entropy_loss(head(case.hidden))
    assert_close(
        torch.autograd.grad(loss, alphas, retain_graph=True),
        torch.autograd.grad(plain, alphas),
        **EXACT,
    )


def test_backward_may_run_twice():
    case = Case()
    for loss in (
        L.linear_entropy_loss(case.hidden, case.weights[0], chunk_size=4),
        L.entropy_loss(case.hidden @ case.weights[0].T),
    ):
        first = torch.autograd.grad(loss, case.hidden, retain_graph=True)
        assert_close(torch.autograd.grad(loss, case.hidden), first, rtol=0, atol=0)


# ---- top-k


@pytest.mark.parametrize("given_tail", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_topk_of_the_whole_vocabulary_is_kl(dtype, given_tail):
    student = (3 * normal(20, V, dtype=dtype)).requires_grad_()
    teacher = 3 * normal(20, V, seed=1, dtype=dtype)
    stored = L.topk_teacher(teacher, V, 2.0)[: 3 if given_tail else 2]
    top = L.topk_kl_loss(student, *stored, temperature=2.0)
    full = L.kl_loss(student, teacher, temperature=2.0)
    assert_close(top, full, rtol=1e-5, atol=0)
    assert_close(
        torch.autograd.grad(top, student),
        torch.autograd.grad(full, student),
        rtol=1e-4,
        atol=1e-6,
    )


def test_mass_outside_topk_costs_and_costs_more_the_more_there_is():
    teacher = torch.tensor([[6.0, 5.0, 0.0, 0.0, 0.0]])
    stored = L.topk_teacher(teacher, 2)
    losses = []
    for stray in (0.0, 4.0, 6.0, 8.0):
        student = teacher.clone()
        student[0, 4] = stray
        losses.append(L.topk_kl_loss(student, *stored).item())
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 0.05 and losses == sorted(losses)


def test_topk_gradient_points_where_the_full_one_points():
    student = normal(50, 200, seed=1).requires_grad_()
    teacher = 3 * normal(50, 200, seed=2)
    full = torch.autograd.grad(L.kl_loss(student, teacher), student)[0].flatten()
    stored = [t.half() for t in L.topk_teacher(teacher, 50)[::2]]
    indices = L.topk_teacher(teacher, 50)[1]
    loss = L.topk_kl_loss(student, stored[0], indices, stored[1])
    top = torch.autograd.grad(loss, student)[0].flatten()
    assert F.cosine_similarity(top, full, dim=0) > 0.99


def test_topk_survives_extreme_logits():
    student = torch.tensor([[300.0, 0.0, 0.0], [0.0, 0.0, 300.0]]).requires_grad_()
    stored = L.topk_teacher(torch.tensor([[9.0, 1.0, 0.0]] * 2), 1)
    loss = L.topk_kl_loss(student, *stored)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all() and loss > 50


def test_float16_storage_costs_little():
    teacher, student = 2 * normal(30, V), normal(30, V, seed=1)
    top, indices, tail = L.topk_teacher(teacher, 10)
    exact = L.topk_kl_loss(student, top, indices, tail)
    stored = L.topk_kl_loss(student, top.half(), indices.int(), tail.half())
    assert_close(stored, exact, rtol=2e-3, atol=0)


# ---- memory


class Live(TorchDispatchMode):
    "Peak bytes of live tensors of more than `smallest` bytes that are not `known`."

    def __init__(self, smallest, known):
        super().__init__()
        self.smallest, self.now, self.peak = smallest, 0, 0
        self.seen = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        return out

    def follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or size <= self.smallest:
            return
        self.seen[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.seen.pop(key)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("name", ["kl", "kl_mixture", "mse", "entropy", "ce"])
def test_live_logits_fit_the_budget(name, softcap, monkeypatch):
    "No more (chunk, vocab) buffers than `choose_chunk_size` counts."
    monkeypatch.setitem(token_losses._BLOCK, "cpu", 4000)
    tokens, vocab, width, budget = 256, 2000, 8, 2**20
    hidden = normal(tokens, width, dtype=torch.float32).requires_grad_()
    teachers = [normal(tokens, width, dtype=torch.float32)] * N
    weights = [normal(vocab, width, dtype=torch.float32)] * N
    n_teachers = {"kl": 1, "mse": 1, "kl_mixture": N}.get(name, 0)
    chunk = L.choose_chunk_size(
        vocab, n_teachers, budget, torch.float32, softcap is not None
    )
    assert 10 < chunk <= tokens / 4
    options = dict(chunk_size=chunk, softcap=softcap)
    first = (hidden, teachers[0], weights[0], weights[0])
    labels = torch.zeros(tokens, dtype=torch.long)
    run = {
        "kl": lambda: L.linear_kl_loss(*first, **options),
        "mse": lambda: L.linear_mse_loss(*first, **options),
        "kl_mixture": lambda: L.linear_mixture_kl_loss(
            hidden, teachers, weights[0], weights, **options
        ),
        "entropy": lambda: L.linear_entropy_loss(hidden, weights[0], **options),
        "ce": lambda: L.linear_ce_loss(hidden, weights[0], labels, **options),
    }[name]
    gc.collect()
    with Live(token_losses._BLOCK["cpu"] * 4 * N, known=weights) as live:
        run().backward()
    assert 0 < live.peak <= budget


def test_only_hidden_sized_tensors_wait_for_backward():
    hidden = normal(128, 8).requires_grad_()
    teacher, weight = normal(128, 8, seed=1), normal(500, 8, seed=2)
    alphas = torch.ones(8, dtype=torch.float64, requires_grad=True)
    waiting = []

    def pack(tensor):
        waiting.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = L.linear_kl_loss(
            hidden,
            teacher,
            lambda x: (x * alphas) @ weight.T,
            weight,
            parameters=[alphas],
            chunk_size=16,
        )
    kept = {id(t()): t().numel() for t in waiting if t() is not None}
    kept.pop(id(alphas), None)
    assert sorted(kept.values()) == [8, 128 * 8]
    loss.backward()


def test_fake_tensors_estimate_without_computing():
    "Shapes come out right, and the work does not grow with the number of blocks."

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        calls = []
        for vocab in (10_000, 100_000):
            hidden = torch.empty(256, 8, requires_grad=True)
            weight = torch.empty(vocab, 8)
            with Count() as count:
                loss = L.linear_kl_loss(
                    hidden, hidden.detach(), weight, weight, chunk_size=256
                )
            loss.backward()
            assert hidden.grad.shape == hidden.shape
            calls.append(count.calls)
    assert calls[0] == calls[1]


# ---- alignment and errors


def test_shifted_loss_is_the_loss_of_shifted_logits():
    logits = normal(2, 7, V).requires_grad_()
    labels = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -100
    attention = torch.ones(2, 7, dtype=torch.long)
    attention[1, 5:] = 0
    by_hand = labels.masked_fill(attention == 0, -100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), by_hand[:, 1:].flatten())
    assert_close(L.ce_loss(logits, L.shift_labels(labels, attention)), expected)


ERRORS = [
    (lambda c: L.linear_kl_loss(c.hidden, c.hidden[:3], *c.weights[:2]), "3, 6"),
    (
        lambda c: L.linear_kl_loss(c.hidden, c.hidden, c.weights[0], c.weights[1][:30]),
        "Nothing is cut to fit",
    ),
    (lambda c: L.linear_ce_loss(c.hidden, c.weights[0], c.labels + 99), "labels hold"),
    (lambda c: L.linear_ce_loss(c.hidden, c.weights[0], c.labels[:3]), "labels have"),
    (
        lambda c: L.linear_mixture_kl_loss(
            c.hidden, c.teacher_hidden, c.weights[0], c.weights[:1]
        ),
        "1 teacher_weights",
    ),
    (lambda c: L.linear_entropy_loss(c.hidden, c.weights[0], c.mask[:2]), "mask has"),
    (
        lambda c: L.linear_topk_kl_loss(
            c.hidden, c.weights[0], *[t[:4] for t in c.stored]
        ),
        "topk_log_probs has shape",
    ),
    (lambda c: L.mask_decay(c.weights, c.weights[:1]), "reference holds 1"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[text for _, text in ERRORS])
def test_errors_name_the_cause(call, message):
    with pytest.raises(ValueError, match=message):
        call(Case())


# ---- penalties


@pytest.mark.parametrize(
    "penalty",
    [
        L.similarity_penalty,
        L.l1_penalty,
        L.l2_penalty,
        L.overlap_penalty,
        L.mask_decay,
        lambda alphas: L.angle_weighted_overlap(alphas, normal(N, N, seed=9)),
    ],
)
def test_penalties_are_means_with_right_gradients(penalty):
    alphas = [normal(4, seed=i).requires_grad_() for i in range(N)]
    assert torch.autograd.gradcheck(lambda *a: penalty(a), alphas)
    tiled = [a.repeat(5) for a in alphas]
    assert_close(penalty(tiled), penalty(alphas), **EXACT)
    column = [a.reshape(-1, 1) for a in alphas]
    assert_close(penalty(column), penalty(alphas), **EXACT)
    assert_close(L.mean_over_modules(penalty, [alphas, tiled]), penalty(alphas))


def test_a_single_component_has_no_pairs():
    alpha = normal(4).requires_grad_()
    for penalty in (L.similarity_penalty, L.overlap_penalty):
        loss = penalty([alpha])
        loss.backward()
        assert loss.item() == 0 and alpha.grad.count_nonzero() == 0


def test_angles_of_an_unchanged_weight_weigh_nothing():
    base = normal(3, 4)
    angles = L.task_vector_angles([base, base + 1, base - 1], base)
    assert_close(angles[0, 1].item(), torch.pi / 2)
    weights = torch.sin(2 * angles).square()
    assert weights[0].abs().max() < 1e-12 and weights[1, 2] < 1e-12
