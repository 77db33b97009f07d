"""build_dataset.py: the texts that it keeps, their split, downloads, the output folder, and errors."""

import gzip
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zstandard
from datasets import load_from_disk

import build_dataset
import folder
import sources

SCRIPT = Path(build_dataset.__file__)
NAME = "epo_literature_2011_300K"
TEXTS = [f"Jen la frazo numero {number}, ĉu ŝi aŭdas ĝin?" for number in range(300)]
LINES = [f"{text}\n".encode() for text in TEXTS]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(build_dataset, "RETRY_SECONDS", (0, 0))


def readable(value):
    """A parameter in the name of a test."""
    return value if isinstance(value, str) else "content"


def build(*arguments, fraction="0.1"):
    arguments = [*map(str, arguments), "--validation_fraction", fraction]
    build_dataset.main(arguments)
    return manifest(arguments[arguments.index("--output_dir") + 1] if "--output_dir" in arguments else "data")


def manifest(path="data"):
    return json.loads(Path(path, "manifest.json").read_text(encoding="utf-8"))


def refused(*arguments, **options):
    """The one line with which a build ends. A failed build leaves no folder behind."""
    before = sorted(Path().glob("data*"))
    with pytest.raises(SystemExit) as end:
        build(*arguments, **options)
    assert isinstance(end.value.code, str), "an error line and exit code 1, not a bare code"
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    assert sorted(Path().glob("data*")) == before
    return end.value.code


def write(name, texts):
    Path(name).write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return name


def tabbed(texts):
    return "".join(f"{number}\t{text}\n" for number, text in enumerate(texts, 1)).encode()


def built_texts(path="data"):
    data = load_from_disk(path)
    assert data["train"].column_names == data["validation"].column_names == ["text"]
    return {name: list(split["text"]) for name, split in data.items()}


# The texts


def test_sample():
    written = build("--sample")
    lines = [line.strip() for line in build_dataset.SAMPLE.read_text(encoding="utf-8").split("\n") if line.strip()]
    splits = built_texts()
    assert sorted(splits["train"] + splits["validation"]) == sorted(lines)
    [source] = written["sources"]
    assert source["name"] == "sample" and source["lines_kept"] == len(lines)
    assert source["sha256"] == hashlib.sha256(build_dataset.SAMPLE.read_bytes()).hexdigest()
    assert source["bytes"] == build_dataset.SAMPLE.stat().st_size


def test_manifest_describes_the_dataset(monkeypatch):
    monkeypatch.setattr(build_dataset, "BATCH_LINES", 7)  # several batches, which must not change the order
    written = build("--from_files", write("text.txt", TEXTS))
    splits = built_texts()
    for name, texts in splits.items():
        content = "".join(text + "\n" for text in texts)
        assert written["splits"][name] == {
            "samples": len(texts),
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
        }
        assert texts == [text for text in TEXTS if text in set(texts)]
    assert len(splits["train"]) + len(splits["validation"]) == len(TEXTS)
    assert written["format"] == 1 and written["validation_fraction"] == 0.1 and written["max_samples"] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n".join(TEXTS).encode()),  # no line end after the last line
        ("a.txt", b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode()),  # as Windows writes it
        ("a.txt.gz", gzip.compress("\n".join(TEXTS).encode())),
        ("a.gz", gzip.compress(b"".join(LINES[:50])) + gzip.compress(b"".join(LINES[50:]))),
        ("a.zst", zstandard.compress("\n".join(TEXTS).encode())),
        ("a-sentences.txt", tabbed(TEXTS)),
        ("a-sentences.txt.gz", gzip.compress(tabbed(TEXTS))),
    ],
    ids=readable,
)
def test_file_types_give_the_same_text(name, content):
    Path(name).write_bytes(content)
    build("--from_files", name)
    splits = built_texts()
    assert sorted(splits["train"] + splits["validation"]) == sorted(TEXTS)


