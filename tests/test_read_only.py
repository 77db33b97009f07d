"""Folders without write permission: every script ends with one line, before its work, and nothing changes."""

import ctypes
import os
import shlex
import shutil
import sys

import pytest
from test_bad_input import MAIN, TRAINING, listing

import command

# From <linux/capability.h>: two capabilities with which root can read and write in spite of permissions.
VERSION, OVERRIDES = 0x20080522, 1 << 1 | 1 << 2


@pytest.fixture
def permissions():
    """Makes permissions effective for this thread, even if it belongs to root."""
    if os.geteuid():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root ignores permissions")
    system = ctypes.CDLL(None, use_errno=True)
    header, sets = (
        (ctypes.c_uint32 * 2)(VERSION, 0),
        (ctypes.c_uint32 * 6)(),
    )  # effective, permitted, inheritable; twice
    assert system.capget(header, sets) == 0
    before, sets[0] = sets[0], sets[0] & ~OVERRIDES
    assert system.capset(header, sets) == 0
    yield
    sets[0] = before
    assert system.capset(header, sets) == 0


@pytest.fixture(scope="module")
def project(sample, tmp_path_factory):
    """A project whose data/ has not been tokenized yet, with the empty folder locked/."""
    root = tmp_path_factory.mktemp("read-only")
    shutil.copytree(sample / "data", root / "data", ignore=shutil.ignore_patterns("tokenized-*"))
    shutil.copytree(sample / "tokenizer", root / "tokenizer")
    (root / "locked").mkdir()
    (root / "results").mkdir()
    (root / "results" / "esperberto-softmax0.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("script", "flags", "locked"),
    [
        ("build_dataset", "--sample --validation_fraction 0.1 --output_dir locked/new", "locked"),
        ("build_dataset", "--sample --validation_fraction 0.1 --overwrite", "."),
        ("build_dataset", "--sources oscar --output_dir new --download_dir locked", "locked"),
        ("train_tokenizer", "--vocab_size 400 --output_dir locked/new", "locked"),
        ("train_tokenizer", "--vocab_size 400 --overwrite", "."),
        ("train_model", f"{TRAINING} --seed 2 --output_dir new --results_dir new", "data"),  # not tokenized yet
        ("train_model", f"{TRAINING} --seed 2 --output_dir locked/<run>", "locked"),
        ("train_model", f"{TRAINING} --seed 2 --output_dir locked", "locked"),
        ("train_model", f"{TRAINING} --seed 2 --output_dir new --results_dir locked", "locked"),
        ("train_runs", f"--seeds 2 --results_dir locked -- {TRAINING}", "locked"),
        ("analyze_kurtosis", "", "results"),
    ],
)
def test_a_read_only_folder_gives_one_line_and_changes_nothing(
    project, permissions, monkeypatch, capsys, script, flags, locked
):
    monkeypatch.chdir(project)
    before = listing(project)
    folder = project / locked
    folder.chmod(0o555)
    try:
        with pytest.raises(SystemExit) as end:
            command.run(lambda: MAIN[script](shlex.split(flags)))
    finally:
        folder.chmod(0o755)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    assert "Permission denied" in end.value.code
    after = listing(project)
    assert {name: after.get(name) for name in before} == before
    assert "Traceback" not in capsys.readouterr().err
