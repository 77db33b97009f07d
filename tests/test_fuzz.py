"""Generated bad input for every reader of a file or a command line: success or one line, and no other file changes.

    pytest tests/test_fuzz.py -m slow                                seeded; 20 seconds for each kind of input
    FUZZ_SEED=7 FUZZ_SECONDS=600 pytest tests/test_fuzz.py -m slow   another seed, ten minutes for each

Inputs that failed are in FOUND, which the default tests include.
"""

import gzip
import io
import json
import os
import resource
import shlex
import shutil
import tarfile
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from test_bad_input import RUN, TRAINING, listing

import analyze_kurtosis
import arguments
import build_dataset
import checkpoints
import command
import hub
import measurement
import train_model
import train_runs
import train_tokenizer

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))  # for each reader
MEMORY_BYTES = 4 << 30  # that a reader may use in addition to the memory of the tests
NAME = "epo_web_2012_1M"
NEW = ("new", "downloads", "copy", "changed.json", ".env", "text.")  # files that readers may write
SENTENCES = b"".join(b"%d\tJen la frazo numero %d.\n" % (i, i) for i in range(60))


# ----------------------------------------------------------------------------------------------------------- the oracle


def ends_well(capfd, root: Path, call) -> bool:
    """Whether `call` ends with one line instead of returning. Below `root` only the files of NEW may change."""
    before = listing(root)
    capfd.readouterr()
    refused = False
    try:
        command.run(call)
    except SystemExit as end:
        refused = end.code != 0
        printed = capfd.readouterr().err
        if isinstance(end.code, str):
            assert end.code.startswith("error: ") and "\n" not in end.code, end.code
        else:
            lines = [line for line in printed.splitlines() if line.startswith("error: ")]
            assert end.code == 0 or (end.code == 2 and len(lines) == 1), (end.code, printed)
        assert "Traceback" not in printed, printed
    assert elsewhere(listing(root)) == elsewhere(before)
    return refused


def elsewhere(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.startswith(NEW)}


@pytest.fixture(autouse=True)
def bounded_memory():
    """Limits the memory, so that a reader which allocates too much fails without stopping the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def project(sample, tmp_path_factory):
    """A small project with the output of all scripts, and a checkpoint."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(sample / "data", root / "data", ignore=shutil.ignore_patterns("tokenized-*"))
    shutil.copytree(sample / "tokenizer", root / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(train_model, "delete_checkpoints", lambda *_, **__: None)
        train_model.main([*shlex.split(TRAINING), "--max_steps", "1"])
    shutil.move(root / "models" / RUN / "checkpoint-1", root / "checkpoints" / "checkpoint-1")
    return root


@pytest.fixture
def place(project, monkeypatch):
    """The project as the working directory, without a token."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(hub, "ENV_FILE", project / ".env")
    for name in ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return project


def fuzz(place: Path, capfd, reader, strategy) -> None:
    """Call reader(value)() for generated values, for at most SECONDS, and print the number of values."""
    until = time.monotonic() + SECONDS
    refused = []

    @seed(SEED)
    @settings(
        max_examples=round(100 * SECONDS),
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value):
        if time.monotonic() < until:
            refused.append(ends_well(capfd, place, reader(value)))

    run()
    with capfd.disabled():
        print(f" {len(refused):,} inputs, {sum(refused):,} refused", end=" ", flush=True)


# ------------------------------------------------------------------------------------------------- what is generated

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 2**31, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "1", "..", "/etc", "\0", "roberta", "hf_x", "\ud800", "ĉ" * 300]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def places(value, path=()) -> list[tuple]:
    """The path of every value in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(found for key, one in inside for found in places(one, (*path, key)))]


@st.composite
def changed_json(draw, text: str) -> bytes:
    """A JSON document with one or two values removed or replaced."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(value)[1:]))
        inside = value
        try:
            for key in path:
                inside = inside[key]
            if draw(st.booleans()) and isinstance(inside, dict):
                del inside[last]
            else:
                inside[last] = draw(VALUES)
        except (LookupError, TypeError):  # the first change removed this place
            pass
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def changed_bytes(draw, data: bytes, within: int | None = None) -> bytes:
    """The content of a file with a few bytes replaced, added or removed, or with its end cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, min(within or len(changed), len(changed))))
        end = start + draw(st.sampled_from([0, 1, 1, 8, 100]))
        changed[start:end] = draw(st.binary(max_size=9) | st.sampled_from([b"\xff" * 8, b"\0", b"\r", b"[" * 9999]))
    if draw(st.integers(0, 4)) == 0:
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


