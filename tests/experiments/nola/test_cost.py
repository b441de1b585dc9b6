import dataclasses

import pytest
import torch

from limbeck import params
from limbeck.adapters.basis import Stream
from limbeck.experiments.nola import cost
from limbeck.experiments.nola.cost import ReleasedSums

SECTION = params.load("nola", "table_cost", "tiny", cost.Params)
K, RANK, WIDTH = SECTION.num_basis, SECTION.rank, SECTION.width


@pytest.fixture(scope="module")
def base():
    return cost.stack(SECTION)


def step(model):
    return cost.step(model, dataclasses.replace(SECTION, learning_rate=0.1))


def test_the_released_sum_is_that_of_its_bases_and_so_is_its_gradient(global_generators):
    shape, seeds, before = (5, 3), (4, 9), global_generators()
    coefficients, weights = torch.linspace(-1, 1, 14).view(2, 7), torch.arange(30.0).view(2, *shape)
    found = ReleasedSums(seeds, shape, 7)(coefficients.requires_grad_())
    (found * weights).sum().backward()
    drawn = [torch.rand(7, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    bases = torch.stack([(2 * numbers - 1) / 15**0.5 for numbers in drawn])
    torch.testing.assert_close(found, torch.einsum("mk,mkrc->mrc", coefficients, bases))
    torch.testing.assert_close(coefficients.grad, torch.einsum("mrc,mkrc->mk", weights, bases))
    assert global_generators() == before


def test_arms_share_the_weights_of_the_stack_and_a_step_changes_adapters_alone(base):
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    pointers = {weight.data_ptr() for weight in base.parameters()}
    for arm in SECTION.arms:
        model = cost.attach(arm, base, SECTION)
        frozen, trained = [], []
        for weight in model.parameters():
            (trained if weight.requires_grad else frozen).append(weight)
        assert pointers <= {weight.data_ptr() for weight in frozen}
        starts = [weight.clone() for weight in trained]
        step(model)()
        changed = [(weight != start).any() for weight, start in zip(trained, starts, strict=True)]
        assert sum(changed) == len(changed) / (2 if arm in ("lora", "vera") else 1)  # whose other factor starts at 0
        count = {"none": 0, "lora": RANK * 4 * WIDTH * 2, "vera": (3 * WIDTH + SECTION.vera_rank) * 2}
        assert sum(weight.numel() for weight in trained) == count.get(arm, 2 * 2 * 2 * K)
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())


def test_each_way_to_keep_bases_draws_them_as_often_as_its_name_says(base, monkeypatch):
    seen, draw = [], Stream.draw
    monkeypatch.setattr(Stream, "draw", lambda *a: seen.append((a[0].factor, a[2])) or draw(*a))
    matrices, expected = 2 * SECTION.layers, {}
    for arm in ("nola_shared", "nola_unique", "nola_regenerated", "nola_chunked", "released"):
        call, counts = step(cost.attach(arm, base, SECTION)), []
        for _ in range(2):
            seen.clear()
            call()
            counts.append([count for factor, count in seen if factor != "A0"])
        expected[arm] = counts
    assert expected["nola_shared"] == [[K] * 2, []]
    assert expected["nola_unique"] == [[K] * 2 * matrices, []]
    assert expected["nola_regenerated"] == [[K] * 2 * matrices * 2] * 2
    assert expected["nola_chunked"] == [[SECTION.chunk_size] * (K // SECTION.chunk_size) * 2 * matrices * 2] * 2
    assert expected["released"] == [[], []]


def test_what_merging_would_leave_behind_is_counted(base):
    inputs, adapted = torch.zeros(1, SECTION.tokens, WIDTH), cost.attach("nola_shared", base, SECTION)
    same = cost.shared_copy(base)
    assert cost.modules(same) == cost.modules(base)
    assert cost.operations(same, inputs) == cost.operations(base, inputs)
    inner = adapted.base_model.model
    assert cost.modules(inner) != cost.modules(base)
    assert cost.operations(inner, inputs) != cost.operations(base, inputs)
    assert cost.merging(base, adapted, SECTION.tokens) == {"merged/modules": 0.0, "merged/operations": 0.0}


@pytest.mark.slow
def test_chunks_take_their_share_of_the_memory_of_one_factor(base):
    """At 512 bases of 1,024 x 8 numbers, 16.8 MB, as in the bench; a heap in pieces, as in tests, may add to them."""
    section = dataclasses.replace(SECTION, layers=1, width=1024, heads=16, num_basis=512, chunk_size=16, rank=8)
    stack = cost.stack(section)
    found = cost.factor_memory({arm: cost.attach(arm, stack, section) for arm in cost.DRAWN})
    assert found["nola_regenerated"]["memory/factor"] > 16
    assert found["released"]["memory/factor"] > 16
    assert found["nola_chunked"]["memory/share"] < 1 / 8


@pytest.mark.slow
def test_a_round_has_every_arm_with_its_ratio_to_lora_and_what_it_adds_to_the_stack():
    frame = cost.measure("smoke")
    assert len(frame) == len(SECTION.arms) * SECTION.rounds
    for _, part in frame.groupby("round"):
        seconds = part.set_index("arm")["bench/seconds"]
        assert part["bench/ratio"].tolist() == pytest.approx((seconds / seconds["lora"]).tolist())
        shares = (seconds - seconds["none"]).drop("none")
        assert part["bench/share"].dropna().tolist() == pytest.approx(shares.tolist())
        gains = part.set_index("arm")["bench/gain"].dropna()
        assert gains.to_dict() == pytest.approx({arm: shares["released"] / shares[arm] for arm in cost.DRAWN})
    once = frame[frame["memory/step"].notna()]
    assert once["arm"].tolist() == list(SECTION.arms)
    assert set(once["round"]) == {0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("none", "lora", "dora")}, "arm must be one of"),
        ({"arms": ("none", "lora")}, "received arms without nola_chunked, nola_regenerated, nola_shared, released"),
        ({"rounds": 0}, "rounds must be above 0"),
    ],
)
def test_a_section_that_cannot_be_timed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SECTION, **change)
