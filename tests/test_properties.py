"""Every public function, whatever it is given: equal to its float64 twin within the dtype's bound, or refused by name.

The list of functions is what the modules' `__all__` say; one without a twin here fails. `LIMBECK_TORTURE=1` draws many
more inputs. Types in signatures are not checked here, as they are not where the package is used.
"""

import ast
import importlib
import math
import os
import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_hosts import Mlp

import hostile
from hostile import Given, divergence, logprobs, plain
from limbeck import losses, models, paths, training
from limbeck.adapters import NolaConfig, attach_pranc, quantise, to_lora
from limbeck.training import Problem, Rollout, Run, Settings, Verdict
from limbeck.training.rollouts import Scores
from reference import transport

TORTURE = bool(os.environ.get("LIMBECK_TORTURE"))
REFUSED = object()
RARE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=2000 if TORTURE else 80,
    suppress_health_check=list(HealthCheck),
)
TEMPERATURES = (1.0, 2.0, 0.5, 1.0, 0.0, math.nan, math.inf)
SCHEDULES = ({"epsilon": 0.1, "iterations": 20}, {"epsilon": 1.0, "iterations": 3}, {"epsilon": 0.0, "iterations": 3})
LOSS, EVEN = {}, 200  # how many roundings of the largest number a result may be off


def twin(*names, roundings=EVEN):
    """The builder gives arguments, options, and a function of the value in float64, of each of these losses."""

    def register(build):
        LOSS.update(dict.fromkeys(names, (build, roundings)))
        return build

    return register


@pytest.fixture(autouse=True, scope="module")
def _as_it_is_used():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def tiny(g):
    """Below it a probability is 0 in the loss's dtype."""
    return torch.finfo(g.wide).smallest_normal * torch.finfo(g.wide).eps / 2


def mean(values, meant):
    return values[meant].mean() if meant.any() else math.nan


def usable(temperature):
    return 0 < temperature < math.inf


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")


@twin(*DIVERGENCES, *(f"{name}_per_token" for name in DIVERGENCES))
def _(g, name):
    rows, temperature = (g.number(2, 3), g.number(1, 4)), g.one_of(TEMPERATURES)
    student, teacher = g.pair(*rows, g.number(2, 5))
    mask, meant = g.mask(*rows)

    def value():
        if meant is None or not usable(temperature):
            return REFUSED
        kind = name.removesuffix("_per_token")
        values = divergence(kind, plain(student), plain(teacher), temperature, tiny(g))
        return mean(values, meant.numpy()) if kind == name else np.where(meant, values, 0)

    return (student, teacher), {"mask": mask, "temperature": temperature}, value


@twin("top_k_reverse_kl", "top_k_reverse_kl_per_token")
def _(g, name):
    rows, vocabulary = (2, g.number(1, 3)), g.number(4, 6)
    student, teacher = g.pair(*rows, vocabulary)
    k, support, form = (
        g.one_of((0, 1, 2, 3, 4)),
        g.one_of(("student", "teacher")),
        g.one_of(("raw", "renormalised", "tail")),
    )
    mask, meant = g.mask(*rows) if name == "top_k_reverse_kl" else (None, torch.ones(rows, dtype=torch.bool))

    def value():
        if meant is None or not 1 <= k <= vocabulary:
            return REFUSED
        order = -np.sort(-plain(student if support == "student" else teacher), -1)
        if k < vocabulary and (order[..., k - 1] == order[..., k]).any():
            return None  # which of two equal ones is chosen is not said
        values = hostile.top_k(plain(student), plain(teacher), k, support, form, tiny(g))
        return values if name != "top_k_reverse_kl" else mean(values, meant.numpy())

    options = {"k": k, "support": support, "form": form}
    return (student, teacher), options | ({"mask": mask} if name == "top_k_reverse_kl" else {}), value


