"""Raw files, plain, packed or in an archive, as bytes; and names and counts as messages write them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    # An Arrow stream lacks methods that pandas asks for.
    ".zst": lambda path: io.BytesIO(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read()),
}


@dataclass(frozen=True)
class RawFile:
    """A file of interactions, or a folder with `train.txt` and `test.txt`.

    Args:
        path: the file or folder.
        member: the file inside, if `path` is a zip archive.
        delimiter: the separator of columns, if the file extension does not tell it.
        columns: the names of the columns, if the file has no header.
    """

    path: Path
    member: str | None = None
    delimiter: str | None = None
    columns: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.member} in {self.path}" if self.member else str(self.path)

    @property
    def suffix(self) -> str:
        """The file extension in small letters, without that of the packing: `.csv` for `log.csv.gz`."""
        path = Path(self._inside or self.path.name)
        return Path(path.stem if path.suffix.lower() in _PACKED else path.name).suffix.lower()

    @property
    def _inside(self) -> str | None:
        """The file in a zip archive.

        Raises:
            ValueError: it is not said which of several.
        """
        if self.member or self.path.suffix.lower() != ".zip" or not zipfile.is_zipfile(self.path):
            return self.member
        with zipfile.ZipFile(self.path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
        if len(names) != 1:
            raise ValueError(
                f"{self.path} holds {len(names)} files ({quoted(names[:5])}); unpack it and give one of them."
            )
        return names[0]

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the unpacked file for reading bytes.

        Raises:
            ValueError: the archive is damaged or lacks the member.
        """
        try:
            if inside := self._inside:
                with zipfile.ZipFile(self.path) as archive, archive.open(inside) as member:
                    yield member
            else:
                unpack = _PACKED.get(self.path.suffix.lower(), lambda path: path.open("rb"))
                with unpack(self.path) as stream:
                    yield stream
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, KeyError) as error:
            raise ValueError(f"{self} cannot be unpacked ({error}); delete it and fetch it again.") from error


def quoted(names: Sequence[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(repr(name) for name in names)


def counted(number: int, noun: str) -> str:
    """A number of things as a message writes it: "1 user", "2 users"."""
    return f"{number} {noun}{'s' * (number != 1)}"
