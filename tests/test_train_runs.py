"""train_runs.py: which runs it starts, how it tells the time that is left, and what a kill leaves for the next time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_model
import train_runs
from train_runs import Job, seconds_left

# Stands for train_model.py: notes that it was started, writes log lines, waits, and leaves its results file.
TRAIN = """
import argparse, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("softmax_n", "control", "seed", "results_dir", "output_dir", "mode"):
    parser.add_argument("--" + name)
args = parser.parse_args()
arm = args.control or f"softmax{float(args.softmax_n):g}"
run = f"esperberto-{arm}" + ("" if args.seed == "42" else "-seed" + args.seed)
results = pathlib.Path(args.results_dir)
(results / "started").mkdir(parents=True, exist_ok=True)
(results / "started" / f"{run}-{os.getpid()}").touch()
print("step 10 of 1,000, loss 9.9", flush=True)
if run in (args.mode or ""):
    sys.exit("error: failed")
if args.mode == "hang":
    time.sleep(600)
(results / f"{run}.json").write_text(json.dumps({"threads": os.environ["OMP_NUM_THREADS"]}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(train_runs, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(train_runs, "LOOK_SECONDS", 0.05)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)


def started():
    return sorted(path.name.rpartition("-")[0] for path in Path("results/started").iterdir())


def test_every_arm_and_seed_is_trained_once(stand_in, capsys):
    flags = ["--softmax_n", "0", "1", "0.5", "--seeds", "42", "43", "--parallel", "2"]
    train_runs.main(flags)
    names = [f"esperberto-softmax{n}{seed}" for n in ("0", "0.5", "1") for seed in ("", "-seed43")]
    assert started() == names == sorted(path.stem for path in Path("results").glob("*.json"))
    threads = {json.loads(path.read_text())["threads"] for path in Path("results").glob("*.json")}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert "step 10 of 1,000" in Path("results/logs/esperberto-softmax0.log").read_text()
    train_runs.main(flags)
    assert len(started()) == 6 and "6 of 6 runs have their results file" in capsys.readouterr().out


def test_controls_are_runs_of_their_own(stand_in):
    train_runs.main(["--softmax_n", "0", "--controls", "clipped", "gated"])
    assert started() == ["esperberto-clipped", "esperberto-gated", "esperberto-softmax0"]


def test_what_an_earlier_session_logged_is_not_this_session_s_progress(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("step 500 of 1,000, 9 m 0 s left\n")
    job = Job("run", [sys.executable, "-c", "print('step 401 of 1,000')"], log, tmp_path / "run.json")
    job.start(1)
    job.process.wait(60)
    job.look()
    assert (job.first_step, job.step, job.seconds_a_step) == (401, 401, None)


def test_a_run_that_fails_is_named_and_costs_no_other(stand_in, capsys):
    with pytest.raises(SystemExit, match=r"^error: esperberto-softmax0 failed: see the logs"):
        train_runs.main(["--parallel", "1", "--", "--mode", "esperberto-softmax0"])
    assert [path.stem for path in Path("results").glob("*.json")] == ["esperberto-softmax1"]
    assert "esperberto-softmax0 failed: see results/logs/esperberto-softmax0.log" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_run_and_the_next_call_goes_on(stand_in, tmp_path, how):
    driver = "import pathlib, sys, train_runs; train_runs.TRAIN = pathlib.Path('train.py'); "
    source = Path(train_runs.__file__).read_text()
    main = source[source.index('if __name__ == "__main__":') :].replace("main()", "train_runs.main()", 1)
    # Behind a shell's & it would be ignored, here as in pytest itself.
    driver += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + main.replace(
        'if __name__ == "__main__":', "if True:"
    )
    command = [sys.executable, "-c", driver, "--parallel", "2", "--", "--mode", "hang"]
    environment = {**os.environ, "PYTHONPATH": str(Path(train_runs.__file__).parent)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(Path("results/started").glob("*")) if Path("results/started").exists() else []) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(30) == 128 + how and "Traceback" not in process.stderr.read()
    for path in Path("results/started").iterdir():
        with pytest.raises(ProcessLookupError):  # nothing is left behind
            os.kill(int(path.name.rpartition("-")[2]), 0)
    train_runs.main(["--parallel", "2"])
    assert len(list(Path("results").glob("*.json"))) == 2


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [one for child in found for one in descendants(child)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the trainings by Linux's /proc")
def test_real_runs_that_were_killed_go_on_and_end_as_if_they_had_not_been(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,max_position_embeddings=34"
    flags = ["--data_dir", str(sample / "data"), "--tokenizer_dir", str(sample / "tokenizer"), "--vocab_size", "1024"]
    flags += ["--config_overrides", small, "--max_length", "32", "--max_steps", "200", "--max_eval_samples", "4"]
    flags += ["--save_steps", "20", "--eval_steps", "200", "--logging_steps", "50"]

    def places(name):
        return ["--results_dir", f"{name}/results", "--output_dir", f"{name}/models/<run>"]

    command = [sys.executable, train_runs.__file__, "--parallel", "2", *places("killed"), "--", *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len({path.parent for path in Path("killed/models").glob("*/checkpoint-*/trainer_state.json")}) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    trainings = descendants(process.pid)
    for pid in [process.pid, *trainings]:  # as when the machine goes away
        os.kill(pid, signal.SIGKILL)
    process.wait(60)
    assert len(trainings) >= 2 and not list(Path("killed/results").glob("*.json"))

    subprocess.run(command, check=True)
    for n in ("0", "1"):
        run = f"esperberto-softmax{n}"
        assert "Going on from" in Path(f"killed/results/logs/{run}.log").read_text()
        train_model.main(["--softmax_n", n, *places("whole"), *flags])
        ends = [json.loads(Path(f"{name}/results/{run}.json").read_text()) for name in ("killed", "whole")]
        for key in ("loss_history", "validation", "emergence", "weight_excess_kurtosis"):
            assert ends[0][key] == ends[1][key]
        weights = [Path(f"{name}/models/{run}/model.safetensors").read_bytes() for name in ("killed", "whole")]
        assert weights[0] == weights[1]


def test_the_time_left_is_that_of_all_runs():
    def job(first, step, steps, seconds):
        one = Job("run", [], Path(), Path(), first_step=first, step=step, steps=steps)
        one.started = time.monotonic() - seconds
        return one

    waiting = [Job("waits", [], Path(), Path())] * 2
    assert seconds_left(waiting, [Job("starts", [], Path(), Path())], 2) is None
    # Two runs at 2 s a step with 80 and 60 steps left, and two of 100 steps to come: 340 steps on two places.
    running = [job(0, 20, 100, 40), job(30, 40, 100, 20)]
    assert seconds_left(waiting, running, 2) == pytest.approx(2 * 340 / 2, rel=1e-3)
    assert seconds_left([], running[:1], 2) == pytest.approx(2 * 80, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parallel", "0"], "--parallel must be at least 1"),
        (["--parallel", "two"], "invalid int value"),
        (["--output_dir", "models"], "needs <run> in it"),
        (["--seeds"], "expected at least one argument"),
        (["--controls", "open"], "invalid choice: 'open'"),
        (["--", "--control", "clipped"], "give controls by --controls"),
    ],
)
def test_bad_flags(flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        train_runs.main(flags)
    assert end.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