@twin("chunked_reverse_kl", roundings=8)
def _(g, name):
    rows, vocabulary, widths = (2, g.number(1, 4)), g.number(3, 7), (g.one_of((2, 3)), g.one_of((2, 4)))
    g.harmless &= g.trouble == "none"
    hidden, head = g.tensor(g.random(*rows, widths[0])), g.tensor(g.random(vocabulary, widths[0]))
    taught, teachers_head = (g.tensor(g.random(*shape, widths[1]), teacher=True) for shape in (rows, (vocabulary,)))
    mask, meant = g.mask(*rows)

    def value():
        if meant is None:
            return REFUSED
        logits = (plain(x) @ plain(y).T for x, y in ((hidden, head), (taught, teachers_head)))
        return mean(divergence("reverse_kl", *logits, 1.0, tiny(g)), meant.numpy())

    return (hidden, head, taught, teachers_head), {"mask": mask, "chunk": g.one_of((1, 3))}, value


@twin("masked_mean")
def _(g, name):
    shape = (g.number(1, 2), g.number(2, 3))
    values, (mask, meant) = g.tensor(g.random(*shape)), g.mask(*shape)
    return (values, mask), {}, lambda: REFUSED if meant is None else mean(plain(values), meant.numpy())


@twin("kl_estimate")
def _(g, name):
    kind, shape = g.one_of(("k1", "k2", "k3")), (g.number(1, 2), 3)
    g.harmless &= g.trouble != "large"
    student, teacher = g.tensor(-g.random(*shape).abs()), g.tensor(-g.random(*shape).abs(), teacher=True)
    return (kind, student, teacher), {}, lambda: hostile.k_estimate(kind, plain(student), plain(teacher))


def sampled(g, *, optional=False):
    """Log-probabilities of policy, sampler and teacher, [batch, time], and a mask."""
    shape = (g.number(2, 3), g.number(2, 4))
    g.harmless &= g.trouble != "large"
    now = g.tensor(-g.random(*shape).abs())
    others = [g.tensor(-g.random(*shape).abs(), teacher=True) for _ in range(2)]
    return now, *others, *g.mask(*shape, optional=optional)


def given_advantages(g, mask):
    shape = g.one_of((mask.shape[:1], mask.shape[:2]))
    return g.tensor(g.one_of((g.random(*shape).round(), g.random(*shape))), teacher=True)


@twin("surrogate_per_token", "grpo_loss")
def _(g, name):
    now, old, _, mask, meant = sampled(g)
    advantages, clip_eps = given_advantages(g, now), g.one_of((None, 0.2, 0.2, 0.0, 1.5))
    options = {"mask": mask, "clip_eps": clip_eps}
    if name == "grpo_loss":
        options |= g.one_of(
            ({"normalise": "token"}, {"normalise": "sequence"}, {"normalise": "constant", "longest": 9})
        )

    def value():
        if meant is None or clip_eps in (0.0, 1.5):
            return REFUSED
        values = hostile.surrogate(*map(plain, (now, old, advantages)), meant.numpy(), clip_eps)
        if name == "surrogate_per_token":
            return values
        if not meant.any():
            return REFUSED
        return hostile.weighted(values, hostile.token_weights(meant.numpy(), options["normalise"], 9))

    return (now, old, advantages), options, value


def kd_of(kind, now, old, teacher, meant):
    """Token by token; what the policy no longer samples is 0 in k2."""
    found = np.zeros(meant.shape)
    for at in zip(*meant.nonzero(), strict=True):
        if kind == "k2" and now[at] == -np.inf:
            continue
        ratio, estimate = np.exp(now[at] - old[at]), hostile.k_estimate(kind, now[at], teacher[at])
        found[at] = 0 if estimate == 0 and np.isinf(ratio) else ratio * estimate
    return found


@twin("kd_per_token")
def _(g, name):
    now, old, teacher, mask, meant = sampled(g)
    kind = g.one_of(("k2", "k2", "k3", "k1"))

    def value():
        if meant is None or kind == "k1":
            return REFUSED
        return kd_of(kind, *map(plain, (now, old, teacher)), meant.numpy())

    return (kind, now, old, teacher), {"mask": mask}, value