def test_dropped_lines_are_counted_by_reason():
    nfd = unicodedata.normalize("NFD", "ĉiuĵaŭde  du spacoj\tkaj tabulo")
    lines = [*(text.encode() for text in TEXTS), b"", b" \t ", b"\xe9\xff", f"  {nfd} \u00a0".encode()]
    Path("text.txt").write_bytes(b"\n".join(lines))
    [source] = build("--from_files", "text.txt")["sources"]
    assert source["lines_read"] == 304 and source["lines_kept"] == 301
    assert source["lines_dropped"] == {"blank": 2, "not UTF-8": 1, "no tab": 0}
    splits = built_texts()
    assert sorted(splits["train"] + splits["validation"]) == sorted([*TEXTS, nfd])

    Path("a-sentences.txt").write_bytes(tabbed(TEXTS) + b"301\t \n\nsen tabulo\n302\tkun\ttabulo\n")
    [source] = build("--from_files", "a-sentences.txt", "--overwrite")["sources"]
    assert source["lines_read"] == 304 and source["lines_kept"] == 301
    assert source["lines_dropped"] == {"blank": 2, "not UTF-8": 0, "no tab": 1}
    splits = built_texts()
    assert "kun\ttabulo" in splits["train"] + splits["validation"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "\n".join(TEXTS).encode("iso8859-3"), "not UTF-8"),
        ("a.txt", "\n".join(TEXTS).encode("utf-16"), "not UTF-8"),
        ("a-sentences.txt", "\n".join(TEXTS).encode(), "no tab"),
        ("a.txt", b"", "no usable line"),
        ("a.txt.gz", gzip.compress(b""), "no usable line"),
        ("a.txt", b"\n \n", "no usable line"),
        ("a.gz", b"Saluton\n", "cannot be read"),
        ("a.gz", gzip.compress("\n".join(TEXTS).encode())[:-20], "cannot be read"),
        ("a.zst", zstandard.compress("\n".join(TEXTS).encode())[:-20], "cannot be read"),
        ("a.zst", b"Saluton\n", "cannot be read"),
        ("a.txt", b"x" * (1 << 24), "one sample a line"),
        ("a.pdf", b"%PDF", "must end in"),
    ],
    ids=readable,
)
def test_wrong_files(name, content, complaint):
    Path(name).write_bytes(content)
    line = refused("--from_files", name)
    assert name in line and complaint in line


