"""Noise: Philox as published, the same bits in numpy and torch, in any company, and distributed as it should be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shared.sampling import noise
from shared.sampling.noise import GROUP, Place, Stream

VOCABULARY = 49152
PLACES = [
    Place(0, 0, 0),
    Place(2**64 - 1, 3, 17, Stream.RESIDUAL),
    Place(0x123456789ABCDEF0, 1, 4096, Stream.DRAFT),
]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert noise.philox(counter, key) == words
    for arrays in (
        noise.philox(tuple(np.array([word]) for word in counter), key),
        noise.philox(tuple(torch.tensor([word]) for word in counter), key),
        noise.philox(counter, tuple(np.array([word]) for word in key)),
    ):
        assert tuple(int(word[0]) for word in arrays) == words


@pytest.mark.parametrize("place", PLACES)
def test_numpy_and_torch_give_the_same_bits(place: Place) -> None:
    torch.set_num_threads(1)
    tokens = np.arange(VOCABULARY)
    at = noise.address(place)
    for function in (noise.exponential, noise.gumbel, noise.uniform):
        ours = function(at, tokens)
        theirs = function(at, torch.arange(VOCABULARY))
        assert ours.dtype == np.float64
        assert np.array_equal(ours.view(np.int64), theirs.numpy().view(np.int64))


@pytest.mark.parametrize("place", PLACES)
def test_a_token_has_the_same_noise_alone_among_others_and_beside_other_places(place: Place) -> None:
    whole = noise.exponential(noise.address(place), np.arange(VOCABULARY))
    some = np.array([5, 49151, 5, 256, 255, 30000])
    assert np.array_equal(noise.exponential(noise.address(place), some), whole[some])
    at = noise.addresses([*PLACES, place])
    together = noise.exponential(at.column(), some[None])
    assert np.array_equal(together[-1], whole[some])
    assert np.array_equal(noise.exponential(at.take(np.array([3, 3])), some[:2]), whole[some[:2]])


def test_a_group_s_peak_is_its_owner_s_noise_and_no_other_token_has_more() -> None:
    at = noise.address(Place(11, 0, 3))
    gumbel = noise.gumbel(at, np.arange(VOCABULARY)).reshape(-1, GROUP)
    peaks, owners = noise.peak_gumbel(at, np.arange(VOCABULARY // GROUP))
    assert np.array_equal(gumbel.argmax(axis=1), owners)
    assert np.array_equal(gumbel.max(axis=1), peaks)


def other_places() -> Iterator[tuple[str, Place]]:
    yield "seed, low word", Place(8, 2, 5)
    yield "seed, high word", Place(7 + (1 << 32), 2, 5)
    yield "choice", Place(7, 3, 5)
    yield "position", Place(7, 2, 6)
    yield "stream", Place(7, 2, 5, Stream.DRAFT)


@pytest.mark.parametrize(("what", "other"), list(other_places()))
def test_noise_of_another_place_is_independent(what: str, other: Place) -> None:
    tokens = np.arange(VOCABULARY)
    here = noise.exponential(noise.address(Place(7, 2, 5)), tokens)
    there = noise.exponential(noise.address(other), tokens)
    assert not np.any(here == there)
    assert abs(np.corrcoef(here, there)[0, 1]) < 5 / math.sqrt(VOCABULARY)


def kolmogorov(sample: np.ndarray) -> float:
    """P of a greatest distance from uniform as large as this sample's (Kolmogorov's limit)."""
    n = len(sample)
    ordered = np.sort(sample)
    above = np.arange(1, n + 1) / n - ordered
    below = ordered - np.arange(n) / n
    distance = math.sqrt(n) * max(above.max(), below.max())
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * distance**2) for k in range(1, 101))


def test_exponential_noise_is_exponential_across_tokens_and_across_positions() -> None:
    tokens = noise.exponential(noise.address(Place(1, 0, 0)), np.arange(200_000))
    assert kolmogorov(1 - np.exp(-tokens)) > 0.001
    places = noise.addresses([Place(1, 0, position) for position in range(50_000)])
    positions = noise.exponential(places, np.full(50_000, 77))
    assert kolmogorov(1 - np.exp(-positions)) > 0.001


def test_neighbours_in_a_group_are_independent() -> None:
    """What ties them is that one of them owns the peak."""
    places = noise.addresses([Place(3, 0, position) for position in range(100_000)])
    left = 1 - np.exp(-noise.exponential(places, np.full(100_000, 512)))
    right = 1 - np.exp(-noise.exponential(places, np.full(100_000, 513)))
    table = np.histogram2d(left, right, bins=10, range=((0, 1), (0, 1)))[0]
    chi_squared = float(((table - 1000) ** 2 / 1000).sum())
    assert chi_squared < 99 + 3.3 * math.sqrt(2 * 99)


def test_uniform_noise_is_uniform_and_never_0_or_1() -> None:
    sample = noise.uniform(noise.address(Place(5, 0, 0, Stream.ACCEPT)), np.arange(200_000))
    assert 0 < sample.min() < sample.max() < 1
    assert kolmogorov(sample) > 0.001


def test_the_logarithm_is_one() -> None:
    values = np.exp(np.linspace(-40, 4, 100_001))
    assert np.abs(noise._minus_log(values) + np.log(values)).max() < 1e-14
    near_one = 1 - np.geomspace(2.0**-53, 0.3, 1000)
    ours = noise._minus_log(near_one)
    assert np.all(np.abs(ours + np.log(near_one)) <= 4e-16 * np.abs(ours))
