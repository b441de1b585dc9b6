"""Arms of one figure are told apart, also by those who lack a kind of cone."""

import itertools
import json

import numpy as np
import pytest

from limbeck import paths
from limbeck.exhibits import figures, palette
from reference import colour_difference

ENOUGH = 15  # of CIEDE2000: from here on, colour alone tells two arms apart


def tables():
    """Each published exhibit -> the arms of its table."""
    read = {file: json.loads(file.read_text()) for file in sorted(paths.RESULTS.glob("*/*/*.json"))}
    tables = {file: content["table"] for file, content in read.items() if "exhibit" in content}
    arms = {file: {row.get("arm", row.get("loss")) for row in table} - {None, "step"} for file, table in tables.items()}
    assert len(arms) > 35
    return {file.relative_to(paths.RESULTS).as_posix(): sorted(names) for file, names in arms.items()}


def close_pairs():
    """The pairs of arms of one exhibit whose colours come close, to full sight, protanopia or deuteranopia."""
    pairs = {pair for arms in tables().values() for pair in itertools.combinations(arms, 2)}
    looks = {pair: tuple(palette.look(arm) for arm in pair) for pair in sorted(pairs)}
    apart = {
        pair: colour_difference.least_difference(*(shape.colour for shape in both)) for pair, both in looks.items()
    }
    return {pair: difference for pair, difference in apart.items() if difference < ENOUGH}


def test_every_arm_has_its_own_label():
    assert figures.ARMS is palette.ARMS
    assert len({look.label for look in palette.ARMS.values()}) == len(palette.ARMS)


def test_arms_of_one_exhibit_whose_colours_come_close_differ_in_marker():
    own_panels = {("ce+debiased", "debiased"), ("ce+sinkhorn", "sinkhorn")}  # of fig_debiased: one with CE, one without
    close = close_pairs()
    assert ("lora_1", "nola") not in close
    assert {("kl", "rkl"), ("grpo", "kd_then_rl")} & set(close), close
    alike = {pair: close[pair] for pair in close if len({palette.look(arm).marker for arm in pair}) == 1}
    assert set(alike) == own_panels


def test_a_sum_of_terms_is_named_in_full_and_looks_like_its_last_term():
    assert palette.look("kl") == palette.ARMS["kl"]
    assert palette.look("ce+sinkhorn") == ("CE + Sinkhorn", *palette.ARMS["sinkhorn"][1:])
    three = palette.look("ce+kl+sinkhorn")
    assert (three.label, three.colour) == ("CE + KL + Sinkhorn", palette.ARMS["sinkhorn"].colour)
    assert three.marker != palette.ARMS["sinkhorn"].marker, "it stands beside CE + Sinkhorn"
    with pytest.raises(ValueError, match=r"expected arms among teacher, ce, .* got klx in ce\+klx"):
        palette.look("ce+klx")


@pytest.mark.parametrize(
    ("left", "right", "expected"),  # pairs 1, 7, 9, 15, 17, 25, 28 and 34 of Sharma, Wu and Dalal's table 1
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_difference_of_two_colours_is_that_of_the_published_pairs(left, right, expected):
    assert colour_difference.ciede2000(np.array(left), np.array(right)) == pytest.approx(expected, abs=5e-5)


def test_who_lacks_a_cone_sees_greys_as_they_are_and_confuses_red_with_green():
    for sight in colour_difference.SIGHTS:
        assert colour_difference.lab("#777777", sight) == pytest.approx(
            colour_difference.lab("#777777", "full"), abs=0.01
        )
    red, green = "#b05030", "#707000"
    apart = {
        sight: colour_difference.ciede2000(colour_difference.lab(red, sight), colour_difference.lab(green, sight))
        for sight in colour_difference.SIGHTS
    }
    assert apart["deuteranopia"] < apart["full"] / 3
