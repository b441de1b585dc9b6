"""What a careless caller may give, drawn; and what each loss is then, in float64 numpy, one number after another.

A twin is NaN where a loss has no value. `Given.harmless` says that nothing was drawn that may be refused: then a loss
must equal its twin, if that is finite.
"""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from reference import policy, transport

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
TROUBLES = ("none", "none", "minus_inf", "minus_inf", "large", "huge", "inf", "nan", "empty")
MASKS = ("none", "bool", "int64", "uint8", "float", "bfloat16", "false", "twos", "shape")
VALID_MASKS = {"bool": torch.bool, "int64": torch.int64, "uint8": torch.uint8}
VALID_MASKS |= {"float": torch.float32, "bfloat16": torch.bfloat16}


class Given:
    """Tensors of one dtype, layout and trouble, and all that a twin has to know of them."""

    def __init__(self, data):
        self.data = data
        self.source = torch.Generator().manual_seed(self.one_of(range(1000)))
        self.dtype, self.trouble = self.one_of(DTYPES), self.one_of(TROUBLES)
        self.autocast = self.one_of((False, False, True))
        self.strided, self.alike = self.one_of((False, True)), self.one_of((True, True, False))
        self.harmless = self.trouble in ("none", "minus_inf", "large")
        self.students, self.teachers, self.size = [], [], 1.0
        self.dropped = None

    def one_of(self, choices):
        return self.data.draw(st.sampled_from(list(choices)))

    @property
    def wide(self):
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def product(self):
        """The dtype of a matrix product of them."""
        if self.autocast and self.dtype != torch.float64:
            return torch.bfloat16
        return self.dtype if self.dtype.is_floating_point else torch.float32

    def number(self, *choices):
        """A length, or 0."""
        return 0 if self.trouble == "empty" and self.one_of((False, True)) else self.one_of(choices)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.source, dtype=torch.float64)

    def tensor(self, values, *, teacher=False, rows=False):
        """The values as they are given, with what is troublesome put in; both sides ask for gradients."""
        scale = {"large": 3e3, "huge": 1e30 if self.dtype != torch.float16 else 6e4}.get(self.trouble, 1.0)
        if self.dtype in (torch.int64, torch.bool):
            values = values.round() if self.dtype == torch.int64 else values > 0
        else:
            values = values * scale
            bad = {"minus_inf": -torch.inf, "inf": torch.inf, "nan": torch.nan}.get(self.trouble)
            if bad is not None and values.numel():
                hit = self.hits(values.shape, rows)
                values = values.masked_fill(hit, bad)
        values = values.to(self.dtype)
        self.size = max([self.size, *values[values.isfinite()].double().abs().flatten().tolist()])
        if self.strided and values.ndim:
            values = torch.stack([values, values], -1)[..., 0]
        if values.is_floating_point():
            values.requires_grad_()
            (self.teachers if teacher else self.students).append(values)
        return values

    def hits(self, shape, rows):
        """Where the trouble is: never all of a row of logits, and for student and teacher alike in most draws."""
        if self.dropped is None or self.dropped.shape != shape or not self.alike:
            self.dropped = torch.rand(shape, generator=self.source) < 0.3
            if rows:
                self.dropped[..., 0] = False
        return self.dropped

    def pair(self, *shape):
        return self.tensor(2 * self.random(*shape), rows=True), self.tensor(
            2 * self.random(*shape), teacher=True, rows=True
        )

    def probs(self, *shape):
        """Two rows of distributions; integers are one-hot. Nothing is infinite here."""
        sides = []
        for teacher in (False, True):
            values = (2 * self.random(*shape)).softmax(-1) if 0 not in shape else torch.zeros(shape)
            if self.dtype in (torch.int64, torch.bool) and 0 not in shape:
                values = torch.nn.functional.one_hot(values.argmax(-1), shape[-1]).double()
            values = values.to(self.dtype)
            if self.trouble in ("nan", "inf") and values.is_floating_point() and values.numel():
                values[..., 0] = getattr(torch, self.trouble)
            if values.is_floating_point():
                values.requires_grad_()
                (self.teachers if teacher else self.students).append(values)
            sides.append(values)
        return sides

    def mask(self, *shape, optional=True):
        """The mask that is given, and the booleans that are meant."""
        kind = self.one_of(MASKS if optional else MASKS[1:])
        meant = torch.rand(shape, generator=self.source) < 0.7
        if kind == "none":
            return None, torch.ones(shape, dtype=torch.bool)
        if kind in VALID_MASKS:
            return meant.to(VALID_MASKS[kind]), meant
        self.harmless = False
        if kind == "false":
            return torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        if kind == "shape":
            return torch.ones((*shape, 2), dtype=torch.bool), None
        return torch.full(shape, 2), None if math.prod(shape) else meant


def plain(tensor):
    return tensor.detach().double().numpy()


def logprobs(logits, temperature=1.0):
    logits = logits / temperature
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected(weights, values, tiny):
    """sum_v p_v x_v over the classes that a float of the loss's dtype sees."""
    probs = np.exp(weights)
    return np.where(probs > tiny, probs * values, 0).sum(-1)