def test_patterns():
    Path("deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "[x].txt"):
        write(name, [f"{name} {text}" for text in TEXTS[:30]])
    names = [
        source["location"] for source in build("--from_files", "[x].txt", "?.txt", "**/*.txt", "./a.txt")["sources"]
    ]
    assert names == ["[x].txt", "a.txt", "b.txt", "deep/c.txt"]
    assert "nenio*.txt matches no file" in refused("--from_files", "a.txt", "nenio*.txt", "--overwrite")
    assert "matches no file" in refused("--from_files", "deep", "--overwrite")


# The split


def test_no_sample_ever_changes_its_split():
    # These must never change, or held-out losses could no longer be compared with earlier ones.
    held_out = [number for number in range(1000) if build_dataset.is_validation(f"frazo {number}".encode(), 0.01)]
    assert held_out == [78, 167, 250, 253, 538, 568, 855, 887, 928]
    assert all(build_dataset.is_validation(f"frazo {number}".encode(), 0.1) for number in held_out)


def test_an_added_source_moves_no_sample_and_duplicates_share_a_split():
    write("a.txt", TEXTS)
    write("b.txt", [*TEXTS[100:200], *TEXTS[100:200], *(text + " Jes." for text in TEXTS)])
    build("--from_files", "a.txt", "--output_dir", "small")
    build("--from_files", "a.txt", "b.txt")
    small, large = built_texts("small"), built_texts()
    for name in small:
        assert set(small[name]) == set(TEXTS) & set(large[name])
    assert not set(large["train"]) & set(large["validation"])
    assert sum(map(len, large.values())) == 300 + 100 + 100 + 300, "duplicates are kept"
    assert 20 < len(large["validation"]) < 140


def test_max_samples_keeps_the_first_samples():
    write("a.txt", ["", *TEXTS[:100]])
    write("b.txt", TEXTS[100:])
    write("c.txt", TEXTS)
    written = build("--from_files", "a.txt", "b.txt", "c.txt", "--max_samples", "120")
    splits = built_texts()
    assert sorted(splits["train"] + splits["validation"]) == sorted(TEXTS[:120])
    assert [(s["name"], s["lines_read"], s["lines_kept"]) for s in written["sources"]] == [
        ("a.txt", 101, 100),
        ("b.txt", 20, 20),
    ]
    assert written["max_samples"] == 120


def test_join_words_joins_lines_within_a_source():
    write("a.txt", ["one two", "", "three", "four five six seven", "eight"])
    write("b.txt", ["nine", "ten eleven"])
    written = build("--from_files", "a.txt", "b.txt", "--join_words", "3", fraction="0.5")
    splits = built_texts()
    joined = ["one two three", "four five six seven", "eight", "nine ten eleven"]
    assert sorted(splits["train"] + splits["validation"]) == sorted(joined)
    assert written["join_words"] == 3
    assert [source["lines_kept"] for source in written["sources"]] == [4, 2]


@pytest.mark.parametrize(("fraction", "split"), [("1e-9", "validation"), ("0.999999999", "train")])
def test_empty_split(fraction, split):
    write("a.txt", TEXTS)
    line = refused("--from_files", "a.txt", fraction=fraction)
    assert split in line and "--validation_fraction" in line


# Downloads


class Server:
    """A server on loopback; its attributes determine its behaviour."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range header
        self.statuses: list[int] = []  # of the next answers, one for each request
        self.cut_at: int | None = None  # the next answer ends after this number of bytes
        self.ranges = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler):
        asked = handler.headers["Range"]
        self.requests.append((handler.path, asked))
        if self.statuses:
            return handler.send_error(self.statuses.pop(0))
        if handler.path not in self.files:
            return handler.send_error(404)
        content = self.files[handler.path]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end, self.cut_at = self.cut_at or len(content), None
        handler.wfile.write(content[start:end])

    def flags(self, *names):
        return ["--sources", *names, "--oscar_url", f"{self.url}/oscar.txt", "--leipzig_url", f"{self.url}/{{name}}"]


@pytest.fixture
def server():
    server = Server()
    server.files["/oscar.txt"] = b"".join(LINES)
    yield server
    server.http.shutdown()
    server.http.server_close()


def archive(*members):
    """A .tar.gz of members: (name, content), or TarInfo objects without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special_member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


SENTENCES = (f"{NAME}/{NAME}-sentences.txt", tabbed(TEXTS[:150]))


def test_download(server, capsys):
    server.files[f"/{NAME}"] = archive(
        special_member(NAME, tarfile.DIRTYPE), (f"{NAME}/{NAME}-words.txt", b"1\tla\t9\n" * 99), SENTENCES
    )
    written = build(*server.flags("oscar", NAME, "oscar"))
    oscar, leipzig = written["sources"]
    assert (oscar["name"], oscar["lines_kept"]) == ("oscar", 300)
    assert (leipzig["name"], leipzig["lines_kept"]) == (NAME, 150)
    assert (oscar["location"], leipzig["location"]) == (f"{server.url}/oscar.txt", f"{server.url}/{NAME}")
    assert leipzig["sha256"] == hashlib.sha256(server.files[f"/{NAME}"]).hexdigest()
    splits = built_texts()
    assert sorted(splits["train"] + splits["validation"]) == sorted(TEXTS + TEXTS[:150])
    assert server.requests == [("/oscar.txt", None), (f"/{NAME}", None)]
    assert sorted(path.name for path in Path("downloads").iterdir()) == [f"{NAME}.tar.gz", "oscar.eo.txt"]
    output = capsys.readouterr()
    assert "oscar has 300 lines, about 974,000 were expected" in output.err
    assert f"{NAME}         150         150  0" in output.out

    build(*server.flags("oscar", NAME), "--overwrite")
    assert len(server.requests) == 2, "an existing file is not downloaded again"


def test_no_warning_for_the_expected_number(server, capsys, monkeypatch):
    monkeypatch.setitem(build_dataset.EXPECTED_LINES, "oscar", 301)
    build(*server.flags("oscar"))
    assert "warning" not in capsys.readouterr().err


def test_only_what_max_samples_needs_is_downloaded(server, capsys):
    build(*server.flags("oscar", NAME), "--max_samples", 100)
    assert server.requests == [("/oscar.txt", None)]
    assert "warning" not in capsys.readouterr().err


def downloaded():
    assert not list(Path("downloads").glob("*.partial"))
    return Path("downloads/oscar.eo.txt").read_bytes()


def test_broken_connection_resumes(server):
    server.cut_at = 1000
    build(*server.flags("oscar"))
    assert server.requests == [("/oscar.txt", None), ("/oscar.txt", "bytes=1000-")]
    assert downloaded() == server.files["/oscar.txt"]


def test_second_run_resumes(server, monkeypatch):
    monkeypatch.setattr(build_dataset, "RETRY_SECONDS", ())
    server.cut_at = 1000
    line = refused(*server.flags("oscar"))
    assert f"{server.url}/oscar.txt" in line and "1,000 of" in line and "try again" in line
    assert not Path("downloads/oscar.eo.txt").exists()
    build(*server.flags("oscar"))
    assert server.requests[1:] == [("/oscar.txt", "bytes=1000-")]
    assert downloaded() == server.files["/oscar.txt"]


def test_server_without_ranges_starts_again(server):
    server.ranges, server.cut_at = False, 1000
    build(*server.flags("oscar"))
    assert server.requests[1] == ("/oscar.txt", "bytes=1000-")
    assert downloaded() == server.files["/oscar.txt"]


@pytest.mark.parametrize(("surplus", "requests"), [(0, 1), (5, 2)])
def test_partial_file_that_is_complete_or_too_long(server, surplus, requests):
    """A complete file is used; a file that is too long belongs to another version, and is replaced."""
    Path("downloads").mkdir()
    Path("downloads/oscar.eo.txt.partial").write_bytes(server.files["/oscar.txt"] + b"x" * surplus)
    build(*server.flags("oscar"))
    assert len(server.requests) == requests
    assert downloaded() == server.files["/oscar.txt"]


def test_not_found_is_asked_once(server):
    line = refused(*server.flags(NAME))
    assert f"{server.url}/{NAME}" in line and "404" in line and "--from_files" in line
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [503, 429])
def test_busy_server_is_asked_again(server, status):
    server.statuses = [status, status]
    build(*server.flags("oscar"))
    assert len(server.requests) == 3
    server.statuses = [status] * 9
    Path("downloads/oscar.eo.txt").unlink()
    assert str(status) in refused(*server.flags("oscar"), "--overwrite")
    assert len(server.requests) == 6


