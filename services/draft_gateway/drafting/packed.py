"""Weights of few bits as they lie on disk: six bits a value with a scale per row, and product-quantised rows.

Only packing and unpacking; what the numbers mean is for the draft model to know.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BITS: Final = 6
MOST: Final = 2 ** (BITS - 1) - 1


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Six-bit values (int8, -31 … 31) and one float32 scale per row of `weight` `[rows, columns]`."""
    scale = weight.float().abs().amax(dim=-1).clamp(min=1e-8) / MOST
    values = (weight.float() / scale[:, None]).round().clamp(-MOST, MOST)
    return values.to(torch.int8), scale


def pack(values: Tensor) -> Tensor:
    """Four six-bit values (int8, -32 … 31) in three bytes; the number of columns is a multiple of 4."""
    first, second, third, fourth = (values.int() + 32).view(len(values), -1, 4).unbind(-1)
    word = first | second << 6 | third << 12 | fourth << 18
    parts = torch.stack((word & 255, word >> 8 & 255, word >> 16 & 255), dim=-1)
    return parts.to(torch.uint8).flatten(1)


def unpack(packed: Tensor) -> Tensor:
    """The values (int8) of `pack`."""
    low, middle, high = packed.int().view(len(packed), -1, 3).unbind(-1)
    word = low | middle << 8 | high << 16
    parts = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1)
    return (parts - 32).to(torch.int8).flatten(1)


def product_codes(rows: Tensor, *, group: int, codes: int, rounds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Product quantisation of `rows` `[n, width]` by k-means: codes uint8 `[n, width / group]`, codebooks
    `[width / group, codes, group]`. At most 256 codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = min(codes, len(rows))
    parts = rows.float().view(len(rows), -1, group)
    picked = torch.randperm(len(rows), generator=generator)[:codes].to(rows.device)
    sample = torch.randperm(len(rows), generator=generator)[: 128 * codes].to(rows.device)
    chosen, books = [], []
    for part in parts.unbind(1):
        book, seen = part[picked].clone(), part[sample]
        for _ in range(rounds):
            nearest = torch.cdist(seen, book).argmin(dim=1)
            count = torch.bincount(nearest, minlength=codes)
            total = torch.zeros_like(book).index_add_(0, nearest, seen)
            book = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], book)
        chosen.append(torch.cdist(part, book).argmin(dim=1))
        books.append(book)
    return torch.stack(chosen, dim=1).to(torch.uint8), torch.stack(books)


def product_rows(codes: Tensor, books: Tensor) -> Tensor:
    """The rows `[n, width]` that codes `[n, groups]` stand for."""
    group = torch.arange(codes.shape[1], device=codes.device)
    return books[group, codes.long()].flatten(1)
