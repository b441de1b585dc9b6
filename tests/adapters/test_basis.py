"""Bases: fixed slices of a stream, the same whatever was drawn before, after or around them."""

import hashlib
import math
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import materialised
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.adapters import basis
from limbeck.adapters.basis import Bank, Stream

SHAPES = [(1, 1), (3, 5), (4, 4), (17, 15), (64, 2)]


@pytest.mark.parametrize("distribution", basis.DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_value_comes_from_the_bits_of_its_word(distribution, shape):
    drawn = Stream(5, "layer", "A", shape, distribution).draw(0, 4)
    expected = materialised.bases(5, "layer", "A", shape, 4, distribution).flatten(1)
    torch.testing.assert_close(drawn.double(), expected, atol=1e-7, rtol=0)
    if distribution == "uniform":
        assert torch.equal(drawn.double(), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(basis.DISTRIBUTIONS),
    st.sampled_from(SHAPES),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_a_chunk_is_a_slice_of_the_whole_whatever_was_drawn_between(distribution, shape, start, count, other):
    stream = Stream(1, "key", "B", shape, distribution)
    whole = stream.draw(0, 18)
    stream.draw(other, 3)
    assert torch.equal(stream.draw(start, count), whole[start : start + count])


@pytest.fixture
def threads(monkeypatch):
    """Sets torch's number of threads, and gives the names of those that have drawn since; parts are eight words."""
    names, values, before = set(), basis._values, torch.get_num_threads()

    def watched(*args):
        names.add(threading.current_thread().name.rpartition("_")[0])
        return values(*args)

    def use(number):
        names.clear()
        torch.set_num_threads(number)
        return names

    monkeypatch.setattr(basis, "_PART", 8)
    monkeypatch.setattr(basis, "_values", watched)
    yield use
    torch.set_num_threads(before)


@pytest.mark.parametrize("distribution", basis.DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(17, 15), (40, 31)])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_number_of_threads_draws_the_same_bits(threads, distribution, shape, number):
    names = threads(number)
    drawn = Stream(5, "layer", "A", shape, distribution).draw(1, 3)
    expected = materialised.bases(5, "layer", "A", shape, 4, distribution).flatten(1)[1:]
    torch.testing.assert_close(drawn.double(), expected, atol=1e-7, rtol=0)
    assert names == ({"limbeck-bases"} if number > 1 else {""}), "the pool serves, but not where there is one thread"


def test_a_process_that_forked_draws_too(threads):
    threads(2)
    stream = Stream(0, "key", "A", (40, 30))
    here, child = stream.draw(0, 3), os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        os._exit(0 if torch.equal(stream.draw(0, 3), here) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("distribution", basis.DISTRIBUTIONS)
def test_more_bases_begin_with_the_same_bases(distribution):
    stream = Stream(1, "key", "A", (5, 3), distribution)
    assert torch.equal(stream.draw(0, 9)[:4], stream.draw(0, 4))


@pytest.mark.parametrize("distribution", basis.DISTRIBUTIONS)
def test_the_possible_values_are_symmetric_and_have_variance_one_third(distribution):
    words = [sum((4 * i + j) << 16 * j for j in range(4)) for i in range(2**14)]  # every 16-bit number once
    values = torch.tensor(
        [materialised.value(w, j, distribution) for w in words for j in range(4)], dtype=torch.float64
    )
    if distribution == "rademacher":
        values = torch.tensor([materialised.value(2, j, distribution) for j in range(2)], dtype=torch.float64)
    assert values.sort().values.add(values.sort().values.flip(0)).abs().max() < 1e-12
    assert values.square().mean().item() == pytest.approx(1 / 3, rel=3e-5)


@pytest.mark.parametrize("distribution", basis.DISTRIBUTIONS)
def test_draws_have_the_mean_and_the_variance_of_their_distribution(distribution):
    values = Stream(3, "key", "A", (100, 100), distribution).draw(0, 20).double().flatten()
    fourth = {"uniform": 1 / 5, "normal": 1 / 3, "rademacher": 1 / 9}[distribution]
    assert abs(values.mean()) < 5 * math.sqrt(1 / 3 / len(values))  # 5 sigma
    spread = math.sqrt((fourth - 1 / 9) / len(values))
    assert abs(values.square().mean() - 1 / 3) < 5 * spread + 2e-5


@pytest.mark.parametrize(
    "other", [Stream(1, "b", "A", (50, 40)), Stream(0, "a", "A", (50, 40)), Stream(1, "a", "B", (50, 40))]
)
def test_streams_of_other_names_are_independent(other):
    one, two = (stream.draw(0, 10).double().flatten() for stream in (Stream(1, "a", "A", (50, 40)), other))
    assert abs((one * two).mean()) < 5 / 3 / math.sqrt(len(one))  # 5 sigma


def test_draws_neither_read_nor_change_a_global_generator(global_generators):
    stream = Stream(0, "key", "A", (6, 4), "normal")
    first, before = stream.draw(0, 3), global_generators()
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(stream.draw(0, 3), first)
    torch.manual_seed(5)
    state = global_generators()
    stream.draw(0, 3)
    assert global_generators() == state != before


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(Exception, match="int"):
        Stream(seed, "key", "A", (2, 2)).draw(0, 1)


# Golden: if the generator changes on purpose, raise the number in basis.GENERATOR, and print these anew with
# python -c "from test_basis import golden; golden()"   (in tests/adapters)
GOLDEN = {
    "uniform": "ba3d04f9adad067a",
    "normal": "449f5ae699f9b804",
    "rademacher": "3c12d4cc36ae7170",
}


def digest(distribution):
    drawn = Stream(2024, "16x4", "A", (16, 4), distribution).draw(3, 5)
    return hashlib.sha256(drawn.numpy().astype("<f4").tobytes()).hexdigest()[:16]


def golden():
    print({distribution: digest(distribution) for distribution in basis.DISTRIBUTIONS})


@pytest.mark.parametrize("distribution", basis.DISTRIBUTIONS)
def test_the_generator_of_this_version_never_changes(distribution):
    assert basis.GENERATOR == "philox4x64-10, 16 bits a value, 1"
    assert digest(distribution) == GOLDEN[distribution]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 10**6])
