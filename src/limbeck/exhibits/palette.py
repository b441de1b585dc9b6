"""How each arm looks in every figure: label, colour (after Okabe and Ito), and marker where colours come close."""

from typing import NamedTuple


class Look(NamedTuple):
    """How an arm appears, everywhere."""

    label: str
    colour: str
    marker: str


ARMS = {
    "teacher": Look("Teacher", "#333333", "*"),
    "ce": Look("CE", "#8a8a8a", "o"),
    "kl": Look("KL", "#0072b2", "s"),
    "rkl": Look("Reverse KL", "#56b4e9", "v"),
    "js": Look("Jensen–Shannon", "#009e73", "^"),
    "tvd": Look("Total variation", "#cc79a7", "D"),
    "l1": Look("L1", "#e69f00", "P"),
    "sinkhorn": Look("Sinkhorn", "#d55e00", "o"),
    "debiased": Look("Sinkhorn, debiased", "#117733", "D"),
    "value": Look("OT of values", "#ddaa33", "X"),
    "zero_one": Look("0–1 OT", "#bb5566", "p"),
    "sinkhorn_answer": Look("Sinkhorn (first)", "#d55e00", "o"),
    "sinkhorn_position": Look("Sinkhorn (position)", "#aa4499", "s"),
    "sinkhorn_tokens": Look("Sinkhorn (tokens)", "#882255", "D"),
    "rkd": Look("RKD", "#332288", "h"),
    "dkd": Look("DKD", "#88ccee", "<"),
    "pkd": Look("PKD", "#661100", ">"),
    "takd": Look("TAKD", "#6699cc", "d"),
    "k1_loss": Look("k1 as loss", "#8a8a8a", "o"),
    "k2_loss": Look("k2 as loss", "#d55e00", "o"),
    "k3_loss": Look("k3 as loss", "#0072b2", "o"),
    "k1_reward": Look("k1 in reward", "#333333", "^"),
    "k2_reward": Look("k2 in reward", "#e69f00", "^"),
    "k3_reward": Look("k3 in reward", "#56b4e9", "^"),
    "k2_held": Look("k2, ratio held", "#aa4499", "s"),
    "k3_held": Look("k3, ratio held", "#332288", "D"),
    "k2_free": Look("k2, ratio free", "#cc79a7", "X"),
    "k3_free": Look("k3, ratio free", "#009e73", "P"),
    "start": Look("Starting student", "#bbbbbb", "o"),
    "base": Look("Before its mistakes", "#6699cc", "d"),
    "student": Look("Student", "#d55e00", "o"),
    "able": Look("Able student", "#e69f00", "P"),
    "weak": Look("Weak student", "#882255", "o"),
    "mediocre": Look("Mediocre teacher", "#8a8a8a", "*"),
    "terse": Look("Terse teacher", "#009e73", "X"),
    "sft": Look("SFT", "#8a8a8a", "X"),
    "rejection": Look("SFT, right only", "#999933", "P"),
    "grpo": Look("GRPO", "#0072b2", "s"),
    "kd": Look("Distillation (RKL)", "#009e73", "^"),
    "kdrl": Look("KDRL", "#d55e00", "o"),
    "annealed": Look("KDRL, annealed", "#e69f00", "D"),
    "kd_then_rl": Look("KD, then RL", "#aa4499", "v"),
    "k3": Look("k3", "#0072b2", "s"),
    "exact": Look("Exact", "#333333", "D"),
    "raw_student_1": Look("Top 1, raw", "#bb5566", "v"),
    "raw_student_4": Look("Top 4, raw", "#cc79a7", "^"),
    "raw_student_8": Look("Top 8, raw", "#56b4e9", "<"),
    "raw_teacher_4": Look("Teacher's top 4, raw", "#ddaa33", ">"),
    "renormalised_student_4": Look("Top 4, renormalised", "#999933", "P"),
    "tail_student_4": Look("Top 4 and tail", "#117733", "X"),
    "pre": Look("Sum in the reward", "#0072b2", "s"),
    "mean": Look("Mean in the reward", "#56b4e9", "v"),
    "post": Look("By token in the reward", "#009e73", "^"),
    "response": Look("Wrong completions", "#0072b2", "s"),
    "group": Look("Unsolved prompts", "#009e73", "^"),
    "response_kept": Look("Wrong, own mean", "#56b4e9", "v"),
    "response_annealed": Look("Wrong, annealed", "#332288", "h"),
    "group_annealed": Look("Unsolved, annealed", "#117733", "p"),
    "none": Look("No adaptation", "#bbbbbb", "o"),
    "full": Look("Full fine-tuning", "#333333", "s"),
    "lora": Look("LoRA", "#0072b2", "d"),
    "lora_4": Look("LoRA, r = 4", "#56b4e9", "D"),
    "lora_1": Look("LoRA, r = 1", "#0072b2", "s"),
    "vera": Look("VeRA", "#cc79a7", "v"),
    "nola": Look("NOLA", "#d55e00", "o"),
    "nola_half": Look("NOLA, half", "#e69f00", "^"),
    "nola_fifth": Look("NOLA, a fifth", "#aa4499", "p"),
    "pranc": Look("PRANC", "#009e73", "X"),
    "nearest": Look("Nearest neighbour", "#8a8a8a", "P"),
    "linear": Look("Linear probe", "#6699cc", "h"),
    "uniform": Look("Uniform", "#d55e00", "o"),
    "normal": Look("Normal", "#0072b2", "s"),
    "rademacher": Look("±1", "#009e73", "^"),
    "orthogonal": Look("Orthogonal", "#aa4499", "D"),
    "nola_shared": Look("NOLA, shared", "#d55e00", "o"),
    "nola_unique": Look("NOLA, unique, kept", "#e69f00", "^"),
    "nola_regenerated": Look("NOLA, unique, drawn", "#aa4499", "D"),
    "nola_chunked": Look("NOLA, in chunks", "#882255", "p"),
    "released": Look("As released", "#999933", "P"),
    "trl": Look("TRL", "#8a8a8a", "P"),
    "fallback": Look("Sinkhorn, without numba", "#f0b27a", "v"),
    "recipe": Look("Plain recipe", "#999933", "X"),
    "pot": Look("POT", "#882255", "p"),
    "geomloss": Look("geomloss", "#44aa99", "h"),
    "nola_unscaled": Look("NOLA, no 1/√k", "#4477aa", "<"),
}


_AFTER_OTHERS = {"o": "P", "s": "d", "^": "<", "v": ">", "D": "h"}  # markers of a sum's last term


def look(arm: str) -> Look:
    """How an arm appears; a sum of terms, such as `ce+kl`, is named in full and looks like its last term.

    Sums of three terms have another marker, since they stand beside those of two.
    Raises ValueError for an arm, or a term of one, that is not in the table.
    """
    names = arm.split("+")
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"expected arms among {', '.join(ARMS)}, or sums of them; got {unknown[0]} in {arm}")
    last = ARMS[names[-1]]
    marker = _AFTER_OTHERS.get(last.marker, last.marker) if len(names) > 2 else last.marker
    return Look(" + ".join(ARMS[name].label for name in names), last.colour, marker)