def divergence(kind, student, teacher, temperature, tiny):
    """Of each row."""
    q, p = logprobs(student, temperature), logprobs(teacher, temperature)
    if kind == "total_variation":
        return np.abs(np.exp(q) - np.exp(p)).sum(-1) / 2
    if kind == "jensen_shannon":
        middle = np.logaddexp(q, p) - math.log(2)
        return (expected(p, p - middle, tiny) + expected(q, q - middle, tiny)) / 2
    return expected(p, p - q, tiny) if kind == "forward_kl" else expected(q, q - p, tiny)


def top_k(student, teacher, k, support, form, tiny):
    """Of each row: the k largest, by sorting, which the drawn logits make unique."""
    values = []
    for s, t in zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, student.shape[-1]), strict=True):
        chosen = np.argsort(-(s if support == "student" else t), kind="stable")[:k]
        if form == "renormalised" or k == len(s):
            values.append(divergence("reverse_kl", s[chosen], t[chosen], 1.0, tiny))
            continue
        q, p = logprobs(s), logprobs(t)
        total = expected(q[chosen], q[chosen] - p[chosen], tiny)
        if form == "tail":
            rest = np.setdiff1d(np.arange(len(s)), chosen)
            held, taught = (np.logaddexp.reduce(x[rest]) for x in (q, p))
            total += expected(np.array([held]), np.array([held - taught]), tiny)
        values.append(total)
    return np.array(values).reshape(student.shape[:-1])


def group_advantages(rewards, counted, scale):
    found = np.zeros(rewards.shape)
    for row, (group, counts) in enumerate(zip(rewards, counted, strict=True)):
        if counts.sum() > 1:
            found[row, counts] = policy.advantages(group[counts].tolist(), scale)
    return found


def surrogate(now, old, advantages, mask, clip_eps):
    """Token by token; a ratio where nothing depends on it is not computed."""
    found = np.zeros(mask.shape)
    for row, column in zip(*mask.nonzero(), strict=True):
        advantage = advantages[row] if advantages.ndim == 1 else advantages[row, column]
        if advantage == 0:
            continue
        ratio = np.exp(now[row, column] - old[row, column])
        gain = ratio * advantage
        if clip_eps is not None and not np.isnan(gain):
            gain = min(gain, max(min(ratio, 1 + clip_eps), 1 - clip_eps) * advantage)
        found[row, column] = -gain
    return found


def token_weights(mask, normalise, longest):
    sizes = mask.sum(1)
    size = {"token": sizes.sum(), "sequence": len(mask) * np.maximum(sizes, 1)[:, None]}
    return mask / size[normalise] if normalise in size else mask / (len(mask) * longest)


def weighted(values, weights):
    return (values[weights != 0] * weights[weights != 0]).sum()


def k_estimate(kind, student, teacher):
    ratio = teacher - student
    return {"k1": -ratio, "k2": ratio**2 / 2, "k3": np.expm1(ratio) - ratio}[kind]


def huber(x):
    return np.where(np.abs(x) <= 1, x * x / 2, np.abs(x) - 0.5)


def relation(kind, student, teacher):
    """RKD by loops over pairs or triples."""
    n = len(student)
    values = []
    for x in (student, teacher):
        if kind == "rkd_distance":
            distances = np.array(
                [np.sqrt(((x[i] - x[j]) ** 2).sum() + 1e-12) for i in range(n) for j in range(n) if i != j]
            )
            values.append(distances / distances.mean())
        else:
            edges = x[:, None] - x
            edges = edges / np.maximum(np.sqrt((edges**2).sum(-1, keepdims=True)), 1e-12)
            triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3]
            values.append(np.array([edges[i, j] @ edges[k, j] for i, j, k in triples]))
    return huber(values[0] - values[1]).mean()


def pkd(student, teacher):
    student, teacher = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (student, teacher))
    return ((student - teacher) ** 2).sum(-1).mean()


def dkd(student, teacher, labels, target_coef, rest_coef, tiny):
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        others = np.arange(len(s)) != label
        binary = [np.array([x[label], np.logaddexp.reduce(x[others])]) for x in (logprobs(s), logprobs(t))]
        if target_coef:
            total += target_coef * expected(binary[1], binary[1] - binary[0], tiny)
        if rest_coef:
            total += rest_coef * divergence("forward_kl", s[others], t[others], 1.0, tiny)
    return total / len(student)


def sinkhorn(student, teacher, **options):
    debias, mass = options.pop("debias", False), options.pop("mass", "batch")
    value = transport.distance(student, teacher, **options)
    if debias:
        value -= (transport.distance(student, student, **options) + transport.distance(teacher, teacher, **options)) / 2
    return value / len(student) if mass == "unit" else value


def softmax(logits, temperature):
    return np.exp(logprobs(logits, temperature))


def sample_wise(kind, student, teacher, epsilon, iterations):
    """Of each row, from the teacher's classes to the student's."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        places = np.arange(len(s))
        cost = {
            "sample_value_cost": np.abs(t[:, None] - s),
            "sample_zero_one": 1.0 - np.eye(len(s)),
            "sample_index_cost_per_row": np.abs(places[:, None] - places) * 1.0,
        }[kind]
        values.append((transport.marginal_plan(cost, t, s, epsilon, iterations) * cost).sum())
    return np.array(values)
