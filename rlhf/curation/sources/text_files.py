"""Text files as people have them: compressed or not, in UTF-8 or in the encoding that the description names.

A byte order mark states an encoding and is obeyed. Nothing else is guessed: a file that is not UTF-8 is an error that
says what to write.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from rlhf.errors import UserError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip")
MAX_LINE = 8_000_000  # characters or bytes; no row is that long unless a line break or a quotation mark is missing
MOST_TIMES, FREE_BYTES = 200, 2**30  # how much larger an archive may become; gzip's most is 1,032 times
BUFFER = 2**18
_SAMPLE = 65_536
FEW_BYTES = 8  # bytes beyond ASCII; fewer do not show an encoding
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_MAGIC = ((b"\x1f\x8b", "gzip", ".gz"), (b"PK\x03\x04", "a zip archive", ".zip"), (b"\xfd7zXZ", "xz data", ".xz"),
          (b"BZh", "bzip2 data", ".bz2"), (b"\x28\xb5\x2f\xfd", "zstandard data", ".zst"))
# What the encoding of a text is chosen from for the advice: the code pages of Windows, and East Asia's.
_LIKELY = ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp932", "euc_jp", "gb18030", "big5", "cp949"]


def plain_name(file: Path) -> str:
    """The file's name without the ending of its compression; of a zip archive the name of the file inside.

    Raises UserError for an archive of several files.
    """
    suffix = file.suffix.lower()
    if suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            return PurePosixPath(_member(archive, file)).name
    return file.stem if suffix in COMPRESSED else file.name


def _member(archive: zipfile.ZipFile, file: Path) -> str:
    names = [item.filename for item in archive.infolist() if not item.is_dir()
             and not item.filename.startswith("__MACOSX/") and PurePosixPath(item.filename).name != ".DS_Store"]
    if len(names) != 1:
        listed = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise UserError(f"{file}: holds {len(names)} files ({listed}); a zip archive must hold one, unpack it first")
    return names[0]


class _Bounded(io.RawIOBase):
    """The decompressed bytes of a file, as long as there are not far too many for its size."""

    def __init__(self, inner: IO[bytes], file: Path) -> None:
        self.inner, self.file, self.count = inner, file, 0
        self.most = MOST_TIMES * file.stat().st_size + FREE_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.inner.read(len(buffer))
        buffer[: len(content)] = content
        self.count += len(content)
        if self.count > self.most:
            raise UserError(f"{self.file}: becomes more than {MOST_TIMES} times as large when it is unpacked "
                            f"({self.count:,} bytes so far), which no data does; unpack it yourself if you trust it")
        return len(content)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes, decompressed. A truncated archive raises EOFError, OSError or BadZipFile while it is read.

    Raises UserError for a file that is made to fill memory and disk.
    """
    with _unpacked(file) as handle:
        if file.suffix.lower() not in COMPRESSED:
            yield handle
            return
        with io.BufferedReader(_Bounded(handle, file), BUFFER) as bounded:
            yield cast(IO[bytes], bounded)


