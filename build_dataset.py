"""Build the dataset: Esperanto text, one line a sample, split into train and validation.

    python build_dataset.py                              the published sources: OSCAR and five Leipzig corpora
    python build_dataset.py --sources oscar              some of them
    python build_dataset.py --from_files 'texts/*.gz'    your own text
    python build_dataset.py --join_words 150             consecutive lines joined to samples of 150 words or more
    python build_dataset.py --sample                     the small corpus that comes with the project
    python build_dataset.py --push_to_hub                and push it to <HUGGINGFACE_USER>/esperanto (hub.py)

Reads the sources; downloads are kept in downloads/. Writes data/, a `datasets.DatasetDict` with one column, `text`,
and data/manifest.json, which describes every source. Duplicates are kept, as in the published run.
"""

from __future__ import annotations

import argparse
import codecs
import glob
import hashlib
import http.client
import io
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import command

if __name__ == "__main__":
    command.begin()

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

import folder
import hub
import record

SAMPLE = Path(__file__).parent / "sample" / "esperanto.txt"
OSCAR_URL = "https://cdn-datasets.huggingface.co/EsperBERTo/data/oscar.eo.txt"
LEIPZIG_URL = "https://downloads.wortschatz-leipzig.de/corpora/{name}.tar.gz"
# The published sources in the order of the published dataset, with the approximate number of lines in each.
EXPECTED_LINES = {
    "oscar": 974_000,
    "epo_literature_2011_300K": 300_000,
    "epo_mixed_2012_1M": 1_000_000,
    "epo_newscrawl_2017_1M": 1_000_000,
    "epo_web_2012_1M": 1_000_000,
    "epo_wikipedia_2021_300K": 300_000,
}
EXPECTED_TOLERANCE = 0.01  # because the 974,000 is rounded

FILE_TYPES = (".txt", ".gz", ".zst")
NOT_UTF8, NO_TAB, BLANK = "not UTF-8", "no tab", "blank"
OLD_MAC = "ends its lines with \\r alone, as old Macs did: convert it (tr '\\r' '\\n' < FILE > NEW)"
FEW = 100  # with fewer validation samples, the held-out loss is too uncertain
MAX_DAMAGED = 0.01  # a source with more lines than this that are not UTF-8 or lack the tab is the wrong file
MAX_LINE_BYTES = 1 << 24  # bounds memory when a file without line ends is given by mistake
# Compression makes a text three to ten times smaller. A file that unpacks to a thousand times its size was made to fill
# memory and disk.
MAX_UNPACKED = 100  # a file may unpack to this multiple of its size,
FREE_UNPACKED_BYTES = 1 << 30  # and every file may unpack to this size
MAX_HEADER_BYTES = 1 << 20  # of a header in an archive, because tarfile reads it into memory

USER_AGENT = "EsperBERTo build_dataset.py"
TIMEOUT_SECONDS = 60
RETRY_SECONDS = (1, 2, 4, 8, 16)  # pauses between attempts to reach a server
# Not every OSError: a second request does not help against a full disk.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
BLOCK_BYTES = 1 << 20
BATCH_LINES = 10_000  # texts of each split that are in memory

FEATURES = Features({"text": Value("string")})
# The files in a complete data/. train_model.py adds the tokenized copies.
OURS = ("manifest.json", "dataset_dict.json", "train", "validation", "tokenized-*")


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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--sources", nargs="+", metavar="NAME", choices=list(EXPECTED_LINES), help="published sources")
    inputs.add_argument("--from_files", nargs="+", metavar="PATTERN", help="your own .txt, .gz, .zst, -sentences.txt")
    inputs.add_argument("--sample", action="store_true", help="the small corpus that comes with the project")
    parser.add_argument("--max_samples", type=command.positive, metavar="N", help="keep only the first N samples")
    join = "join consecutive lines of a source to samples of N words or more"
    parser.add_argument("--join_words", type=command.positive, metavar="N", help=join)
    parser.add_argument("--validation_fraction", type=float, default=0.001, help="share held out (%(default)s)")
    parser.add_argument("--output_dir", default="data", help="dataset to write (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset that is there")
    parser.add_argument("--keep", action="store_true", help="keep a dataset that was made with the same flags")
    parser.add_argument("--download_dir", default="downloads", help="where downloads are kept (%(default)s)")
    parser.add_argument("--oscar_url", default=OSCAR_URL, metavar="URL", help="a mirror of OSCAR's file")
    parser.add_argument("--leipzig_url", default=LEIPZIG_URL, metavar="URL", help="a mirror, with {name} in it")
    parser.add_argument("--push_to_hub", action="store_true", help="push the finished dataset to the Hub (see hub.py)")
    parser.add_argument("--hub_private_repo", action="store_true", help="into a private repository")
    args = parser.parse_args(argv)
    if not 0 < args.validation_fraction < 1:
        parser.error("--validation_fraction must lie between 0 and 1")
    for flag, url in (("--oscar_url", args.oscar_url), ("--leipzig_url", args.leipzig_url)):
        if not url.startswith(("http://", "https://")):
            parser.error(f"{flag} must start with http:// or https://, not {url!r}")
    if "{name}" not in args.leipzig_url:
        parser.error("--leipzig_url must contain {name}, which stands for the name of a corpus")
    return args