@twin("token_weights", "kd_weights")
def _(g, name):
    shape = (g.number(2, 3), g.number(2, 4))
    mask, meant = g.mask(*shape, optional=False)
    options = g.one_of(({"normalise": "token"}, {"normalise": "sequence"}, {"normalise": "constant", "longest": 9}))
    keep, kept = g.mask(shape[0]) if name == "kd_weights" else (None, torch.ones(shape[0], dtype=torch.bool))
    denominator = g.one_of(("all", "kept"))

    def value():
        if meant is None or kept is None:
            return REFUSED
        listened = meant & kept[:, None]
        if denominator == "kept" and name == "kd_weights" and keep is not None and listened.any():
            found = np.zeros(shape)
            found[kept.numpy()] = hostile.token_weights(meant[kept].numpy(), options["normalise"], 9)
            return found
        return (
            hostile.token_weights(meant.numpy(), options["normalise"], 9) * listened.numpy() if meant.any() else REFUSED
        )

    if name == "token_weights":
        return (mask,), options, value
    return (mask, keep), options | {"denominator": denominator}, value


@twin("kdrl_loss")
def _(g, name):
    now, old, kd, mask, meant = sampled(g)
    advantages, kd_coef = given_advantages(g, now), g.one_of((0.0, 0.5, -1.0, math.nan))
    weights = torch.rand(now.shape, generator=g.source) * (torch.rand(now.shape, generator=g.source) < 0.5)
    g.teachers = [tensor for tensor in g.teachers if tensor is not kd]

    def value():
        if meant is None or not kd_coef >= 0 or not meant.any():
            return REFUSED
        meant_here = meant.numpy()
        gain = hostile.surrogate(*map(plain, (now, old, advantages)), meant_here, None)
        found = [hostile.weighted(gain, hostile.token_weights(meant_here, "token", None))]
        if kd_coef:
            found.append(kd_coef * hostile.weighted(np.where(meant_here, plain(kd), 0), plain(weights)))
        return np.array(found)

    options = {"mask": mask, "kd_coef": kd_coef, "teacher_weights": weights}
    return (now, old, advantages, kd), options, value


def groups(g):
    shape = (g.number(1, 3), g.one_of((2, 4)))
    rewards = torch.randint(0, 3, shape, generator=g.source) / 2
    counted, meant = g.mask(*shape)
    return g.tensor(rewards.double(), teacher=True), counted, meant


@twin("group_advantages")
def _(g, name):
    (rewards, counted, meant), scale = groups(g), g.one_of(("std", "none"))

    def value():
        if meant is None or not np.isfinite(plain(rewards)[meant.numpy()]).all():
            return REFUSED
        return hostile.group_advantages(plain(rewards), meant.numpy(), scale)

    return (rewards,), {"counted": counted, "scale": scale}, value


@twin("shaped_advantages")
def _(g, name):
    (rewards, counted, meant), placement = groups(g), g.one_of(("pre", "mean", "post"))
    shape, kd_coef = (*rewards.shape, g.number(1, 3)), g.one_of((0.0, 0.25))
    ratios, (mask, on) = g.tensor(g.random(*shape).round(), teacher=True), g.mask(*shape, optional=False)

    def value():
        if meant is None or on is None:
            return REFUSED
        shift = np.where(on, kd_coef * plain(ratios), 0) if kd_coef else np.zeros(shape)
        raw = plain(rewards)
        if placement != "post":
            size = np.maximum(on.numpy().sum(-1), 1) if placement == "mean" else 1
            raw = raw + shift.sum(-1) / size
        if not np.isfinite(raw[meant.numpy()]).all():
            return REFUSED
        advantages = hostile.group_advantages(raw, meant.numpy(), "std")[..., None] * on.numpy()
        return advantages + shift if placement == "post" else advantages

    options = {"mask": mask, "kd_coef": kd_coef, "placement": placement, "counted": counted}
    return (rewards, ratios), options, value


@twin("kd_mask")
def _(g, name):
    correct, meant = g.mask(g.number(2, 3), 2, optional=False)
    level = g.one_of(("none", "response", "group", "token"))

    def value():
        if level == "token" or meant is None:
            return REFUSED
        right = meant.numpy()
        return {"none": right | True, "response": ~right, "group": right & False | ~right.any(1, keepdims=True)}[level]

    return (correct, level), {}, value


NUMBERS = (0.0, 0.5, 2.5, -1.0, math.inf, math.nan)


@twin("kd_schedule")
def _(g, name):
    step = g.one_of((0, 3, 1000, -1))
    initial, decay, floor = (g.one_of(NUMBERS) for _ in range(3))

    def value():
        fits = step >= 0 and 0 <= decay < math.inf and math.inf > initial >= floor >= 0
        return max(initial - decay * step, floor) if fits else REFUSED

    return (step,), {"initial": initial, "decay": decay, "floor": floor}, value


