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
import glob
import hashlib
import http.client
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import command

if __name__ == "__main__":
    command.begin()

from datasets import Dataset, DatasetDict, Features, Value
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

import folder
import hub
import record
from sources import BLOCK_BYTES, Source, check, joined, samples

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

FILE_TYPES = (".txt", ".gz", ".zst")
FEW = 100  # with fewer validation samples, the held-out loss is too uncertain

USER_AGENT = "EsperBERTo build_dataset.py"
TIMEOUT_SECONDS = 60
RETRY_SECONDS = (1, 2, 4, 8, 16)  # pauses between attempts to reach a server
# Not every OSError: a second request does not help against a full disk.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
BATCH_LINES = 10_000  # texts of each split that are in memory

FEATURES = Features({"text": Value("string")})
# The files in a complete data/. train_model.py adds the tokenized copies.
OURS = ("manifest.json", "dataset_dict.json", "train", "validation", "tokenized-*")


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