def published_sources(names: list[str], args: argparse.Namespace) -> list[Source]:
    """The published sources with these names, each once, whether downloaded or not."""
    sources = []
    for name in dict.fromkeys(names):
        url = args.oscar_url if name == "oscar" else args.leipzig_url.replace("{name}", name)
        path = Path(args.download_dir) / ("oscar.eo.txt" if name == "oscar" else f"{name}.tar.gz")
        sources.append(Source(name, url, path, url, EXPECTED_LINES[name]))
    return sources


def file_sources(patterns: list[str]) -> list[Source]:
    """One source for every file that matches a pattern; a file that matches several patterns is read once."""
    paths = {}
    for pattern in patterns:
        # The name of a file may contain [brackets], which glob would interpret.
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        matches = [path for path in matches if Path(path).is_file()]
        if not matches:
            sys.exit(f"error: --from_files {pattern} matches no file")
        for path in matches:
            if not path.endswith(FILE_TYPES):
                sys.exit(f"error: --from_files cannot read {path}: its name must end in {', '.join(FILE_TYPES)}")
            paths.setdefault(Path(path).resolve(), path)
    return [Source(Path(path).name, path, Path(path)) for path in paths.values()]


def download(url: str, path: Path) -> None:
    """Download to path.partial, continuing an earlier attempt, and rename the file when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with folder.locked(path):
        if path.exists():  # another build downloaded it while this one waited
            return
        for pause in (*RETRY_SECONDS, None):
            try:
                download_rest(url, partial)
                break
            except NETWORK_ERRORS as error:
                reason = getattr(error, "reason", None) or error
                if isinstance(error, urllib.error.HTTPError):
                    reason = f"HTTP {error.code} {error.reason}"
                    if error.code != 429 and error.code < 500:
                        pause = None
                if pause is None:
                    advice = "try again (it resumes), choose other --sources, or give your own text with --from_files"
                    sys.exit(f"error: cannot download {url} ({reason}): {advice}")
                tqdm.write(f"{url}: {reason}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)
        partial.rename(path)


def download_rest(url: str, partial: Path) -> None:
    """Append the missing part to `partial` with one request. Raises URLError, HTTPException or ConnectionError."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers["Content-Range"] == f"bytes */{have}":  # nothing is missing
            return
        partial.unlink()  # it is longer than the file on the server, so it belongs to another version
        raise ConnectionError("the server's file has changed") from error
    with response:
        if response.status != 206:  # the server ignores Range and sends the whole file
            have = 0
        elif not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            raise ConnectionError("the server sent another part than the requested one")
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        bar = tqdm(desc=partial.stem, total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024)
        with open(partial, "ab" if have else "wb") as file, bar:
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                bar.update(len(block))
    received = partial.stat().st_size
    if total is not None and received != total:
        raise ConnectionError(f"the connection broke after {received:,} of {total:,} bytes")


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
        sys.exit(f"error: {source.path} cannot be read ({error}): if it is damaged, delete it and run again")


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


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a sample is held out. This depends only on its text, so an added source moves no other sample, and
    duplicates are in the same split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < fraction * 2**64


class Split:
    """Writes the texts of a split to a file, in batches of BATCH_LINES, and counts and hashes them."""

    def __init__(self, path: Path):
        self.path = path
        self.writer = ArrowWriter(features=FEATURES, path=str(path))
        self.digest = hashlib.sha256()
        self.samples = 0
        self.batch: list[str] = []

    def add(self, text: str, data: bytes) -> None:
        """Add a text, which is `data` in UTF-8."""
        self.samples += 1
        self.digest.update(data + b"\n")
        self.batch.append(text)
        if len(self.batch) == BATCH_LINES:
            self.flush()

    def flush(self) -> None:
        if self.batch:
            self.writer.write_batch({"text": self.batch})
            self.batch = []

    def dataset(self) -> Dataset:
        """The complete split, memory-mapped."""
        self.flush()
        self.writer.finalize()
        return Dataset.from_file(str(self.path))