@twin("annealed_temperature")
def _(g, name):
    initial, epoch, epochs = g.one_of(NUMBERS), g.one_of((-1, 0, 1, 4)), g.one_of((0, 1, 5))

    def value():
        if not usable(initial) or not 0 <= epoch < epochs:
            return REFUSED
        return np.interp(epoch, [0, epochs - 1], [initial, 1]) if epochs > 1 else initial

    return (initial,), {"epoch": epoch, "epochs": epochs}, value


@twin("rkd_distance", "rkd_angle", roundings=2000)
def _(g, name):
    n = g.number(3, 5)
    g.harmless &= g.trouble in ("none", "large")
    student, teacher = g.tensor(g.random(n, 4)), g.tensor(g.random(n, 3), teacher=True)
    return (student, teacher), {}, lambda: hostile.relation(name, plain(student), plain(teacher))


@twin("pkd")
def _(g, name):
    shape = (g.number(1, 2), g.number(2, 3), 4)
    g.harmless &= g.trouble in ("none", "large")
    student, teacher = g.tensor(g.random(*shape)), g.tensor(g.random(*shape), teacher=True)
    return (student, teacher), {}, lambda: hostile.pkd(plain(student), plain(teacher))


def labelled(g):
    batch, classes = g.number(2, 4), g.one_of((3, 5))
    labels = torch.randint(0, classes, (batch,), generator=g.source).to(
        g.one_of((torch.int64, torch.int32, torch.uint8))
    )
    wrong = g.one_of(("", "", "", "high", "float", "short"))
    if wrong == "high" and batch:
        labels[0] = classes
    if wrong == "short":
        labels = labels[1:]
    bad = not batch or bool(wrong)
    return *g.pair(batch, classes), labels.double() if wrong == "float" else labels, bad


@twin("dkd")
def _(g, name):
    student, teacher, labels, bad = labelled(g)
    temperature = g.one_of(TEMPERATURES)
    coefs = {"target_coef": g.one_of((0.0, 1.0)), "rest_coef": g.one_of((0.0, 8.0))}

    def value():
        if bad or not usable(temperature):
            return REFUSED
        sides = (plain(x) / temperature for x in (student, teacher))
        return hostile.dkd(*sides, labels.tolist(), *coefs.values(), tiny(g))

    return (student, teacher, labels), coefs | {"temperature": temperature}, value


@twin("sinkd_loss", roundings=2000)
def _(g, name):
    student, teacher, labels, bad = labelled(g)
    coefs = {f"{term}_coef": g.one_of((0.0, 1.0)) for term in ("ce", "kl", "sinkhorn")}
    temperature = g.one_of(TEMPERATURES)

    def value():
        if bad or not usable(temperature):
            return REFUSED
        s, t, total = plain(student), plain(teacher), 0.0
        if coefs["ce_coef"]:
            total -= logprobs(s)[range(len(s)), labels.tolist()].mean()
        if coefs["kl_coef"]:
            total += divergence("forward_kl", s, t, temperature, tiny(g)).mean()
        return total + (hostile.sinkhorn(*(hostile.softmax(x, 2.0) for x in (s, t))) if coefs["sinkhorn_coef"] else 0)

    return (student, teacher, labels), coefs | {"kl_temperature": temperature}, value


@twin("batch_sinkhorn", roundings=2000)
def _(g, name):
    student, teacher = g.pair(g.number(2, 4), g.number(2, 3))
    temperature, schedule, group = g.one_of(TEMPERATURES), g.one_of(SCHEDULES), g.one_of((None, 1, 3, 0))
    options = schedule | {"p": g.one_of((1, 2)), "debias": g.one_of((False, True))}

    def value():
        if not usable(temperature) or not schedule["epsilon"] or group == 0:
            return REFUSED
        size = group or len(student)
        sides = [hostile.softmax(plain(x), temperature) for x in (student, teacher)]
        parts = ([x[start : start + size] for x in sides] for start in range(0, len(student), size))
        return sum(hostile.sinkhorn(*part, **options) for part in parts)

    return (student, teacher), options | {"temperature": temperature, "group": group}, value


