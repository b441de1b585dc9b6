"""The ranks that the paper's argument rests on (property 8), against their formulas."""

import pytest

from limbeck.adapters import reach


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("k", [3, 6, 12, 16])
def test_nola_spans_the_product_of_its_numbers_and_pranc_only_their_sum(k, r):
    d = 12
    nola = reach("nola", d=d, num_basis=(k, k), r=r)
    pranc = reach("pranc", d=d, num_basis=(k, k), r=r)
    assert nola.numbers == pranc.numbers == 2 * k
    assert nola.span == min(min(k, d * r) ** 2, d * d)
    assert pranc.span == pranc.jacobian == 2 * k
    assert nola.jacobian == min(2 * k - 1, r * (2 * d - r))


def test_the_values_verified_for_the_specification():
    spans = {
        k: (reach("nola", d=12, num_basis=(k, k), r=2).span, reach("pranc", d=12, num_basis=(k, k), r=2).span)
        for k in (6, 12, 16)
    }
    assert spans == {6: (36, 12), 12: (144, 24), 16: (144, 32)}


@pytest.mark.parametrize("r", [1, 2, 4])
def test_lora_spans_everything_and_is_locally_the_manifold_of_its_rank(r):
    found = reach("lora", d=8, num_basis=(1, 1), r=r)
    assert (found.numbers, found.span, found.jacobian) == (16 * r, 64, r * (16 - r))


def test_unequal_counts_and_another_seed():
    assert reach("nola", d=6, num_basis=(2, 5), r=2, seed=1).span == 10
    assert reach("nola", d=6, num_basis=(2, 5), r=2, seed=1).jacobian == 6
    assert reach("nola", d=6, num_basis=(9, 1), r=1).span == 6  # k beyond d r is wasted


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="method 'vera', expected one of nola, pranc, lora"):
        reach("vera", d=2, num_basis=(1, 1), r=1)
    with pytest.raises(ValueError, match=r"num_basis \(0, 1\) and r 1, expected at least 1"):
        reach("nola", d=2, num_basis=(0, 1), r=1)
