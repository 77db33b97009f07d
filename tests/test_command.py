"""command.py: how every script starts and ends, and its help."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import build_dataset
import command
import hub
import train_runs
import train_tokenizer

ROOT = Path(__file__).parent.parent
SCRIPTS = ["build_dataset", "train_tokenizer", "train_model", "train_runs", "hub"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_calls_begin_before_slow_imports(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    began = next(node.lineno for node in tree.body if isinstance(node, ast.If) and "begin" in ast.unparse(node))
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno < began:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "command"}
    assert ast.unparse(tree.body[-1]).endswith("command.run(main)")


def test_windows_is_refused_before_slow_imports():
    code = """
import argparse, email.utils, http.client, os, runpy, shutil, subprocess, sys, tarfile, tempfile, urllib.request
os.name = "nt"
for script in sys.argv[1:]:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
assert "torch" not in sys.modules and "datasets" not in sys.modules
"""
    scripts = [str(ROOT / f"{script}.py") for script in SCRIPTS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()
        == ["error: this runs on Linux and macOS; on Windows it runs inside WSL (wsl --install)"] * 5
    )


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if a shell's & started the tests
import command
command.begin()
print("imports", flush=True)
if sys.argv[1] == "imports":
    time.sleep(60)

def main():
    print("works", flush=True)
    time.sleep(60)

command.run(main)
"""


@pytest.mark.parametrize(("when", "status"), [("imports", -signal.SIGINT), ("works", 130)])
def test_ctrl_c_ends_a_script_without_a_traceback(when, status):
    arguments = [sys.executable, "-c", SCRIPT, when]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.stdout.readline().strip() != when:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == status and process.stderr.read() == ""


def test_an_oserror_is_one_line():
    def full():
        raise OSError(28, "No space\nleft", "file")

    with pytest.raises(SystemExit, match=r"^error: \[Errno 28\] No space left: 'file'$"):
        command.run(full)


@pytest.mark.parametrize(
    "script", [build_dataset, train_tokenizer, train_runs, hub], ids=lambda script: script.__name__
)
def test_help_contains_the_docstring_of_the_script(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and script.__doc__.strip() in told and "usage: " in told