@twin("sequence_sinkhorn", roundings=2000)
def _(g, name):
    shape = (g.number(1, 2), g.number(2, 3))
    student, teacher = g.pair(*shape, 4)
    (mask, meant), form = g.mask(*shape, optional=False), g.one_of(("position", "sequence", "tokens", "answer"))

    def value():
        if meant is None:
            return REFUSED
        sides = [hostile.softmax(plain(x), 2.0) for x in (student, teacher)]
        rows, columns = np.nonzero(meant.numpy())
        if form == "answer":
            first = [i for i, row in enumerate(rows) if row not in rows[:i]]
            rows, columns = rows[first], columns[first]
        group = {"position": columns, "sequence": rows}.get(form, np.zeros_like(rows))
        places = [(rows[group == one], columns[group == one]) for one in np.unique(group)]
        values = [hostile.sinkhorn(*(x[place] for x in sides), iterations=5) for place in places]
        return np.mean(values) if values else math.nan

    return (student, teacher), {"mask": mask, "form": form, "iterations": 5}, value


@twin("sinkhorn_plan", roundings=2000)
def _(g, name):
    g.harmless &= g.trouble == "none"
    cost, schedule = g.tensor(g.random(g.number(2, 3), g.number(2, 4)).abs()), g.one_of(SCHEDULES)
    mass = g.one_of(("batch", "unit"))

    def value():
        if not schedule["epsilon"]:
            return REFUSED
        return transport.plan(plain(cost), *schedule.values()) / (len(cost) if mass == "unit" else 1)

    return (cost,), schedule | {"mass": mass}, value


@twin("sinkhorn_distance", roundings=2000)
def _(g, name):
    student, teacher = g.probs(g.number(2, 3), g.number(2, 4))
    schedule = g.one_of(SCHEDULES)
    options = schedule | {"p": g.one_of((1, 2)), "mass": g.one_of(("batch", "unit")), "debias": g.one_of((False, True))}

    def value():
        return hostile.sinkhorn(plain(student), plain(teacher), **options) if schedule["epsilon"] else REFUSED

    return (student, teacher), options | {"gradient": g.one_of(("unrolled", "envelope"))}, value


SAMPLE_WISE = ("sample_value_cost", "sample_zero_one", "sample_index_cost_per_row")


@twin(*SAMPLE_WISE, roundings=2000)
def _(g, name):
    (student, teacher), schedule = g.probs(g.number(1, 3), g.number(2, 4)), g.one_of(SCHEDULES)

    def value():
        if not schedule["epsilon"]:
            return REFUSED
        values = hostile.sample_wise(name, plain(student), plain(teacher), **schedule)
        return values if name.endswith("per_row") else values.mean()

    return (student, teacher), schedule | {"gradient": g.one_of(("unrolled", "envelope"))}, value


@twin("sample_l1")
def _(g, name):
    student, teacher = g.probs(g.number(1, 3), g.number(2, 4))
    return (student, teacher), {}, lambda: np.abs(plain(student) - plain(teacher)).sum(1).mean()


def twins_value(g, value):
    """What the twin says; where it cannot say, there is no value, or the drawing was wrong."""
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        try:
            return value()
        except (ArithmeticError, AttributeError, IndexError, ValueError):
            if g.harmless:
                raise
            return math.nan


def flat(result):
    """All numbers of a result, in float64."""
    parts = result.values() if isinstance(result, dict) else [result]
    return torch.cat([torch.as_tensor(part).detach().double().flatten() for part in parts]).numpy()


