"""Files as one stream, cut into numbered folders: none is larger than a transfer may be, and none is half empty.

    DIR/1/part, DIR/2/part, ...

The stream is a tar. Its first member is the contents: what follows, in order. Where the last folders are missing, what the
others hold in full is there all the same.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

PART: Final = "part"
CONTENTS: Final = "contents.json"
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """One file of the stream: its name there, its length in bytes, what it is for."""

    name: str
    size: int
    holds: str


class _Cut(RawIOBase):
    """Writes to folder after folder, each part at most `most` bytes long."""

    def __init__(self, directory: Path, most: int) -> None:
        self._directory = directory
        self._most = most
        self._left = 0
        self._file: BinaryIO | None = None
        self.folders: list[Path] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        written = 0
        while written < len(view):
            if not self._left:
                self._next()
            assert self._file is not None
            share = view[written : written + self._left]
            self._file.write(share)
            written += len(share)
            self._left -= len(share)
        return written

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        folder = self._directory / str(len(self.folders) + 1)
        folder.mkdir(parents=True)
        self.folders.append(folder)
        self._file = (folder / PART).open("wb")
        self._left = self._most

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class _Joined(RawIOBase):
    """Reads part after part."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._parts = list(parts)
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._parts:
                    return 0
                self._file = self._parts.pop(0).open("rb")
            count = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if count:
                return int(count)
            self._file.close()
            self._file = None


def write(directory: Path, files: Sequence[tuple[Path, str]], most: int) -> list[Path]:
    """Put the files (and what each is for) into folders of at most `most` bytes; the folders."""
    items = [Item(path.name, path.stat().st_size, holds) for path, holds in files]
    listed = json.dumps([asdict(item) for item in items]).encode()
    cut = _Cut(directory, most)
    # A stream's blocks are padded to its buffer's length: no longer than a block of a tar.
    with tarfile.open(fileobj=cast(BinaryIO, cut), mode="w|", bufsize=tarfile.BLOCKSIZE) as stream:
        header = tarfile.TarInfo(CONTENTS)
        header.size = len(listed)
        stream.addfile(header, BytesIO(listed))
        for path, _ in files:
            stream.add(path, path.name)
    cut.close()
    return cut.folders


def folders(directory: Path) -> list[Path]:
    """The parts from the first on, as far as none is missing."""
    found: list[Path] = []
    while (part := directory / str(len(found) + 1) / PART).is_file():
        found.append(part)
    return found


def read(directory: Path, into: Path) -> Iterator[tuple[Item, Path | None]]:
    """What was packed, in order: each file put into `into`, None where it is not there in full.

    Raises ValueError when there is no first part, or it is none of ours.
    """
    parts = folders(directory)
    if not parts:
        raise ValueError(f"{directory} holds no {Path('1') / PART}")
    joined = _Joined(parts)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, joined), mode="r|") as stream:
            first = stream.next()
            held = stream.extractfile(first) if first is not None and first.name == CONTENTS else None
            if held is None:
                raise ValueError(f"{parts[0]} is not what `scripts/gpu pack` makes")
            items = [Item(**item) for item in json.load(held)]
            for item in items:
                yield item, _take(stream, item, into / item.name)
    except tarfile.ReadError as error:
        raise ValueError(f"{parts[0]} is not what `scripts/gpu pack` makes: {error}") from error


def _take(stream: tarfile.TarFile, item: Item, into: Path) -> Path | None:
    """The next member as a file; None where the stream ends before it does."""
    try:
        member = stream.next()
        held = stream.extractfile(member) if member is not None else None
        if held is None:
            return None
        with into.open("wb") as file:
            while data := held.read(_CHUNK):
                file.write(data)
    except (tarfile.ReadError, EOFError):
        return None
    return into if into.stat().st_size == item.size else None
