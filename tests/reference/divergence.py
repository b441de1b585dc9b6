"""Divergences as sums over classes in plain Python floats: one row of logits each, no torch operation."""

import math


def softmax(logits, temperature=1.0):
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def forward_kl(student, teacher):
    return kl(teacher, student)


def reverse_kl(student, teacher):
    return kl(student, teacher)


def jensen_shannon(student, teacher):
    middle = [(a + b) / 2 for a, b in zip(student, teacher, strict=True)]
    return kl(teacher, middle) / 2 + kl(student, middle) / 2


def total_variation(student, teacher):
    return sum(abs(a - b) for a, b in zip(student, teacher, strict=True)) / 2