@pytest.mark.parametrize("name", sorted(LOSS))
@RARE
@given(data=st.data())
def test_a_loss_is_its_float64_twin_or_is_refused(name, data):
    build, roundings = LOSS[name]
    g = Given(data)
    arguments, options, value = build(g, name)
    wanted = twins_value(g, value)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=g.autocast):
            result = getattr(losses, name)(*arguments, **options)
    except ValueError as error:
        assert "expected" in str(error)
        assert wanted is REFUSED or wanted is None or not g.harmless or not np.isfinite(wanted).all()
        return
    assert wanted is not REFUSED
    found = flat(result)
    parts = [
        part for part in (result.values() if isinstance(result, dict) else [result]) if isinstance(part, torch.Tensor)
    ]
    if wanted is not None:
        wanted = np.asarray(wanted, dtype=np.float64).flatten()
        assert found.shape == wanted.shape
        same = np.isfinite(found) & np.isfinite(wanted)
        largest = np.abs(wanted[same]).max(initial=0)
        exact = g.product if name == "chunked_reverse_kl" else g.wide
        bound = roundings * torch.finfo(exact).eps * (1 + g.size) * (1 + largest)
        assert np.abs(found[same] - wanted[same]).max(initial=0) <= bound
        if g.harmless:
            assert (np.isfinite(found) == np.isfinite(wanted)).all()
        elif g.trouble in ("inf", "nan", "empty"):
            assert not np.isfinite(found[~np.isfinite(wanted)]).any()
    graph = [part.sum() for part in parts if part.requires_grad]
    if graph:
        torch.stack(graph).sum().backward()
    assert all(tensor.grad is None for tensor in g.teachers)
    if g.harmless and np.isfinite(found).all():
        assert all(tensor.grad.isfinite().all() for tensor in g.students if tensor.grad is not None)


OTHER = {}


def check(*names):
    def register(function):
        OTHER.update(dict.fromkeys(names, function))
        return function

    return register


def refused(function, *arguments, **options):
    with pytest.raises(ValueError, match="expected"):
        function(*arguments, **options)


def rollout(g, *, mask, correct, rewards, teacher):
    """A step of two prompts and two completions each, of at most three tokens."""
    old, taught = -g.random(4, 3).abs(), -g.random(4, 3).abs()
    ended, rows = torch.ones(4, dtype=mask.dtype), [(0,)] * 4
    return Rollout(rows, rows, mask, old, ended, rewards, correct, taught if teacher else None)


@check("limbeck.training.arm", "limbeck.training.objective", "limbeck.training.Rollout")
def _(g):
    """Each arm takes integer masks, low rewards and a masked vocabulary; a token out of reach counts for nothing."""
    name = g.one_of(
        ("grpo", "kd", "kdrl", "exact", "response", "group", "pre", "post", "sft", "tail_student_2", "raw_teacher_0")
    )
    if name == "raw_teacher_0":
        return refused(training.arm, name)
    steps, kd_coef = g.one_of((2, 0)), g.one_of((0.5, -1.0, math.nan))
    if not steps or not kd_coef >= 0:
        return refused(training.objective, training.arm(name), kd_coef=kd_coef, steps=steps)
    aim = training.objective(training.arm(name), kd_coef=kd_coef, steps=steps)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    correct, rewards = torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    logits, teachers = g.random(8, 5).requires_grad_(), g.random(8, 5)
    never = g.one_of((False, True))
    blocked = torch.zeros(8, 5, dtype=torch.bool)
    blocked[:, 4] = never
    outside = g.one_of((torch.int64, torch.bool, torch.uint8))
    found = []
    for kind in (torch.bool, outside):
        rewards_given = (
            rewards.double() if kind == torch.bool else rewards.to(g.one_of((torch.bfloat16, torch.float64)))
        )
        source = g.source.get_state()
        step = rollout(g, mask=mask.to(kind), correct=correct.to(kind), rewards=rewards_given, teacher=True)
        g.source.set_state(source)
        student, teacher = (x.masked_fill(blocked, -torch.inf) for x in (logits, teachers))
        said = student.log_softmax(-1)[:, 0]
        now = torch.zeros(4, 3, dtype=torch.float64).masked_scatter(mask.bool(), said)
        terms, _ = aim(0, step)
        values = terms(Scores(torch.arange(4), mask.to(kind), now, student, lambda t=teacher: t))
        loss = torch.stack([value for value in values.values() if value.requires_grad]).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        found.append([loss.item(), *gradient.flatten().tolist()])
        p = plain(student[:, :4] if never else student)
        entropies = -(np.exp(logprobs(p)) * logprobs(p)).sum(-1)
        assert values["policy/entropy"].item() == pytest.approx(entropies.mean(), abs=1e-10)
    assert found[0] == pytest.approx(found[1], abs=1e-5)  # advantages of float32 beside those of float64
    refused(rollout, g, mask=2 * mask, correct=correct, rewards=rewards, teacher=True)
    if training.arm(name).asks_teacher:
        refused(aim, 0, rollout(g, mask=mask, correct=correct, rewards=rewards, teacher=False))