def test_no_server(server):
    server.http.server_close()
    server.http.shutdown()
    line = refused(*server.flags("oscar"))
    assert f"{server.url}/oscar.txt" in line and "refused" in line.lower()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (archive(SENTENCES)[:-200], "delete it"),
        (archive(SENTENCES)[:-9] + b"x" + archive(SENTENCES)[-8:], "delete it"),  # a wrong byte before the checksum
        (archive(SENTENCES)[:-8] + bytes(8), "delete it"),  # a wrong checksum
        (b"<html>Not here</html>", "delete it"),
        (gzip.compress(b"not a tar archive" * 99), "delete it"),
        (archive((f"{NAME}/{NAME}-words.txt", b"1\tla\n")), "no member"),
        (archive((f"{NAME}-sentences.txt", tabbed(TEXTS))), "no member"),
        (archive(("../evil.txt", b"x"), SENTENCES), "../evil.txt"),
        (archive(SENTENCES, (f"{NAME}/../../evil.txt", b"x")), "evil.txt"),
        (archive(("/tmp/evil.txt", b"x"), SENTENCES), "/tmp/evil.txt"),
        (archive(special_member(SENTENCES[0], tarfile.SYMTYPE, "/etc/passwd")), "-sentences.txt"),
        (archive(special_member("link", tarfile.LNKTYPE, "../../x"), SENTENCES), "'link'"),
        (archive(special_member("pipe", tarfile.FIFOTYPE), SENTENCES), "'pipe'"),
    ],
    ids=readable,
)
def test_bad_archives(server, content, complaint):
    server.files[f"/{NAME}"] = content
    line = refused(*server.flags(NAME))
    assert complaint in line and f"downloads/{NAME}.tar.gz" in line
    assert [path.name for path in Path("downloads").iterdir()] == [f"{NAME}.tar.gz"]
    assert [path.name for path in Path().iterdir()] == ["downloads"]


