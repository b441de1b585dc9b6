import dataclasses

import pytest
import torch

pytest.importorskip("trl")

from limbeck.experiments.kdrl import efficiency
from limbeck.experiments.kdrl.efficiency import NORMALISERS
from limbeck.tasks import chain_sum

SECTION = efficiency.Params(
    shape="llama-1x16",
    terms=(3, 4),
    digits=(1, 1),
    data_seed=0,
    lengths=("drawn",),
    group_sizes=(4,),
    samples=16,
    longest=24,
    learning_rate=1e-6,
    clip_norm=1.0,
    kd_coef=0.1,
    micro_tokens=64,
    trl_rows=8,
    rounds=2,
    threads=1,
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    family = chain_sum.Family(SECTION.terms, SECTION.digits)
    asked = {f"{example.expression}=": example for example in chain_sum.examples(family, 4, seed=0)}
    with torch.random.fork_rng(devices=[]):
        return efficiency.theirs(SECTION, "drawn", 4, asked, str(tmp_path_factory.mktemp("trl")))


@pytest.mark.parametrize("kind", NORMALISERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_loss_of_trl_and_its_gradient_are_ours(trainer, kind, seed):
    (loss, gradient), (our_loss, our_gradient) = efficiency.losses(trainer, kind, seed=seed)
    assert loss.abs() > 1e-3, "a loss of 0 would agree with any"
    torch.testing.assert_close(our_loss, loss, rtol=0, atol=1e-5)
    assert (our_gradient - gradient).norm() < 1e-5 * gradient.norm()
    assert efficiency.difference(trainer, seed=seed) < 1e-5


def test_another_normaliser_would_show(trainer):
    gradients = [efficiency.losses(trainer, kind, seed=0)[1][1] for kind in ("grpo", "dr_grpo", "dapo")]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert (gradients[left] - gradients[right]).norm() > 1e-2 * gradients[left].norm()


def test_a_round_has_a_step_of_every_arm_and_leaves_torchs_generator_as_it_was():
    section, before = dataclasses.replace(SECTION, group_sizes=(4, 8)), torch.get_rng_state()
    rows = [row for size in section.group_sizes for row in efficiency._rows(section, "drawn", size)]
    assert torch.equal(torch.get_rng_state(), before)
    arms = ["grpo", "kd", "kdrl", "trl"]
    assert [row["arm"] for row in rows] == [arm for _ in (4, 8) for arm in arms for _ in range(2)]
    for row in rows:
        assert row["bench/samples"] == pytest.approx(16 / row["bench/seconds"])
        assert row["bench/tokens"] == pytest.approx(row["bench/length"] * row["bench/samples"])
        (trl,) = [
            x for x in rows if x["arm"] == "trl" and (x["group_size"], x["round"]) == (row["group_size"], row["round"])
        ]
        assert row["bench/ratio"] == pytest.approx(trl["bench/seconds"] / row["bench/seconds"])
        assert ("loss/difference" in row) == (row is trl)
        assert 1 <= row["bench/length"] < 24


def test_full_completions_have_the_longest_length_in_every_arm():
    section = dataclasses.replace(SECTION, rounds=1)
    assert {row["bench/length"] for row in efficiency._rows(section, "full", 4)} == {24.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ("long",)}, "lengths must be one of drawn, full; got 'long'"),
        ({"group_sizes": (5,)}, "received parts of 5 samples, expected parts that add up to 16"),
        ({"trl_rows": 0}, "received parts of 0 samples"),
        ({"rounds": 0}, "rounds must be above 0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SECTION, **change)