@check("limbeck.training.Settings")
def _(g):
    fields = {"group_size": 2, "longest": 3, "seed": 0, "learning_rate": 1e-3, "clip_norm": 1.0}
    fields |= {"save_every": 1, "micro_tokens": 8}
    assert Settings(**fields).updates == 1
    name = g.one_of(sorted(fields.keys() - {"seed"}))
    refused(Settings, **fields | {name: g.one_of((0, -1, math.nan))})
    refused(Settings, **fields | {"group_size": 1})


@check("limbeck.training.Problem", "limbeck.training.Verdict", "limbeck.training.Run")
def _(g):
    """A verdict that is no number stops the run; one that raises is counted and left out."""
    reward = g.one_of((math.nan, math.inf, 0.5))
    problem = Problem((1,), "name")
    judged = training.rollouts._judged(lambda *_: Verdict(0.5, True), problem, (2,))
    assert (judged.reward, judged.correct) == (0.5, True)
    assert math.isnan(training.rollouts._judged(lambda *_: 1 / 0, problem, (2,)).reward)
    if not math.isfinite(reward):
        refused(training.rollouts._judged, lambda *_: Verdict(reward, False), problem, (2,))
    assert Run(None, None, None, None, None).dtype == torch.float32


class Words:
    eos_token, bos_token, pad_token = "a", "b", None

    def __init__(self, words):
        self.words = words

    def get_vocab(self):
        return {word: place for place, word in enumerate(self.words)}


@check("limbeck.training.require_one_vocabulary")
def _(g):
    words = g.one_of(("ab", "ba", "abc"))
    if words == "ab":
        training.require_one_vocabulary(Words("ab"), Words("ab"))
    else:
        refused(training.require_one_vocabulary, Words("ab"), Words(words))
    other = Words("ab")
    other.eos_token = "b"  # what ends a text may differ
    training.require_one_vocabulary(Words("ab"), other)
    other.pad_token = "b"
    refused(training.require_one_vocabulary, Words("ab"), other)


@check("limbeck.models.evaluating")
def _(g):
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2)).train(g.one_of((True, False)))
    model[0].train(g.one_of((True, False)))
    modes = [module.training for module in model.modules()]
    with models.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


@check("limbeck.models.agrees")
def _(g):
    dtype, gap = g.one_of((torch.float64, torch.float32, torch.bfloat16)), g.one_of((0.0, 0.25, math.nan))
    logits = torch.tensor([1.0, -torch.inf, -4.0], dtype=dtype)
    other, tolerance = logits + gap, g.one_of((0.0, 0.1))
    expected = gap == 0 or (gap == 0.25 and tolerance == 0.1)  # 0.1 of the largest, 4
    assert models.agrees(torch.nn.Linear(1, 1), "it", lambda: other, lambda: logits, tolerance=tolerance) == expected
    assert not models.agrees(torch.nn.Linear(1, 1), "it", lambda: logits[:2], lambda: logits)
    refused(models.agrees, torch.nn.Linear(1, 1), "it", lambda: logits, iter([logits, logits + 1]).__next__)


@check("limbeck.models.likeliest")
def _(g):
    rows = g.one_of((1, 3))
    logits = torch.arange(4.0 * rows).reshape(rows, 4).flip(1).to(g.one_of((torch.float64, torch.bfloat16)))
    logits[:, 1] = g.one_of((-torch.inf, 0.5))
    assert models.likeliest(logits).tolist() == [0] * rows
    logits[rows - 1, 2] = math.nan
    refused(models.likeliest, logits)


@check("limbeck.adapters.NolaConfig")
def _(g):
    wrong = {
        "r": 0,
        "num_basis": g.one_of((0, True, 1.5, (1, 2, 3))),
        "nola_alpha": g.one_of((0, math.nan, math.inf, "8")),
    }
    wrong |= {"basis_seed": g.one_of((-1, 2**63)), "init": "zero", "quant_bits": g.one_of((1, 99)), "chunk_size": 0}
    name = g.one_of(sorted(wrong))
    refused(NolaConfig, **{name: wrong[name]})