# The output folder


def test_existing_folder_is_safe(monkeypatch):
    write("a.txt", TEXTS)
    first = build("--from_files", "a.txt")
    assert "--overwrite" in refused("--sample")
    assert manifest() == first

    # A build that fails while it replaces a dataset leaves that dataset unchanged.
    Path("bad.txt").write_bytes(b"")
    refused("--from_files", "a.txt", "bad.txt", "--overwrite")
    assert manifest() == first and len(built_texts()["train"]) == first["splits"]["train"]["samples"]

    def interrupt(source):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_dataset, "description", interrupt)
        build("--sample", "--overwrite")
    assert manifest() == first and sorted(Path().glob("data*")) == [Path("data")]

    rename = Path.rename

    def rename_fails(path, target):
        if path.name == "new":
            raise OSError("the disk is gone")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(Path, "rename", rename_fails)
        build("--sample", "--overwrite")
    assert manifest() == first and sorted(Path().glob("data*")) == [Path("data")]

    Path("data/tokenized-1-2-512").mkdir()  # train_model.py's
    assert build("--sample", "--overwrite")["sources"][0]["name"] == "sample"
    assert not Path("data/tokenized-1-2-512").exists()


def test_foreign_folder_is_never_replaced():
    Path("empty").mkdir()
    build("--sample", "--output_dir", "empty")
    Path("thesis").mkdir()
    write("thesis/chapter.txt", TEXTS)
    assert "thesis" in refused("--sample", "--output_dir", "thesis", "--overwrite")
    write("empty/notes.txt", TEXTS)
    assert "notes.txt" in refused("--sample", "--output_dir", "empty", "--overwrite")
    assert "is a file" in refused("--sample", "--output_dir", "thesis/chapter.txt", "--overwrite")
    assert Path("thesis/chapter.txt").exists() and Path("empty/notes.txt").exists()


def test_a_link_to_another_disk_remains_a_link():
    Path("disk").mkdir()
    Path("data").symlink_to("disk")
    build("--sample")
    assert Path("data").is_symlink() and Path("disk/manifest.json").exists()


def test_leftovers_of_a_killed_build_are_deleted(capsys):
    write("a.txt", TEXTS)
    Path("data.partial-x/new").mkdir(parents=True)
    write("data.partial-x/new/half.arrow", TEXTS)
    first = build("--from_files", "a.txt")
    assert sorted(path.name for path in Path().iterdir()) == ["a.txt", "data"]

    # If a build was killed between the two renames that replace a dataset, the earlier dataset is restored.
    Path("data.partial-y/new").mkdir(parents=True)
    Path("data").rename("data.partial-y/old")
    with pytest.raises(SystemExit, match=r"^error: data exists and is complete"):
        build("--sample")
    assert manifest() == first and sorted(Path().glob("data*")) == [Path("data")]


def test_two_builds_at_the_same_time_exclude_each_other(server):
    with folder.locked("data/"):  # the same lock as without the slash
        assert f"process {os.getpid()} is at work on" in refused("--sample")
    got = []
    with folder.locked("downloads/oscar.eo.txt"):
        other = threading.Thread(target=lambda: got.append(build(*server.flags("oscar"))))
        other.start()
        other.join(1)
        assert not server.requests  # it waits for the process that downloads the same file
        Path("downloads/oscar.eo.txt").write_bytes(b"".join(LINES))
    other.join(60)
    assert not server.requests and got[0]["sources"][0]["lines_read"] == len(LINES)


# Flags and the command line


