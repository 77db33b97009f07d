"""train_tokenizer.py: its entries, the files for transformers, exact decoding, repeatability, and errors."""

import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, RobertaTokenizer, RobertaTokenizerFast

import build_dataset
import record
import train_tokenizer

SCRIPT = Path(train_tokenizer.__file__)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "data"
    build_dataset.main(["--sample", "--validation_fraction", "0.1", "--output_dir", str(path)])
    return path


@pytest.fixture(scope="module")
def trained(data):
    path = data.parent / "tokenizer"
    train_tokenizer.main(["--data_dir", str(data), "--output_dir", str(path), "--vocab_size", "600"])
    return path


@pytest.fixture(params=[RobertaTokenizerFast, AutoTokenizer])
def tokenizer(request, trained):
    return request.param.from_pretrained(trained)


def dataset(path, train, validation=("Saluton, mondo!",)):
    """A dataset of these texts, in the form of build_dataset.py; returns its path."""
    splits = {
        name: Dataset.from_dict({"text": list(texts)}) for name, texts in (("train", train), ("validation", validation))
    }
    DatasetDict(splits).save_to_disk(path)
    (path / "manifest.json").write_text(json.dumps({"splits": {"train": {"sha256": "of the text"}}}))
    return str(path)


def split_texts(data, name):
    return list(load_from_disk(data)[name]["text"])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        train_tokenizer.main([str(argument) for argument in arguments])
    if end.value.code == 2:
        return capsys.readouterr().err.splitlines()[-1]
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_special_tokens(tokenizer):
    assert isinstance(tokenizer, RobertaTokenizer)
    assert tokenizer.convert_ids_to_tokens(range(5)) == SPECIAL
    assert (tokenizer.bos_token, tokenizer.cls_token) == ("<s>", "<s>")
    assert (tokenizer.eos_token, tokenizer.sep_token) == ("</s>", "</s>")
    assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.mask_token) == ("<pad>", "<unk>", "<mask>")
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (1, 4)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    assert tokenizer.model_max_length == 512
    assert len(tokenizer) == tokenizer.vocab_size == 600


def test_templates(tokenizer):
    a, b = (
        tokenizer("La kato", add_special_tokens=False).input_ids,
        tokenizer(" kaj", add_special_tokens=False).input_ids,
    )
    assert tokenizer("La kato").input_ids == [0, *a, 2]
    assert tokenizer("La kato", " kaj").input_ids == [0, *a, 2, 2, *b, 2]
    padded = tokenizer(["La kato", ""], padding=True)
    assert padded.input_ids[1] == [0, 2] + [1] * len(a)
    assert len(tokenizer("la " * 2000, truncation=True).input_ids) == 512


def test_mask_includes_the_space_before_it(tokenizer):
    ids = tokenizer("La <mask> kuras", add_special_tokens=False).input_ids
    words = [tokenizer(text, add_special_tokens=False).input_ids for text in ("La", " kuras")]
    assert ids == [*words[0], 4, *words[1]]


def test_offsets_exclude_the_space_before_a_word(tokenizer):
    """As in RoBERTa, the offsets of a token cover the word, without the space before it."""
    text = "La kato, kaj ŝi"
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert not any(piece.startswith(" ") for piece in pieces) and pieces[0].startswith("L")
    assert tokenizer.tokenize("kaj")[0][0] == "k", "no space is added before a text"


HARD = [
    *train_tokenizer.HARD_TEXTS,
    *(chr(code) for code in range(0x250)),
    "a  b , c ' d n't . !",
    "\r\n\r",
    "ĉ" * 3000,
]


@pytest.mark.parametrize("skip", [True, False])
def test_decoding_restores_every_text(tokenizer, data, skip):
    for text in [*HARD, *split_texts(data, "validation")]:
        ids = tokenizer(text, add_special_tokens=skip).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text
        assert 3 not in ids, "every byte has an entry, so no token is unknown"


def test_entries_are_the_greedy_merges(data, trained):
    """Special tokens, 256 bytes, then merges. Each merge is a most frequent pair after the earlier merges."""
    saved = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    entries = sorted(saved["vocab"], key=saved["vocab"].get)
    assert entries[:5] == SPECIAL and sorted(entries[5:261]) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert entries[261:] == ["".join(merge) for merge in saved["merges"]]

    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    counts = Counter(word for text in split_texts(data, "train") for word, _ in split(text))
    words = {word: list(word) for word in counts}
    for left, right in saved["merges"][:150]:
        pairs = Counter()
        for word, symbols in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        assert pairs[left, right] == max(pairs.values())
        for symbols in words.values():
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == (left, right):
                    symbols[at : at + 2] = [left + right]
                at += 1


def test_manifest(data, trained):
    manifest = json.loads((trained / "manifest.json").read_text(encoding="utf-8"))
    texts = split_texts(data, "validation")
    plain = Tokenizer.from_file(str(trained / "tokenizer.json"))
    tokens = sum(len(plain.encode(text, add_special_tokens=False).ids) for text in texts)
    training = "".join(text + "\n" for text in split_texts(data, "train"))
    assert manifest == {
        "format": 1,
        "argv": record.command_line(),
        "vocab_size": 600,
        "entries": 600,
        "min_frequency": 2,
        "data_sha256": hashlib.sha256(training.encode()).hexdigest(),
        "tokens_per_word": tokens / len(" ".join(texts).split()),
        "tokens_per_text": tokens / len(texts),
        "sha256": hashlib.sha256((trained / "tokenizer.json").read_bytes()).hexdigest(),
    }