@check("limbeck.adapters.to_lora", "limbeck.adapters.quantise")
def _(g):
    """The LoRA adapter's B A is Delta W; quantised coefficients are the nearest of 2 L + 1 even steps."""
    model = get_peft_model(Mlp(), NolaConfig(r=2, num_basis=6, target_modules=["first", "second"]))
    layer, bits = model.base_model.model.first, g.one_of((2, 3, 4, 8))
    with torch.no_grad():
        for values in layer.coefficients("default"):
            values.copy_(g.random(*values.shape))
    state, config = to_lora(model)
    a, b = (state[f"base_model.model.first.lora_{side}.weight"].double() for side in "AB")
    change = layer.get_delta_weight("default").double()
    torch.testing.assert_close(config.lora_alpha / config.r * b @ a, change, rtol=1e-5, atol=1e-6)
    before = [values.detach().double().clone() for values in layer.coefficients("default")]
    quantise(model, bits=bits)
    for old, new in zip(before, layer.coefficients("default"), strict=True):
        levels = 2 ** (bits - 1) - 1
        steps = old.abs().amax(-1, keepdim=True) / levels
        assert (new.double() - old).abs().max() <= (steps * 0.51).max()
        torch.testing.assert_close((new.double() / steps).round() * steps, new.double(), rtol=1e-5, atol=1e-6)
    refused(quantise, model, bits=1)
    refused(quantise, model, "other", bits=4)
    refused(to_lora, model, "other")


@check("limbeck.adapters.attach_pranc")
def _(g):
    layer = torch.nn.Linear(3, 4)
    refused(attach_pranc, layer, num_basis=g.one_of((0, -1)), seed=0)
    kept = layer.weight.detach().clone()
    coefficients = attach_pranc(layer, num_basis=5, seed=0)
    assert torch.equal(layer.weight, kept)
    values = g.random(1, 5).float()
    bases = []
    for place in range(6):  # linear in the coefficients
        with torch.no_grad():
            coefficients.copy_(torch.eye(5)[place : place + 1] if place < 5 else values)
        bases.append((layer.weight - kept).double())
    wanted = torch.einsum("i,iab->ab", values[0].double(), torch.stack(bases[:5]))
    torch.testing.assert_close(bases[5].detach(), wanted.detach(), rtol=1e-4, atol=1e-5)


@check("limbeck.models.trainable", "limbeck.models.device", "limbeck.models.precision", "limbeck.models.autocast")
def _(g):
    model = Mlp()
    model.first.weight.requires_grad_(False)
    assert models.trainable(model).keys() == dict(model.named_parameters()).keys() - {"first.weight"}
    refused(models.device, g.one_of(("gpu", "", "cpu:x")))
    refused(models.precision, g.one_of(("half-ish", "nn", "int64", "")), torch.device("cpu"))
    assert models.precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert models.precision("auto", torch.device("cpu")) == torch.float32
    dtype = g.one_of((torch.float32, torch.bfloat16))
    with models.autocast(torch.device("cpu"), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("name", sorted(OTHER))
@settings(RARE, max_examples=200 if TORTURE else 12)
@given(data=st.data())
def test_the_other_public_functions_hold_or_refuse(name, data):
    OTHER[name](Given(data))


def public():
    """Module and name of all that the package offers; `models` has no `__all__` and offers the functions it defines."""
    names = set()
    for file in sorted((paths.ROOT / "src" / "limbeck").rglob("*.py")):
        parts = file.relative_to(paths.ROOT / "src").with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text()).body
        if any(getattr(node, "targets", [None])[0].id == "__all__" for node in tree if _names_one(node)):
            names |= {(module, name) for name in importlib.import_module(module).__all__}
        elif module == "limbeck.models":
            names |= {(module, node.name) for node in tree if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    return names


def _names_one(node):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


def test_every_public_function_has_a_twin_or_a_named_refusal():
    registered = {("limbeck.losses", name) for name in LOSS} | {tuple(name.rsplit(".", 1)) for name in OTHER}
    pictures = {(module, name) for module, name in public() if module == "limbeck.exhibits.figures"}
    assert registered == public() - pictures
    drawn = "".join(file.read_text() for file in (paths.ROOT / "tests" / "exhibits").glob("test_*.py"))
    assert [name for _, name in pictures if name not in drawn] == []  # they compute nothing; what they draw is tested