@contextmanager
def _unpacked(file: Path) -> Iterator[IO[bytes]]:
    suffix = file.suffix.lower()
    with ExitStack() as stack:
        if suffix == ".gz":
            yield cast(IO[bytes], stack.enter_context(gzip.GzipFile(file)))
        elif suffix == ".bz2":
            yield stack.enter_context(bz2.open(file))
        elif suffix == ".xz":
            yield stack.enter_context(lzma.open(file))
        elif suffix == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(file))
            yield stack.enter_context(archive.open(_member(archive, file)))
        elif suffix == ".zst":  # zstandard's own reader takes a truncated file for a whole one
            import pyarrow

            yield stack.enter_context(io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
        else:
            yield stack.enter_context(file.open("rb"))


def _encoding(file: Path, named: str) -> tuple[str, int]:
    """(encoding, length of the byte order mark). Raises UserError where the file contradicts the name."""
    with _opened(file) as handle:
        start = handle.read(_SAMPLE)
    for magic, what, suffix in _MAGIC:
        if start.startswith(magic):
            raise UserError(f"{file}: is {what}; its name must end in {suffix}")
    for mark, encoding in _BOMS:
        if start.startswith(mark):
            if named and not codecs.lookup(named).name.startswith(encoding):
                raise UserError(f"{file}: begins with the byte order mark of {encoding}, encoding is {named}; "
                                "remove encoding from the description")
            return encoding, len(mark) if encoding == "utf-8" else 0
    if named and not codecs.lookup(named).name.startswith("utf") and not start.isascii() and _is_utf8(start):
        raise UserError(f"{file}: is UTF-8, encoding is {named}; remove encoding, or give the file an entry of its own")
    zeros = start[0::2].count(0), start[1::2].count(0)
    if not named and max(zeros) > 0.2 * len(start) / 2:
        kind = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        raise UserError(f"{file}: is not UTF-8; it looks like UTF-16 without a byte order mark: write encoding: {kind}")
    return named or "utf-8", 0


def _is_utf8(start: bytes) -> bool:
    """Whether bytes begin a UTF-8 text, whose last character may be cut off. Text of a code page hardly ever does."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def likely_encodings(text: bytes) -> list[str]:
    """The encodings that bytes which are not UTF-8 are probably in; the commonest first of those that fit alike."""
    from charset_normalizer import from_bytes

    if sum(byte > 127 for byte in text) < FEW_BYTES:  # too few to tell by: all that can be
        return [name for name in _LIKELY if _decodes(text, name)]
    found = list(from_bytes(text, cp_isolation=_LIKELY))
    alike = {name for match in found if (match.chaos, match.coherence) == (found[0].chaos, found[0].coherence)
             for name in (match.encoding, *match.could_be_from_charset)}
    return [name for name in _LIKELY if name in alike]


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        text.decode(encoding)
    except UnicodeError:
        return False
    return True


def _not_utf8(file: Path, where: str, text: bytes) -> UserError:
    likely = likely_encodings(text) or ["its name"]
    others = f" (or {', '.join(likely[1:])})" if likely[1:] else ""
    return UserError(f"{file}: {where}not UTF-8; write its encoding in the description, probably encoding: {likely[0]}"
                     f"{others}")


def text_lines(file: Path, named: str) -> Iterator[str]:
    """The lines, each with its line end, which is a line feed.

    A line that is not UTF-8 has U+FFFD in the place of its bad bytes, where other lines show that the file is UTF-8.
    Raises UserError for a file in another encoding than `named` (empty: UTF-8), and for a line beyond MAX_LINE.
    """
    encoding, mark = _encoding(file, named)
    if codecs.lookup(encoding).name != "utf-8":
        yield from _decoded_lines(file, encoding)
        return
    broken, is_utf8 = b"", False
    where = ""
    with _opened(file) as handle:
        handle.read(mark)
        number = 0
        while line := handle.readline(MAX_LINE + 1):
            number += 1
            _check_length(line, file, number)
            if line.isascii():
                yield line.decode("ascii")
                continue
            try:
                text = line.decode("utf-8")
                is_utf8 = True
            except UnicodeDecodeError as error:
                where = where or f"line {number}, byte {error.start + 1}: "
                broken += line if len(broken) < _SAMPLE else b""
                text = line.decode("utf-8", "replace")
            yield text
    if broken and not is_utf8:
        raise _not_utf8(file, where, broken)


def _decoded_lines(file: Path, encoding: str) -> Iterator[str]:
    with _opened(file) as handle, io.TextIOWrapper(handle, encoding, newline="\n") as text:
        number = 0
        try:
            while line := text.readline(MAX_LINE + 1):
                number += 1
                _check_length(line, file, number)
                yield line
        except UnicodeError as error:
            raise UserError(f"{file}: after line {number}: not {encoding}: {error}") from None


def _check_length(line: str | bytes, file: Path, number: int) -> None:
    if len(line) > MAX_LINE:
        raise UserError(f"{file}: line {number}: longer than {MAX_LINE:,} characters; check for a missing line break")


def text_chunks(file: Path, named: str) -> Iterator[str]:
    """The text in pieces. Raises UserError for a file in another encoding than `named` (empty: UTF-8)."""
    encoding, mark = _encoding(file, named)
    with _opened(file) as handle:
        handle.read(mark)
        decode = codecs.getincrementaldecoder(encoding)()
        while True:
            piece = handle.read(1 << 20)
            try:
                text = decode.decode(piece, final=not piece)
            except UnicodeError as error:
                if named:
                    raise UserError(f"{file}: not {encoding}: {error}") from None
                raise _not_utf8(file, "", piece) from None
            if text:
                yield text
            if not piece:
                return