def test_two_processes_give_the_same_bytes(data, trained, tmp_path):
    """Many pairs are equally frequent; neither hash seeds nor the number of threads may decide between them."""
    for number, threads in enumerate(("1", "4")):
        command = [sys.executable, str(SCRIPT), "--data_dir", str(data), "--output_dir", str(number), "--vocab_size"]
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        result = subprocess.run([*command, "1200"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "1,200 entries" in result.stdout and "tokens per word" in result.stdout
    files = {path.name for path in (tmp_path / "0").iterdir()} - {"manifest.json"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    for name in files:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_only_the_training_split_is_used(tmp_path, capsys):
    path = dataset(tmp_path / "data", ["kato"] * 3 + ["hundo"], ["zzzz zzzz"] * 9)
    train_tokenizer.main(["--data_dir", path, "--output_dir", str(tmp_path / "t")])
    entries = RobertaTokenizerFast.from_pretrained(tmp_path / "t").get_vocab()
    assert "kato" in entries and "zz" not in entries
    assert "hu" not in entries, "it occurs once, and min_frequency is 2"
    output = capsys.readouterr().out
    assert "264 entries instead of 52,032" in output
    assert "4.50 tokens per word and 9.0 per text" in output  # zzzz, then a space and zzzz

    train_tokenizer.main(["--data_dir", path, "--output_dir", str(tmp_path / "u"), "--min_frequency", "1"])
    assert "hundo" in RobertaTokenizerFast.from_pretrained(tmp_path / "u").get_vocab()


def test_a_text_that_decoding_does_not_restore_is_an_error(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_tokenizer, "HARD_TEXTS", ["bona", "skribu <mask> tie"])
    line = refused(capsys, "--data_dir", data, "--output_dir", tmp_path / "t", "--vocab_size", 300)
    assert "skribu <mask> tie" in line and not list(tmp_path.iterdir())


def test_existing_folders_are_safe(data, trained, tmp_path, capsys):
    path = dataset(tmp_path / "data", ["kato"] * 3)
    arguments = ["--data_dir", path, "--output_dir"]
    before = (trained / "tokenizer.json").read_bytes()
    assert "--overwrite" in refused(capsys, *arguments, trained)
    assert (trained / "tokenizer.json").read_bytes() == before
    assert "--output_dir" in refused(capsys, *arguments, data, "--overwrite"), "a dataset is not a tokenizer"
    assert (data / "train").is_dir()
    for flags in ([], ["--overwrite"]):
        train_tokenizer.main([*arguments, str(tmp_path / "t"), *flags])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "t"]


def test_bad_data(tmp_path, capsys):
    assert "build_dataset.py" in refused(capsys, "--data_dir", tmp_path / "nenio", "--output_dir", tmp_path / "t")
    for damaged in ("manifest.json", "dataset_dict.json", "train/state.json", "train/data-00000-of-00001.arrow"):
        path = Path(dataset(tmp_path / damaged.replace("/", "-"), ["kato"] * 3))
        (path / damaged).write_bytes((path / damaged).read_bytes()[:9])
        assert str(path) in refused(capsys, "--data_dir", path, "--output_dir", tmp_path / "t")
    assert not list(tmp_path.glob("t*.partial*")) and not (tmp_path / "t").exists()


def test_ctrl_c_does_not_wait_for_the_library():
    threads = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if a shell's & started the tests
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer.interruptible(lambda: threads.append(threading.current_thread()) or time.sleep(20))
        assert time.monotonic() - started < 10
        # Python handles signals in the main thread only, so the library must not run there.
        assert threads[0] is not threading.main_thread() and threads[0].daemon
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(OSError, match="full"):
        train_tokenizer.interruptible(lambda: (_ for _ in ()).throw(OSError("full")))


def test_command_line_errors_are_one_line(data, tmp_path):
    def run(*flags, **options):
        command = [sys.executable, str(SCRIPT), *flags]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **options)
        assert result.returncode == 1 and "Traceback" not in result.stderr and not list(tmp_path.iterdir())
        return result.stderr

    line = run()
    assert line.startswith("error: ") and line.count("\n") == 1 and "build_dataset.py" in line
    full_disk = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))}
    assert run("--data_dir", data, **full_disk).splitlines()[-1].startswith("error: ")


def test_keep_accepts_only_a_tokenizer_with_the_same_flags(data, tmp_path, capsys):
    flags = ["--data_dir", str(data), "--output_dir", str(tmp_path / "kept"), "--keep", "--vocab_size"]
    train_tokenizer.main([*flags, "300"])
    before = (tmp_path / "kept" / "tokenizer.json").stat().st_mtime_ns
    train_tokenizer.main([*flags, "300"])
    assert (tmp_path / "kept" / "tokenizer.json").stat().st_mtime_ns == before
    assert "kept: found and kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="kept is there and was made with vocab_size = 300, not 301: move it away"):
        train_tokenizer.main([*flags, "301"])