def changed(path: Path):
    """Strategy: the content of a JSON file, changed."""
    data = path.read_bytes()
    return st.one_of(changed_json(data.decode()), changed_json(data.decode()), changed_bytes(data))


MEMBERS = st.sampled_from(
    [
        f"{NAME}/{NAME}-sentences.txt",
        NAME,
        "../evil",
        f"{NAME}/../../evil",
        "/tmp/evil-of-the-tests",
        "",
        "a" * 300,
        "ĉ",
    ]
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, *b"1 2 3 4 5 6 S x L g".replace(b" ", b"")])


@st.composite
def archives(draw) -> bytes:
    """Wrong corpora: tar files with wrong members, compressed or not, or twice, and changed."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    ) as tar:
        for _ in range(draw(st.integers(0, 3))):
            member = tarfile.TarInfo(draw(MEMBERS))
            kind = draw(KINDS)
            member.type = kind if isinstance(kind, bytes) else bytes([kind])
            member.linkname = draw(MEMBERS)
            content = draw(st.sampled_from([SENTENCES, b"", b"\0" * 999, SENTENCES.replace(b"\t", b" ")]))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = buffer.getvalue()
    if draw(st.booleans()):
        data = draw(changed_bytes(data, within=1600))
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2]))):
        data = gzip.compress(data, 1)
    return draw(changed_bytes(data)) if draw(st.booleans()) else data


# -------------------------------------------------------------------------------------------------------- the readers


def build(*flags: str):
    def call():
        shutil.rmtree("new", ignore_errors=True)
        build_dataset.main([*flags, "--output_dir", "new", "--validation_fraction", "0.1"])

    return call


def corpus(data: bytes):
    Path("downloads").mkdir(exist_ok=True)
    Path(f"downloads/{NAME}.tar.gz").write_bytes(data)
    return build("--sources", NAME, "--download_dir", "downloads")


def text(name: str, data: bytes):
    Path(name).write_bytes(data)
    return build("--from_files", name)


def in_a_copy(folder: Path, file: str, data: bytes) -> Path:
    """A copy of a folder in which one file has another content."""
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree(folder, "copy")
    Path("copy", file).write_bytes(data)
    return Path("copy")


def dataset_kept(data: bytes):
    copy = in_a_copy(Path("data"), "manifest.json", data)
    return lambda: build_dataset.main(["--sample", "--keep", "--validation_fraction", "0.1", "--output_dir", str(copy)])


def dataset_tokenized(data: bytes):
    copy = in_a_copy(Path("data"), "manifest.json", data)
    flags = ["--keep", "--vocab_size", "1024", "--data_dir", str(copy), "--output_dir", "tokenizer"]
    return lambda: train_tokenizer.main(flags)


def dataset_pushed(data: bytes):
    copy = in_a_copy(Path("data"), "manifest.json", data)
    return lambda: hub.read_dataset(copy)


def tokenizer(data: bytes):
    copy = in_a_copy(Path("tokenizer"), "manifest.json", data)
    return lambda: train_tokenizer.main(["--keep", "--vocab_size", "1024", "--output_dir", str(copy)])


def results_kept(data: bytes):
    Path("changed.json").write_bytes(data)
    settings = train_model.parse([*shlex.split(TRAINING), "--max_steps", "1"])
    return lambda: train_model.refuse_other_settings(Path("changed.json"), *settings)


def results_pushed(data: bytes):
    Path("changed.json").write_bytes(data)
    return lambda: hub.read_model(Path("models", RUN), Path("changed.json"))


def model(file: str, data: bytes):
    copy = in_a_copy(Path("models", RUN), file, data)

    def call():
        hub.read_model(copy, Path("results", f"{RUN}.json"))
        measurement.load(str(copy))

    return call


def checkpoint(file: str, data: bytes):
    copy = in_a_copy(Path("checkpoints/checkpoint-1"), file, data)
    checkpoints.seal(copy)  # checksums that fit, so that the file itself is read
    return lambda: checkpoints.checkpoint_to_go_on_from(str(copy), ".")


def env_file(data: bytes):
    Path(".env").write_bytes(data)

    def call():
        try:
            hub.credentials()
        except hub.HubError as error:
            raise SystemExit(f"error: {error}") from None

    return call


PARSERS = {
    "build_dataset": build_dataset.parse_arguments,
    "train_tokenizer": train_tokenizer.parse_arguments,
    "train_model": train_model.parse,
    "train_runs": train_runs.parse_arguments,
    "analyze_kurtosis": analyze_kurtosis.parse_arguments,
    "hub": hub.parse_arguments,
}
FLAGS = [f"--{name}" for flags in arguments.HELP.values() for name in flags] + [
    "--sample", "--from_files", "--sources", "--vocab_size", "--seeds", "--parallel", "--", "--text", "--help", "push",
]  # fmt: skip
WORDS = st.sampled_from(FLAGS) | st.sampled_from(["0", "1", "-1", "nan", "1e999", "9" * 30, "{", "", "x", "true", "\0"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compress"),
    [("text.txt", bytes), ("text.gz", gzip.compress), ("text.zst", zstandard.compress)],
    ids=["txt", "gz", "zst"],
)
def test_text_files(place, capfd, name, compress):
    lines = SENTENCES.replace(b"\t", b" ") * 3
    content = changed_bytes(lines) | st.binary(max_size=300)
    fuzz(place, capfd, lambda data: text(name, data), content.map(compress) | changed_bytes(compress(lines)))


@pytest.mark.slow
def test_archives(place, capfd):
    fuzz(place, capfd, corpus, archives())


@pytest.mark.slow
@pytest.mark.parametrize("reader", [dataset_kept, dataset_tokenized, dataset_pushed, tokenizer])
def test_manifests(place, capfd, reader):
    file = Path("tokenizer" if reader is tokenizer else "data", "manifest.json")
    fuzz(place, capfd, reader, changed(file))


@pytest.mark.slow
@pytest.mark.parametrize("reader", [results_kept, results_pushed])
def test_results_files(place, capfd, reader):
    fuzz(place, capfd, reader, changed(Path("results", f"{RUN}.json")))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_models(place, capfd, file):
    fuzz(place, capfd, lambda data: model(file, data), changed(Path("models", RUN, file)))


@pytest.mark.slow
@pytest.mark.parametrize("reader", [model, checkpoint], ids=["model", "checkpoint"])
def test_headers_of_safetensors(place, capfd, reader):
    data = Path("models", RUN, "model.safetensors").read_bytes()
    check = changed_bytes(data, within=600)
    fuzz(place, capfd, lambda data: reader("model.safetensors", data), check)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["progress.json", "trainer_state.json", "config.json"])
def test_checkpoints(place, capfd, file):
    source = changed(Path("checkpoints/checkpoint-1", file))
    fuzz(place, capfd, lambda data: checkpoint(file, data), source)


@pytest.mark.slow
def test_env_files(place, capfd):
    data = b'HUGGINGFACE_TOKEN="hf_x" # mine\nexport HUGGINGFACE_USER=zamenhof\n'
    fuzz(place, capfd, env_file, changed_bytes(data) | st.binary())


@pytest.mark.slow
@pytest.mark.parametrize("script", PARSERS)
def test_command_lines(place, capfd, script):
    fuzz(place, capfd, lambda argv: lambda: PARSERS[script](argv), st.lists(WORDS, max_size=6))


# ------------------------------------------------------------------------------------------------------ what was found

FOUND = {".env that is not UTF-8": (env_file, b"HUGGINGFACE_TOKEN=\x80")}


@pytest.mark.parametrize("name", FOUND)
def test_earlier_failures_stay_fixed(place, capfd, name):
    reader, *arguments = FOUND[name]
    ends_well(capfd, place, reader(*arguments))
