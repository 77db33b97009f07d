"""runner.sh with a stand-in for Python: the stages, their order and flags, and the effect of failures."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import analyze_kurtosis
import build_dataset
import train_model
import train_runs
import train_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = [path.stem for path in sorted((ROOT / "recipes").glob("*.sh"))]

# Records each call, and writes the files that the stage would write. HUB, TRAINING and PUSH are exit statuses.
STAGES = r"""#!/usr/bin/env bash
[ "$1 $2" != "hub.py check" ] || exit "${HUB:-3}"
echo "$@" >> calls
value() { while [ $# -gt 1 ]; do [ "$1" != "$key" ] || echo "$2"; shift; done; }
key=--results_dir; results=$(value "$@")
case "$1" in
    train_runs.py)
        mkdir -p "$results"; [ -f "$results/esperberto-softmax0.json" ] || echo {} > "$results/esperberto-softmax0.json"
        exit "${TRAINING:-0}" ;;
    analyze_kurtosis.py) echo report > "$results/report.md" ;;
    hub.py) exit "${PUSH:-0}" ;;
esac
"""


@pytest.fixture
def runner(tmp_path):
    """runner(*flags, **environment) runs the script in its own folder; returns (exit status, stderr, calls)."""
    for name in ("runner.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "requirements.txt")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(STAGES)
    python.chmod(0o755)

    def run(*flags, **environment):
        hidden = ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER")
        clean = {name: value for name, value in os.environ.items() if name not in hidden}
        settings = {**clean, **environment}
        done = subprocess.run(["bash", "runner.sh", *flags], cwd=tmp_path, capture_output=True, text=True, env=settings)
        noted = tmp_path / "calls"
        calls = noted.read_text().splitlines() if noted.exists() else []
        noted.unlink(missing_ok=True)
        return done.returncode, done.stderr, calls

    return run


def stages(calls):
    return [call.split()[0] for call in calls]


ALL = ["build_dataset.py", "train_tokenizer.py", "train_runs.py", "analyze_kurtosis.py"]


def test_the_stages_run_in_order(runner):
    status, _, calls = runner("--seeds", "2", "--parallel", "3")
    assert status == 0 and stages(calls) == ALL
    assert calls[2] == (
        "train_runs.py --softmax_n 0 1 --seeds 42 43 --parallel 3 --results_dir ./results "
        "--output_dir ./models/<run> -- --data_dir ./data --tokenizer_dir ./tokenizer"
    )


def test_flags_after_two_dashes_reach_every_training(runner):
    calls = runner("--seeds=2", "--", "--bf16", "--learning_rate", "1e-4")[2]
    assert "--seeds 42 43 " in calls[2]
    assert calls[2].endswith("-- --data_dir ./data --tokenizer_dir ./tokenizer --bf16 --learning_rate 1e-4")


def test_help_is_the_first_comment_of_the_script(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "runner.sh"), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("The whole experiment, top to bottom, on one machine:\n")
    assert done.stdout.rstrip().endswith("is not sent again.") and "#" not in done.stdout


def test_env_is_not_run_as_shell(runner, tmp_path):
    (tmp_path / ".env").write_text('X=$(touch ran)\nHUGGINGFACE_TOKEN = "hf_x"\n')
    assert runner()[0] == 0 and not (tmp_path / "ran").exists()


def test_a_second_call_runs_every_stage_but_analyses_only_new_results(runner, tmp_path):
    runner()
    status, _, calls = runner()
    assert status == 0 and stages(calls) == ALL[:3] and all("--keep" in call for call in calls[:2])
    results = tmp_path / "results" / "esperberto-softmax0.json"
    results.write_text('{"seed": 42}')
    os.utime(results, (0, 0))  # the clock was set back
    assert stages(runner()[2]) == ALL
    assert stages(runner()[2]) == ALL[:3]
    shutil.copy(results, results.with_name("esperberto-softmax1.json"))
    assert stages(runner()[2]) == ALL


def test_a_training_that_fails_stops_everything(runner):
    status, _, calls = runner(TRAINING="1")
    assert status == 1 and stages(calls) == ALL[:3]


RECIPE = """work=elsewhere
dataset=(--validation_fraction 0.1)
tokenizer=(--vocab_size 2048)
training=(--max_steps 9)
analysis=(--max_samples 8)
softmax_n="0 1 learned"
controls="gated"
first_seed=43
seeds=2
"""


@pytest.mark.parametrize(
    ("push", "training", "status", "last"),
    [
        ("0", "0", 0, "analyze_kurtosis.py"),
        ("1", "0", 1, "analyze_kurtosis.py"),
        ("0", "4", 1, "analyze_kurtosis.py"),  # the push of a model failed
        ("130", "0", 130, "hub.py"),
        ("0", "130", 130, "train_runs.py"),
    ],
)
def test_a_failed_push_loses_no_work_and_an_interruption_ends_the_script(runner, push, training, status, last):
    ended, error, calls = runner(HUB="0", PUSH=push, TRAINING=training)
    assert ended == status and stages(calls)[-1] == last
    assert calls[1] == "hub.py push ./data"
    assert ("run this again to push it" in error) == (status == 1)
    assert (status == 130 and push == "130") or " --push " in calls[3]


def test_a_token_that_the_hub_refuses_stops_everything(runner):
    assert runner(HUB="1")[0::2] == (1, [])


def test_a_recipe_names_the_arms_the_seeds_and_the_flags_of_every_stage(runner, tmp_path):
    (tmp_path / "recipes" / "mine.sh").write_text(RECIPE)
    status, _, calls = runner("--recipe", "mine", "--from_files", "my texts/*.gz")
    assert status == 0 and calls == [
        "build_dataset.py --keep --output_dir elsewhere/data --validation_fraction 0.1 --from_files my texts/*.gz",
        "train_tokenizer.py --keep --data_dir elsewhere/data --output_dir elsewhere/tokenizer --vocab_size 2048",
        "train_runs.py --softmax_n 0 1 learned --controls gated --seeds 43 44 --parallel 1 "
        "--results_dir elsewhere/results --output_dir elsewhere/models/<run> -- --data_dir elsewhere/data "
        "--tokenizer_dir elsewhere/tokenizer --max_steps 9",
        "analyze_kurtosis.py --models_dir elsewhere/models --results_dir elsewhere/results --data_dir elsewhere/data "
        "--max_samples 8",
    ]
    assert "--seeds 43 --parallel" in runner("--recipe", "mine", "--seeds", "1")[2][2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_flags_that_the_scripts_know(recipe, runner, tmp_path):
    """The runner calls the stand-in, then the parser of each script reads the recorded flags."""
    status, error, calls = runner("--recipe", recipe, "--seeds", "1")
    assert status == 0, error
    parsers = {
        "build_dataset.py": build_dataset.parse_arguments,
        "train_tokenizer.py": train_tokenizer.parse_arguments,
        "train_runs.py": train_runs.parse_arguments,
        "analyze_kurtosis.py": analyze_kurtosis.parse_arguments,
    }
    read = {}
    for call in calls:
        script, *flags = call.split()
        read[script] = parsers[script](flags)
    for job in train_runs.jobs_of(read["train_runs.py"]):
        train_model.parse(job.command[2:])


# A stand-in for a stage that takes hours.
HANGS = """import os, time
import command

