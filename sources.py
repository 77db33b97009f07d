"""How a source of texts is read: plain or compressed text, one sample a line, or the sentences of a Leipzig archive.

Bad lines are counted and left out. A file that is no text, or unpacks to far more than a text does, ends the script
with one line.
"""

from __future__ import annotations

import codecs
import io
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa

EXPECTED_TOLERANCE = 0.01  # of expected line counts: OSCAR's 974,000 is rounded
NOT_UTF8, NO_TAB, BLANK = "not UTF-8", "no tab", "blank"
OLD_MAC = "ends its lines with \\r alone, as old Macs did: convert it (tr '\\r' '\\n' < FILE > NEW)"
MAX_DAMAGED = 0.01  # a source with more lines than this that are not UTF-8 or lack the tab is the wrong file
MAX_LINE_BYTES = 1 << 24  # bounds memory when a file without line ends is given by mistake
# Compression makes a text three to ten times smaller. A file that unpacks to a thousand times its size was made to fill
# memory and disk.
MAX_UNPACKED = 100  # a file may unpack to this multiple of its size,
FREE_UNPACKED_BYTES = 1 << 30  # and every file may unpack to this size
MAX_HEADER_BYTES = 1 << 20  # of a header in an archive, because tarfile reads it into memory
BLOCK_BYTES = 1 << 20


@dataclass
class Source:
    """A text to read, and counts of its lines.

    `location` is the URL or path in the manifest, `path` the file on disk, and `url` the address to download it from if
    the file is missing.
    """

    name: str
    location: str
    path: Path
    url: str | None = None
    expected_lines: int | None = None
    lines_read: int = 0
    lines_kept: int = 0
    lines_dropped: dict[str, int] = field(default_factory=lambda: {BLANK: 0, NOT_UTF8: 0, NO_TAB: 0})
    carriage_returns: int = 0  # within lines


class Unpacked(io.RawIOBase):
    """The unpacked content of a file; exits with one line if it is far larger than that of any text."""

    def __init__(self, stream: pa.NativeFile, path: Path):
        self.stream = stream
        self.path = path
        self.left = max(FREE_UNPACKED_BYTES, MAX_UNPACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.stream.readinto(buffer)
        self.left -= count
        if self.left < 0:
            sys.exit(
                f"error: {self.path} unpacks to more than {MAX_UNPACKED} times its size, which no text does: leave it "
                "out, or unpack it yourself"
            )
        return count


class Member(tarfile.TarInfo):
    """A member of an archive. Headers with a long name or with attributes are refused if they are too large."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if not (member.isfile() or member.isdir()) and member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


def raw_lines(path: Path) -> Iterator[bytes]:
    """Lines of a text file, plain or compressed, or of the sentences file in a Leipzig archive.

    Raises:
        OSError: the compressed file is damaged or truncated (which pyarrow notices, and zstandard's reader does not).
        tarfile.TarError: the archive is damaged.
    """
    with pa.input_stream(str(path)) as compressed:  # chooses the decompression by the ending of the name
        stream = io.BufferedReader(Unpacked(compressed, path), BLOCK_BYTES)
        if path.name.endswith(".tar.gz"):
            yield from archived_lines(stream, path)
        else:
            yield from split_lines(stream, path)


def archived_lines(stream: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    """Lines of NAME/NAME-sentences.txt in the tar stream of NAME.tar.gz. Nothing is written to the disk."""
    name = path.name.removesuffix(".tar.gz")
    wanted = f"{name}/{name}-sentences.txt"
    found = False
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[0] == "" or ".." in parts or not (member.isfile() or member.isdir()):
                sys.exit(f"error: {path} has a member that no corpus has, {member.name!r}: delete the file")
            if member.name == wanted and member.isfile():
                found = True
                yield from split_lines(archive.extractfile(member), path)
    while stream.read(BLOCK_BYTES):  # up to the checksum at the end
        pass
    if not found:
        sys.exit(f"error: {path} has no member {wanted}: it is not a Leipzig corpus, or was renamed")


def split_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file without its byte order mark. Exits with one line that names `path` if a line is too long."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b"")):
        if len(line) == MAX_LINE_BYTES:
            if b"\r" in line:
                sys.exit(f"error: {path} {OLD_MAC}")
            sys.exit(f"error: {path} is not text with one sample a line: a line has {MAX_LINE_BYTES:,} bytes or more")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def text_of(line: bytes, tabbed: bool) -> tuple[str, str]:
    """(text without surrounding white space, ""), or ("", the reason why the line is dropped)."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return "", NOT_UTF8
    if "\0" in text:  # UTF-16 and binary files can be valid UTF-8, but a text contains no NUL
        return "", NOT_UTF8
    if tabbed and text.strip():
        _, tab, text = text.partition("\t")
        if not tab:
            return "", NO_TAB
    text = text.strip()
    return text, "" if text else BLANK


def samples(source: Source) -> Iterator[str]:
    """The texts of a source in order; counts the lines in `source`. Exits with one line if it cannot be read."""
    tabbed = source.path.name.endswith(".tar.gz") or "-sentences.txt" in source.path.name
    try:
        for line in raw_lines(source.path):
            text, dropped = text_of(line, tabbed)
            source.lines_read += 1
            if dropped:
                source.lines_dropped[dropped] += 1
            else:
                source.lines_kept += 1
                source.carriage_returns += text.count("\r")
                yield text
    except (OSError, tarfile.TarError) as error:
        advice = "if it is damaged, delete it and run again" if source.url else "name a text file that can be read"
        sys.exit(f"error: {source.path} cannot be read ({error}): {advice}")


def joined(texts: Iterator[str], words: int | None) -> Iterator[str]:
    """Consecutive texts of one source joined by spaces to samples of at least `words` words (None: not joined).

    The last sample of a source may be shorter. Longer samples give a masked language model more context.
    """
    if words is None:
        yield from texts
        return
    pending: list[str] = []
    count = 0
    for text in texts:
        pending.append(text)
        count += len(text.split())
        if count >= words:
            yield " ".join(pending)
            pending, count = [], 0
    if pending:
        yield " ".join(pending)


def check(source: Source, whole: bool) -> None:
    """Exit if the source was not a usable text; warn if a published source has an unexpected number of lines."""
    for reason, meaning in ((NOT_UTF8, "is not UTF-8 text"), (NO_TAB, "does not have lines of the form id<TAB>text")):
        if source.lines_dropped[reason] > MAX_DAMAGED * source.lines_read:
            count = f"{source.lines_dropped[reason]:,} of {source.lines_read:,} lines: {reason}"
            sys.exit(f"error: {source.path} {meaning} ({count}): convert it or leave it out")
    if source.carriage_returns >= source.lines_read > 0:
        sys.exit(f"error: {source.path} {OLD_MAC}")
    if not source.lines_kept:
        sys.exit(f"error: {source.path} has no usable line: leave it out")
    expected = source.expected_lines
    if whole and expected and abs(source.lines_read - expected) > EXPECTED_TOLERANCE * expected:
        line = f"warning: {source.name} has {source.lines_read:,} lines, about {expected:,} were expected"
        print(f"{line}; is {source.path} the right file?", file=sys.stderr)
