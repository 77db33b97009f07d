"""runner.sh with a stand-in for Python: which stages run, in which order, and what a failure stops."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Notes each call and leaves what the stage would leave. FAIL names a run whose training fails, RECORD says whether that
# failure leaves a results file, as a divergence does.
PYTHON = r"""#!/usr/bin/env bash
echo "$@" >> calls
value() { while [ $# -gt 1 ]; do [ "$1" != "$key" ] || echo "$2"; shift; done; }
case "$1" in
    build_dataset.py | train_tokenizer.py)
        key=--output_dir; folder=$(value "$@")
        mkdir -p "$folder" && echo {} > "$folder/manifest.json" ;;
    train_model.py)
        key=--softmax_n; run=esperberto-softmax$(value "$@")
        key=--seed; seed=$(value "$@"); [ "$seed" = 42 ] || run=$run-seed$seed
        key=--results_dir; results=$(value "$@")
        mkdir -p "$results"
        if [ "$run" = "$FAIL" ]; then
            [ -z "$RECORD" ] || echo '{"status": "diverged"}' > "$results/$run.json"
            echo "error: $run failed" >&2
            exit 1
        fi
        echo {} > "$results/$run.json" ;;
    train_runs.py)
        key=--results_dir; results=$(value "$@"); mkdir -p "$results"
        for run in esperberto-softmax{0,1}{,-seed43}; do echo {} > "$results/$run.json"; done ;;
    analyze_kurtosis.py)
        key=--results_dir; echo report > "$(value "$@")/report.md" ;;
esac
"""


@pytest.fixture
def runner(tmp_path):
    """runner(*flags, **environment) runs the script in a folder of its own: (exit status, stderr, calls)."""
    for name in ("runner.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "requirements.txt")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*flags, **environment):
        hidden = ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER")
        clean = {name: value for name, value in os.environ.items() if name not in hidden}
        settings = {**clean, "FAIL": "", "RECORD": "", **environment}
        done = subprocess.run(["bash", "runner.sh", *flags], cwd=tmp_path, capture_output=True, text=True, env=settings)
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return done.returncode, done.stderr, calls

    return run


def stages(calls):
    return [call.split()[0] for call in calls]


def test_the_stages_run_once_and_in_order(runner):
    status, _, calls = runner("--seeds", "2")
    assert status == 0
    expected = ["build_dataset.py", "train_tokenizer.py", *["train_model.py"] * 4, "analyze_kurtosis.py"]
    assert stages(calls) == expected
    assert [(call.split()[2], call.split()[4]) for call in calls[2:6]] == [
        ("0", "42"),
        ("1", "42"),
        ("0", "43"),
        ("1", "43"),
    ]


def test_a_run_that_diverges_is_analysed_with_the_others(runner):
    status, error, calls = runner(FAIL="esperberto-softmax0", RECORD="yes")
    assert status == 0 and "esperberto-softmax0 failed" in error
    assert stages(calls)[2:] == ["train_model.py", "train_model.py", "analyze_kurtosis.py"]


def test_a_training_that_fails_otherwise_stops_everything(runner):
    status, _, calls = runner(FAIL="esperberto-softmax0")
    assert status == 1
    assert stages(calls)[2:] == ["train_model.py"]


def test_parallel_runs_are_trained_before_the_rest_and_not_again(runner):
    status, _, calls = runner("--seeds", "2", "--parallel", "2")
    assert status == 0
    assert stages(calls)[2:] == ["train_runs.py", "analyze_kurtosis.py"]
    words = calls[2].split()
    assert words[words.index("--seeds") + 1 : words.index("--results_dir")] == ["42", "43", "--parallel", "2"]
    assert words[words.index("--") + 1 :] == ["--data_dir", "./data", "--tokenizer_dir", "./tokenizer"]


@pytest.mark.parametrize("flags", [["--parallel"], ["--parallel", "0"], ["--parallel", "x"], ["--seeds", "--parallel"]])
def test_flags_that_need_a_number(flags, tmp_path):
    done = subprocess.run(["bash", str(ROOT / "runner.sh"), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"error: {flags[0]} needs a whole number above 0" in done.stderr