def test_a_bank_casts_what_was_drawn_in_float32(dtype, budget):
    """Drawing in bfloat16 would give a coarser basis; rounding one gives another number, but the nearest."""
    stream, like = Stream(0, "key", "A", (6, 4)), torch.empty(0, dtype=dtype)
    parts = list(Bank().chunks(stream, 10, like=like, chunk_size=4, budget=budget))
    assert [start for start, _ in parts] == ([0] if budget else [0, 4, 8])
    assert torch.equal(torch.cat([part for _, part in parts]), stream.draw(0, 10).to(dtype))


def test_a_bank_keeps_what_its_budget_holds_once_for_each_stream():
    bank, like = Bank(), torch.empty(0)
    streams = [Stream(0, "key", factor, (6, 4)) for factor in "AAB"]
    for stream in streams:
        list(bank.chunks(stream, 10, like=like, chunk_size=4, budget=10 * 24 * 4))
    assert [name[0].factor for name in bank.kept] == ["A"]
    for stream in streams:
        list(bank.chunks(stream, 10, like=like, chunk_size=4, budget=2 * 10 * 24 * 4))
    assert [name[0].factor for name in bank.kept] == ["A", "B"]
    assert not pickle.loads(pickle.dumps(bank)).kept  # noqa: S301


def test_a_draw_that_is_interrupted_leaves_nothing_behind(monkeypatch):
    bank, stream, like, draw, calls = Bank(), Stream(0, "key", "A", (6, 4)), torch.empty(0), Stream.draw, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(Stream, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(bank.chunks(stream, 10, like=like, chunk_size=4, budget=10**6))
    assert not bank.kept
    ((_, bases),) = bank.chunks(stream, 10, like=like, chunk_size=4, budget=10**6)
    assert torch.equal(bases, draw(stream, 0, 10))


def test_no_thread_meets_bases_that_another_has_not_drawn_to_the_end():
    stream, like = Stream(0, "key", "A", (64, 8)), torch.empty(0)
    expected = stream.draw(0, 96)
    for _ in range(20):
        bank, start = Bank(), threading.Barrier(4)

        def first(_, bank=bank, start=start):
            start.wait()
            ((_, bases),) = bank.chunks(stream, 96, like=like, chunk_size=1, budget=10**9)
            return bases.clone()

        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(bases, expected) for bases in pool.map(first, range(4)))


def test_a_checksum_tells_every_difference_and_no_order():
    streams = [Stream(0, "a", "A", (6, 4)), Stream(0, "b", "A", (6, 4))]
    checksum = Bank().checksum(streams)
    assert Bank().checksum([*reversed(streams), streams[0]]) == checksum
    others = [
        Stream(1, "a", "A", (6, 4)),
        Stream(0, "c", "A", (6, 4)),
        Stream(0, "a", "B", (6, 4)),
        Stream(0, "a", "A", (4, 6)),
        Stream(0, "a", "A", (6, 4), "normal"),
    ]
    sums = {checksum, *(Bank().checksum([other, streams[1]]) for other in others)}
    assert len(sums) == 1 + len(others)
    assert Bank({streams[0]: torch.zeros(3, 24)}).checksum(streams) != checksum


def test_a_wrong_inverse_of_the_normal_distribution_is_refused_by_name(monkeypatch):
    right = basis.ndtri
    monkeypatch.setattr(basis, "ndtri", lambda p: right(p) + 1e-6 * (p < 1e-5))
    with pytest.raises(ValueError, match=r"received scipy\.special\.ndtri off by 9\.99.*e-07, expected the inverse"):
        basis._normal_table.__wrapped__()


def test_the_whole_table_of_the_normal_distribution_is_that_of_the_standard_library():
    expected = [NormalDist().inv_cdf((i + 0.5) / 65536) / 3**0.5 for i in range(65536)]
    np.testing.assert_allclose(basis._normal_table(), expected, rtol=2**-23, atol=2e-9)