def write_splits(sources: list[Source], args: argparse.Namespace, output: Path) -> tuple[list[dict], dict]:
    """Read the sources and write the dataset to `output`; returns "sources" and "splits" of the manifest."""
    described = []
    total = 0
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        splits = {name: Split(Path(scratch) / f"{name}.arrow") for name in ("train", "validation")}
        for source in sources:
            if total == args.max_samples:
                break
            if source.url and not source.path.exists():
                download(source.url, source.path)
            texts = joined(samples(source), args.join_words)
            total_lines = source.expected_lines if args.join_words is None else None
            for text in tqdm(texts, desc=source.name, unit=" samples", total=total_lines):
                data = text.encode("utf-8")
                name = "validation" if is_validation(data, args.validation_fraction) else "train"
                splits[name].add(text, data)
                total += 1
                if total == args.max_samples:
                    break
            check(source, whole=total != args.max_samples)
            described.append(description(source))
        datasets = {name: split.dataset() for name, split in splits.items() if split.samples}
        for name in splits:
            if name not in datasets:
                [other] = datasets.values()
                if (different := len(other.unique("text"))) == 1:
                    sys.exit(f"error: all {total:,} samples are the same text, which belongs to one split: give more")
                sys.exit(
                    f"error: no sample of {total:,} ({different:,} different texts) falls into the {name} split with "
                    f"--validation_fraction {args.validation_fraction}: choose another fraction or give more text"
                )
        DatasetDict(datasets).save_to_disk(output)
    figures = {name: {"samples": split.samples, "sha256": split.digest.hexdigest()} for name, split in splits.items()}
    return described, figures


def description(source: Source) -> dict:
    return {
        "name": source.name,
        "location": source.location,
        "bytes": source.path.stat().st_size,
        "sha256": record.sha256(source.path),
        "lines_read": source.lines_read,
        "lines_kept": source.lines_kept,
        "lines_dropped": source.lines_dropped,
    }


def print_table(sources: list[dict], splits: dict, output_dir: str) -> None:
    width = max(len(source["name"]) for source in sources)
    print(f"{'source':{width}}  {'lines read':>10}  {'kept':>10}  dropped")
    for source in sources:
        reasons = [f"{count:,} {reason}" for reason, count in source["lines_dropped"].items() if count]
        kept, read = source["lines_kept"], source["lines_read"]
        print(f"{source['name']:{width}}  {read:>10,}  {kept:>10,}  {', '.join(reasons) or 0}")
    train, validation = splits["train"]["samples"], splits["validation"]["samples"]
    print(f"{output_dir}: {train:,} training samples, {validation:,} validation samples")
    if validation < FEW:
        print(
            f"note: a held-out loss of {validation:,} validation samples is uncertain: a larger --validation_fraction "
            "holds more samples out"
        )


def settings_of(manifest: dict) -> dict:
    """The settings that determined an earlier dataset, from its manifest."""
    return {**manifest, "sources": ", ".join(source["name"] for source in manifest["sources"])}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.sample:
        sources = [Source("sample", f"{SAMPLE.parent.name}/{SAMPLE.name}", SAMPLE)]
    elif args.from_files:
        sources = file_sources(args.from_files)
    else:
        sources = published_sources(args.sources or list(EXPECTED_LINES), args)

    settings = {
        "validation_fraction": args.validation_fraction,
        "join_words": args.join_words,
        "max_samples": args.max_samples,
    }
    names = ", ".join(source.name for source in sources)
    if args.keep and folder.kept(args.output_dir, {"sources": names, **settings}, settings_of):
        return
    if args.push_to_hub:
        hub.check()  # before hours of downloading
    if any(source.url and not source.path.exists() for source in sources):
        folder.refuse_unwritable(args.download_dir)
    with folder.replacing(args.output_dir, OURS, args.overwrite) as output:
        described, splits = write_splits(sources, args, output)
        manifest = {
            "format": 1,
            "argv": record.command_line(),
            "sources": described,
            **settings,
            "splits": splits,
        }
        record.write_json(output / "manifest.json", manifest)
    print_table(described, splits, args.output_dir)
    if args.push_to_hub:
        hub.push(args.output_dir, private=args.hub_private_repo)


if __name__ == "__main__":
    command.run(main)