command.begin()
with open("pid", "w") as file:
    print(os.getpid(), file=file, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_when_runner_alone_is_killed(runner, tmp_path, how):
    for name in ("command.py", "runner.sh"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "build_dataset.py").write_text(HANGS)
    (tmp_path / "hub.py").write_text("raise SystemExit(3)")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    process = subprocess.Popen(["bash", "runner.sh"], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(how)
        _, error = process.communicate(timeout=30)  # stderr ends when the stage has ended too
        assert process.returncode == -how and b"The script that started this one is gone" in error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_no_venv_names_the_missing_packages(runner, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    status, error, calls = runner("--no_venv", PYTHON=str(bare / "bin" / "python"))
    assert status == 1 and calls == []
    assert error.count("\n") == 1 and "lacks torch, transformers, accelerate, datasets" in error
    assert "pytest" not in error.partition(" lacks ")[2]  # it is needed for the tests only
    assert "no nowhere/python here" in runner("--no_venv", PYTHON="nowhere/python")[1]


def test_no_venv_runs_the_stages_with_the_given_interpreter(runner, tmp_path):
    wrapper = tmp_path / "wrapper"  # real Python for the check of the packages, the stand-in for the stages
    wrapper.write_text(f'#!/usr/bin/env bash\n[ "$1" != - ] || exec {sys.executable} -\nexec .venv/bin/python "$@"\n')
    wrapper.chmod(0o755)
    status, error, calls = runner("--seeds", "1", "--no_venv", PYTHON=str(wrapper))
    assert status == 0, error
    assert stages(calls) == ALL


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--recipe"], "--recipe needs the name"),
        (["--recipe", "../runner"], "--recipe needs the name"),
        (["--recipe", "large"], "no recipe large"),
        (["--recipe", "published", "--test_pipeline"], "two recipes: published and test_pipeline"),
        (["--from_files"], "--from_files needs a pattern"),
        (["--seeds", "2", "--benchmark"], "--benchmark goes with no other flag"),
        (["--seeds", "2", "--tests"], "--tests goes with no other flag"),
        (["--test-pipeline"], "unknown argument: --test-pipeline"),
    ],
)
def test_wrong_flags_give_one_line(flags, said, runner):
    status, error, calls = runner(*flags)
    assert status == 2 and calls == []
    assert error.startswith(f"error: {said}") and len(error.splitlines()) == 1
    assert f"(recipes: {' '.join(RECIPES)}; all flags: bash runner.sh --help)" in error


@pytest.mark.parametrize("flags", [["--parallel"], ["--parallel", "0"], ["--parallel", "x"], ["--seeds", "--parallel"]])
def test_flags_that_need_a_number(flags, tmp_path):
    done = subprocess.run(["bash", str(ROOT / "runner.sh"), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"error: {flags[0]} needs a whole number above 0" in done.stderr


@pytest.mark.parametrize("script", ["runner.sh", ".ci/run", *(f"recipes/{name}.sh" for name in ("published", "small"))])
def test_the_shell_scripts_run_in_the_bash_of_macos(script):
    """It is bash 3.2 of 2007, which lacks later features. With `set -u` an empty array is an error there."""
    lines = [line.partition(" # ")[0] for line in (ROOT / script).read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    guarded = re.sub(r'\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}', "", text)
    assert not re.findall(r"\$\{\w+\[[@*]\]", guarded)
    newer = (
        r"\$\{\w+(,|\^|@[A-Z])|\b(mapfile|readarray|coproc|declare -[Ang]|local -n|wait -n)\b|&>>|\|&|;;&|;&|\[\[? -v "
    )
    assert not re.search(newer, text)
    assert not re.search(r"\b(sed -i|grep -P|readlink -f|date -d|sort -V|xargs -r|stat -c|tac|timeout|nproc)\b", text)
