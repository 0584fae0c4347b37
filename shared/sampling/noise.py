"""Noise by address: exponential and Gumbel variables as a function of (seed, choice, stream, position, token).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns an address into
random bits: integers alone. The logarithm that makes exponential variables of them is a fixed sequence of additions,
multiplications and divisions in float64, each rounded as IEEE 754 says, and no library's. So a number is the same in
numpy and in torch, on any device, alone or among others, whatever else is asked for with it.

Tokens come in groups of `GROUP`. A group's smallest exponential variable and its owner are drawn first (the smallest of n
such variables is one with n times the rate, and any of them is it with the same probability); what the others have beyond
it are exponential variables again, since these have no memory. The variables are independent, as if they had been drawn one
by one, but one number tells how much noise a token of a group can have at most: who looks for the largest of logits plus
noise (`logits`) leaves out whole groups, exactly.

The functions take integers or arrays of int64, of numpy or torch, and broadcast them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Array = TypeVar("Array", npt.NDArray[Any], Tensor)

GROUP_BITS: Final = 6
GROUP: Final = 1 << GROUP_BITS
"""Tokens in a group."""

_WORD: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10

_MANTISSA_BITS: Final = 52
_RESOLUTION: Final = 2.0**-_MANTISSA_BITS
_SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD
_LN2: Final = 0.6931471805599453
_SERIES: Final = tuple(2.0 / (2 * n + 1) for n in range(10, -1, -1))
"""Coefficients of log((1 + s) / (1 - s)) = 2 s (1 + s²/3 + s⁴/5 + …), the last first."""


class Stream(IntEnum):
    """What the noise is for; different streams are independent."""

    TARGET = 0
    """A keyed draw: the target's, and that of everyone who foresees it. In ratio mode there is none."""
    DRAFT = 1
    """The draft's own draw, in ratio mode."""
    ACCEPT = 2
    """Whether a drafted token is accepted, in ratio mode."""
    RESIDUAL = 3
    """What is drawn where it is not, or after the last one, in ratio mode."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a draw takes place: `position` counts output tokens from 0, `choice` the answers to one request."""

    seed: int
    choice: int
    position: int
    stream: Stream = Stream.TARGET


class Address(NamedTuple):
    """Places as Philox sees them: two words of the key, three of the counter; integers, or arrays that broadcast."""

    seed_low: Any
    seed_high: Any
    position: Any
    choice: Any
    stream: Any

    def take(self, rows: Any) -> Address:
        """Those of some places, by their index."""
        return Address(*(word[rows] for word in self))

    def column(self) -> Address:
        """As columns, to be broadcast against a row of tokens each."""
        return Address(*(word[:, None] for word in self))


def address(place: Place) -> Address:
    """One place."""
    return Address(
        place.seed & _WORD,
        (place.seed >> 32) & _WORD,
        place.position & _WORD,
        place.choice & _WORD,
        int(place.stream) << 1,
    )


def addresses(places: Sequence[Place]) -> Address:
    """Several places, as arrays of numpy `[places]`."""
    return Address(*np.array([address(place) for place in places], dtype=np.int64).reshape(-1, 5).T)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four words of 32 random bits for each counter (four words) and key (two words)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(_ROUNDS):
        if number:
            k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
        p0, p1 = (
            c0 * _MULTIPLIERS[0],
            c2 * _MULTIPLIERS[1],
        )  # int64 wraps; all 64 bits of the product are there
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
    return c0, c1, c2, c3


def uniform(at: Address, index: Array) -> Array:
    """Uniform on (0, 1), in steps of 2⁻⁵² and never 0 or 1: the `index`th of a place (of a stream that draws no tokens)."""
    drawn: Array = _uniform(_words(at, index))
    return drawn


def exponential(at: Address, tokens: Array) -> Array:
    """A token's exponential variable, of mean 1."""
    stream = at.stream + _stack(0 * tokens, 0 * tokens + 1)
    words = _words(at._replace(stream=stream), _stack(tokens, tokens >> GROUP_BITS))
    own, least = _minus_log(_uniform(words))  # each word holds the tokens' own and their groups'
    others = (tokens & (GROUP - 1)) != (words[2][1] & (GROUP - 1))
    drawn: Array = least * (1.0 / GROUP) + own * others
    return drawn


def gumbel(at: Address, tokens: Array) -> Array:
    """A token's standard Gumbel variable, -log of its exponential one."""
    drawn: Array = _minus_log(exponential(at, tokens))
    return drawn


def peaks(at: Address, groups: Array) -> tuple[Array, Array]:
    """The smallest exponential variable of each group, and which of its `GROUP` tokens has it."""
    words = _words(at._replace(stream=at.stream + 1), groups)
    return _minus_log(_uniform(words)) * (1.0 / GROUP), words[2] & (GROUP - 1)


def peak_gumbel(at: Address, groups: Array) -> tuple[Array, Array]:
    """The largest Gumbel variable of each group, and which of its `GROUP` tokens has it."""
    least, owner = peaks(at, groups)
    return _minus_log(least), owner


def _words(at: Address, index: Any) -> tuple[Any, Any, Any, Any]:
    return philox((index, at.position, at.choice, at.stream), (at.seed_low, at.seed_high))


def _stack(first: Any, second: Any) -> Any:
    return torch.stack((first, second)) if isinstance(first, Tensor) else np.stack((first, second))


def _uniform(words: tuple[Any, Any, Any, Any]) -> Any:
    bits = (words[0] << (_MANTISSA_BITS - 32)) | (words[1] >> (64 - _MANTISSA_BITS))
    return (_float(bits) + 0.5) * _RESOLUTION


def _minus_log(values: Any) -> Any:
    """-log of positive normal float64s, to about one unit in the last place."""
    bits = _bits(values)
    exponent = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    mantissa = _of_bits(bits - (exponent << _MANTISSA_BITS))  # in [√½, √2)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    total = z * _SERIES[0]
    for coefficient in _SERIES[1:-1]:
        total = (total + coefficient) * z
    total = (total + _SERIES[-1]) * s
    return -(total + _float(exponent) * _LN2)


def _float(values: Any) -> Any:
    return values.to(torch.float64) if isinstance(values, Tensor) else np.asarray(values).astype(np.float64)


def _bits(values: Any) -> Any:
    return values.view(torch.int64) if isinstance(values, Tensor) else values.view(np.int64)


def _of_bits(values: Any) -> Any:
    return values.view(torch.float64) if isinstance(values, Tensor) else values.view(np.float64)