def test_few_validation_samples_are_noted(capsys):
    build("--sample", fraction="0.001")
    assert "note: a held-out loss of 1 validation samples is uncertain" in capsys.readouterr().out
    write("a.txt", [f"{i}" for i in range(2_000)])
    build("--from_files", "a.txt", "--overwrite")
    assert "note: " not in capsys.readouterr().out


def test_command_line():
    """An error, for example a full disk, is one line on stderr and exit code 1; otherwise the figures are printed."""

    def run(*flags, **options):
        command = [sys.executable, str(SCRIPT), *flags, "--validation_fraction", "0.1"]
        return subprocess.run(command, capture_output=True, text=True, **options)

    result = run("--from_files", "nenio.txt")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")

    write("a.txt", TEXTS * 20)
    result = run("--from_files", "a.txt", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert [path.name for path in Path().iterdir()] == ["a.txt"]

    result = run("--from_files", "a.txt")
    assert result.returncode == 0
    assert manifest()["argv"] == [SCRIPT.name, "--from_files", "a.txt", "--validation_fraction", "0.1"]
    assert "6,000" in result.stdout and "training samples" in result.stdout


def test_keep_accepts_only_a_dataset_with_the_same_flags(capsys):
    Path("a.txt").write_bytes(b"".join(LINES))
    Path("b.txt").write_bytes(b"".join(LINES))
    build("--from_files", "a.txt", "--keep")  # there is no dataset yet
    before = Path("data/manifest.json").stat().st_mtime_ns
    build("--from_files", "a.txt", "--keep")
    assert Path("data/manifest.json").stat().st_mtime_ns == before and "data: found and kept" in capsys.readouterr().out
    assert "sources = a.txt, not b.txt: move it away" in refused("--from_files", "b.txt", "--keep")
    assert "sources = a.txt, not sample" in refused("--sample", "--keep")
    assert "validation_fraction = 0.1, not 0.2" in refused("--from_files", "a.txt", "--keep", fraction="0.2")
    assert "join_words = None, not 9" in refused("--from_files", "a.txt", "--keep", "--join_words", "9")
    for damaged in ("{", "[]", '{"sources": 3}'):
        Path("data/manifest.json").write_text(damaged)
        assert "data/manifest.json is damaged" in refused("--from_files", "a.txt", "--keep")


def bomb(kind: str) -> tuple[str, bytes]:
    """(name, content) of a file of about 40 kB that unpacks to 40 MB, or announces a header of 7 GB."""
    lines = b"La suno brilas. " * 50 + b"\n"
    block = lines * (1_000_000 // len(lines))
    if kind == "gz":
        return "text.gz", gzip.compress(block) * 40
    if kind == "zst":
        return "text.zst", zstandard.compress(block) * 40
    name = "epo_web_2012_1M"
    members = {"sentences": (f"{name}/{name}-sentences.txt", b"1\tLa suno.\n2\tLa luno.\n", tarfile.REGTYPE)}
    if kind == "another member":
        members = {"other": (f"{name}/{name}-words.txt", bytes(40_000_000), tarfile.REGTYPE)} | members
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if kind == "header":
            header = tarfile.TarInfo("x")
            header.type, header.size = tarfile.XHDTYPE, 7 << 30
            buffer.write(header.tobuf())
        for path, content, what in members.values():
            member = tarfile.TarInfo(path)
            member.size, member.type = len(content), what
            tar.addfile(member, io.BytesIO(content))
    return f"{name}.tar.gz", gzip.compress(buffer.getvalue())


@pytest.mark.parametrize("kind", ["gz", "zst", "another member", "header"])
def test_a_file_that_unpacks_to_far_more_than_a_text_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "FREE_UNPACKED_BYTES", 1_000_000)
    name, content = bomb(kind)
    Path(name).write_bytes(content)
    flags = ["--sources", "epo_web_2012_1M", "--download_dir", "."] if ".tar" in name else ["--from_files", name]
    said = "a header of 7,516,192,768 bytes" if kind == "header" else "unpacks to more than 100 times its size"
    with pytest.raises(SystemExit, match=rf"^error: {name} .*{said}"):
        build_dataset.main([*flags, "--validation_fraction", "0.1"])
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [name]
