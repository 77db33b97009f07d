"""runner.sh with a stand-in for Python: which stages run, in which order, and what a failure stops."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import analyze_kurtosis
import build_dataset
import train_model
import train_tokenizer

ROOT = Path(__file__).parent.parent

# Notes each call and leaves what the stage would leave. FAIL names a run whose training fails, RECORD says whether that
# failure leaves a results file, as a divergence does.
STAGES = r"""#!/usr/bin/env bash
[ "$1 $2" != "hub.py check" ] || exit "${HUB:-3}"
echo "$@" >> calls
value() { while [ $# -gt 1 ]; do [ "$1" != "$key" ] || echo "$2"; shift; done; }
case "$1" in
    build_dataset.py | train_tokenizer.py)
        key=--output_dir; folder=$(value "$@")
        mkdir -p "$folder" && echo {} > "$folder/manifest.json" ;;
    train_model.py)
        key=--control; run=esperberto-$(value "$@")
        key=--softmax_n; n=$(value "$@"); [ -z "$n" ] || run=esperberto-softmax$n
        key=--seed; seed=$(value "$@"); [ "$seed" = 42 ] || run=$run-seed$seed
        key=--results_dir; results=$(value "$@")
        mkdir -p "$results"
        if [ "$run" = "$FAIL" ]; then
            [ -z "$RECORD" ] || echo '{"status": "diverged"}' > "$results/$run.json"
            echo "error: $run failed" >&2
            exit 1
        fi
        echo {} > "$results/$run.json" ;;
    hub.py) exit "${PUSH:-0}" ;;
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
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "requirements.txt")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(STAGES)
    python.chmod(0o755)

    def run(*flags, **environment):
        hidden = ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER")
        clean = {name: value for name, value in os.environ.items() if name not in hidden}
        settings = {**clean, "FAIL": "", "RECORD": "", **environment}
        done = subprocess.run(["bash", "runner.sh", *flags], cwd=tmp_path, capture_output=True, text=True, env=settings)
        noted = tmp_path / "calls"
        calls = noted.read_text().splitlines() if noted.exists() else []
        noted.unlink(missing_ok=True)
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


RECIPE = """work=elsewhere
dataset=(--validation_fraction 0.1)
tokenizer=(--vocab_size 2048)
training=(--max_steps 9)
analysis=(--max_samples 8)
softmax_n="0 1 0.25"
controls="gated"
first_seed=43
seeds=2
"""


@pytest.mark.parametrize(("push", "status", "pushes"), [("0", 0, 3), ("1", 1, 3), ("130", 130, 1)])
def test_a_failed_push_costs_no_work_and_an_interrupted_one_ends_the_script(runner, push, status, pushes):
    ended, error, calls = runner(HUB="0", PUSH=push)
    assert ended == status and stages(calls).count("hub.py") == pushes
    assert ("run this again to push it" in error) == (push == "1")
    assert ("analyze_kurtosis.py" in stages(calls)) == (push != "130")


def test_a_token_that_the_hub_refuses_stops_everything(runner):
    assert runner(HUB="1")[0::2] == (1, [])


def test_a_recipe_names_the_arms_the_seeds_and_the_flags_of_every_stage(runner, tmp_path):
    (tmp_path / "recipes" / "mine.sh").write_text(RECIPE)
    status, _, calls = runner("--recipe", "mine", "--seeds", "1", "--from_files", "my texts/*.gz")
    assert status == 0
    assert calls[0] == (
        "build_dataset.py --output_dir elsewhere/data --validation_fraction 0.1 --from_files my texts/*.gz"
    )
    assert calls[1].endswith("--output_dir elsewhere/tokenizer --vocab_size 2048")
    assert [call.split()[1:3] for call in calls[2:6]] == [
        ["--softmax_n", "0"],
        ["--softmax_n", "1"],
        ["--softmax_n", "0.25"],
        ["--control", "gated"],
    ]
    assert all(call.endswith("--tokenizer_dir elsewhere/tokenizer --max_steps 9") for call in calls[2:6])
    assert calls[6].endswith("--data_dir elsewhere/data --max_samples 8") and len(calls) == 7


def test_a_recipe_gives_its_arms_to_parallel_runs(runner, tmp_path):
    (tmp_path / "recipes" / "mine.sh").write_text(RECIPE)
    _, _, calls = runner("--recipe", "mine", "--parallel", "2")
    assert calls[2].startswith(
        "train_runs.py --softmax_n 0 1 0.25 --controls gated --seeds 43 44 --parallel 2 --results_dir elsewhere/results"
    )


@pytest.mark.parametrize("recipe", [path.stem for path in sorted((ROOT / "recipes").glob("*.sh"))])
def test_every_recipe_has_flags_that_the_scripts_know(recipe, runner, tmp_path):
    """The stages are called by the recipe, then each script's own parser reads what it would have got."""
    _, _, calls = runner("--recipe", recipe, "--seeds", "1")
    parsers = {
        "build_dataset.py": build_dataset.parse_arguments,
        "train_tokenizer.py": train_tokenizer.parse_arguments,
        "train_model.py": train_model.parse,
        "analyze_kurtosis.py": analyze_kurtosis.parse_arguments,
    }
    for call in calls:
        script, *flags = call.split()
        parsers[script](flags)


def test_the_interpreter_at_hand_is_taken_and_what_it_lacks_is_named(runner, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    status, error, calls = runner("--no_venv", PYTHON=str(bare / "bin" / "python"))
    assert status == 1 and calls == []
    assert error.count("\n") == 1 and "lacks torch, transformers, accelerate, datasets" in error
    assert "pytest" not in error.partition(" lacks ")[2]  # only the tests need it
    assert "no nowhere/python here" in runner("--no_venv", PYTHON="nowhere/python")[1]


def test_the_interpreter_at_hand_runs_the_stages(runner, tmp_path):
    wrapper = tmp_path / "wrapper"  # answers for what is installed, and stands in for the stages
    wrapper.write_text(f'#!/usr/bin/env bash\n[ "$1" != - ] || exec {sys.executable} -\nexec .venv/bin/python "$@"\n')
    wrapper.chmod(0o755)
    status, error, calls = runner("--no_venv", PYTHON=str(wrapper))
    assert status == 0, error
    assert stages(calls) == ["build_dataset.py", "train_tokenizer.py", *["train_model.py"] * 2, "analyze_kurtosis.py"]


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
def test_flags_that_make_no_sense_get_one_line(flags, said, runner):
    status, error, calls = runner(*flags)
    assert status == 2 and calls == []
    assert error.startswith(f"error: {said}") and len(error.splitlines()) == 2
    assert "usage: bash runner.sh [--no_venv] [--recipe published|" in error


@pytest.mark.parametrize("flags", [["--parallel"], ["--parallel", "0"], ["--parallel", "x"], ["--seeds", "--parallel"]])
def test_flags_that_need_a_number(flags, tmp_path):
    done = subprocess.run(["bash", str(ROOT / "runner.sh"), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"error: {flags[0]} needs a whole number above 0" in done.stderr
