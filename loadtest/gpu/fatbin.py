"""CUDA libraries without the machine code of GPUs that aren't there: a fifth of their size when packed.

A library holds regions (`.nv_fatbin`), each with one program for several architectures; the driver takes one by the entry's
header and reads no other. What is not needed is overwritten with zeros in place, so that no address changes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAGIC: Final = struct.pack("<I", 0xBA55ED50)
REGION: Final = struct.Struct("<IHHQ")
"""Magic, version, bytes of this header, bytes of the entries that follow."""
ENTRY: Final = struct.Struct("<HHIQIIHHI")
"""Kind, version, bytes of this header, bytes of the payload, (compressed), (options), PTX minor, major, architecture."""
VERSION: Final = 1
PTX: Final = 1
CUBIN: Final = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One program for one architecture (90 is Hopper's); `start` to `end` are its payload's bytes in the library."""

    kind: int
    architecture: int
    start: int
    end: int


def regions(library: bytes | bytearray) -> Iterator[list[Entry]]:
    """The programs of a library, region by region. Raises ValueError where one is not as expected."""
    at = 0
    while (at := library.find(MAGIC, at)) >= 0:
        if at + REGION.size > len(library):
            return
        _, version, header, size = REGION.unpack_from(library, at)
        if (version, header) != (VERSION, REGION.size):
            at += len(MAGIC)  # four bytes that happen to be the same
            continue
        yield list(_entries(library, at + header, at + header + size))
        at += header + size


def _entries(library: bytes | bytearray, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        if at + ENTRY.size > min(end, len(library)):
            raise ValueError(f"an entry of machine code at byte {at} runs over its region")
        kind, _, header, size, _, _, _, _, architecture = ENTRY.unpack_from(library, at)
        if kind not in (PTX, CUBIN) or header < ENTRY.size or at + header + size > end:
            raise ValueError(f"what begins at byte {at} is no entry of machine code")
        yield Entry(kind, architecture, at + header, at + header + size)
        at += header + size


def only_for(library: bytes, architecture: int) -> bytes:
    """The library with the code for other architectures zeroed.

    Where a region has machine code for this one, that alone stays; where it has none, its PTX for older ones stays, which
    the driver compiles.
    """
    kept = bytearray(library)
    for region in regions(library):
        native = [entry for entry in region if (entry.kind, entry.architecture) == (CUBIN, architecture)]
        portable = [entry for entry in region if entry.kind == PTX and entry.architecture <= architecture]
        for entry in region:
            if entry not in (native or portable):
                kept[entry.start : entry.end] = bytes(entry.end - entry.start)
    return bytes(kept)
