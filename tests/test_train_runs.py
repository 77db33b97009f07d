"""train_runs.py: the runs that it starts, the time left that it shows, and its next call after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import OVERRIDES

import folder
import train_model
import train_runs
from train_runs import Job, seconds_left

# A stand-in for train_model.py: records its start, writes log lines, may wait, and writes its results file.
TRAIN = (
    f"""
import argparse, json, os, pathlib, sys, time
sys.path.insert(0, {str(Path(train_runs.__file__).parent)!r})
import command
command.begin()
"""
    + """
parser = argparse.ArgumentParser()
for name in ("softmax_n", "control", "seed", "results_dir", "output_dir"):
    parser.add_argument("--" + name)
args = parser.parse_args()
arm = args.control or f"softmax{float(args.softmax_n):g}"
run = f"esperberto-{arm}" + ("" if args.seed == "42" else "-seed" + args.seed)
results = pathlib.Path(args.results_dir)
(results / "started").mkdir(parents=True, exist_ok=True)
(results / "started" / f"{run}-{os.getpid()}").touch()
print("step 10 of 1,000, loss 9.9", flush=True)
mode = os.environ.get("MODE")
if mode == run:
    sys.exit("error: no luck")
if mode == "hang":
    time.sleep(600)
(results / f"{run}.json").write_text(json.dumps({"threads": os.environ.get("OMP_NUM_THREADS")}))
pathlib.Path(args.output_dir.replace("<run>", run)).mkdir(parents=True)
"""
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(train_runs, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(train_runs, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(train_model, "refuse_other_settings", lambda *_: None)  # it cannot read those of the stand-in
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
    assert len(started()) == 6 and capsys.readouterr().out.count("found and kept") == 6


def test_a_training_that_cannot_start_ends_in_its_own_error(stand_in):
    Path("results").mkdir()
    Path("results/logs").touch()
    with pytest.raises(FileExistsError):  # which command.run says in one line
        train_runs.main(["--softmax_n", "0", "1", "--parallel", "2"])


def test_single_runs_show_their_number_and_the_time_left(stand_in, capfd):
    train_runs.main(["--softmax_n", "0", "1"])
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("== ")]
    assert re.fullmatch(r"== \d\d:\d\d Run 1 of 2: esperberto-softmax0 \(time left for all of them: unknown\)", told[0])
    assert re.fullmatch(r"== \d\d:\d\d Run 2 of 2: esperberto-softmax1 \(time left .*: \d+ m \d+ s\)", told[1])


def test_controls_are_separate_runs(stand_in):
    train_runs.main(["--softmax_n", "0", "--controls", "clipped", "gated"])
    assert started() == ["esperberto-clipped", "esperberto-gated", "esperberto-softmax0"]


def test_the_log_of_an_earlier_session_is_not_counted_as_progress(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("step 500 of 1,000, 9 m 0 s left\n")
    job = Job("run", [sys.executable, "-c", "print('step 401 of 1,000')"], log, tmp_path / "run.json")
    job.start(1)
    job.process.wait(60)
    job.look()
    assert (job.first_step, job.step, job.seconds_a_step) == (401, 401, None)


@pytest.mark.parametrize(("parallel", "where"), [("2", "results/logs"), ("1", "above")])
def test_a_run_that_fails_is_named_and_the_others_finish(stand_in, capsys, monkeypatch, parallel, where):
    monkeypatch.setenv("MODE", "esperberto-softmax0")
    with pytest.raises(SystemExit, match=rf"^error: esperberto-softmax0 failed: see {where}$"):
        train_runs.main(["--parallel", parallel])
    assert [path.stem for path in Path("results").glob("*.json")] == ["esperberto-softmax1"]
    if parallel == "2":
        said = "esperberto-softmax0 failed: no luck (see results/logs/esperberto-softmax0.log)"
        assert said in capsys.readouterr().err
    assert Path("results/logs").exists() == (parallel == "2")  # a single run at a time writes to the terminal


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_every_model_is_pushed_as_soon_as_it_is_complete(stand_in, monkeypatch, capsys, parallel):
    note = 'open("pushed", "a").write(" ".join(sys.argv[1:]) + chr(10))'
    Path("hub.py").write_text(f'import sys\n{note}\nsys.exit("softmax1" in sys.argv[2])\n')
    monkeypatch.setattr(train_runs, "HUB", Path("hub.py"))
    flags = ["--parallel", parallel, "--push"]
    for _ in range(2):  # complete runs are pushed again, because the earlier push may have failed
        with pytest.raises(SystemExit) as end:
            train_runs.main(flags)
        assert end.value.code == train_runs.UNPUSHED
        assert "not on the Hub: esperberto-softmax1 (see above)" in capsys.readouterr().err
    expected = [f"push models/esperberto-softmax{n} --results results/esperberto-softmax{n}.json" for n in (0, 1)]
    assert sorted(Path("pushed").read_text().splitlines()) == sorted(expected * 2)
    assert len(started()) == 2


def test_a_push_that_is_interrupted_ends_the_script(stand_in, monkeypatch):
    Path("hub.py").write_text("raise SystemExit(130)")
    monkeypatch.setattr(train_runs, "HUB", Path("hub.py"))
    with pytest.raises(SystemExit) as end:
        train_runs.main(["--push"])
    assert end.value.code == 130 and started() == ["esperberto-softmax0"]


def test_a_run_of_another_experiment_is_refused_before_anything_is_trained(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data_dir", str(sample / "data"), "--tokenizer_dir", str(sample / "tokenizer"), "--vocab_size", "1024"]
    flags += [
        "--config_overrides",
        OVERRIDES,
        "--max_length",
        "32",
        "--max_eval_samples",
        "4",
        "--disable_tqdm",
        "true",
    ]
    train_model.main([*flags, "--max_steps", "2"])
    monkeypatch.setattr(train_runs, "train_alone", lambda job: job.results.touch() or True)
    left = Path("models/esperberto-softmax0/checkpoint-2")  # as after a kill just after the results file was written
    left.mkdir()
    train_runs.main(["--softmax_n", "0", "--", *flags, "--max_steps", "2"])
    assert not left.exists() and (left.parent / "model.safetensors").exists()
    with pytest.raises(SystemExit, match=r"softmax0\.json is there, of a run with max_steps = 2, not 3: move"):
        train_runs.main(["--", *flags, "--max_steps", "3"])
    with pytest.raises(SystemExit, match=r"config_overrides = '.*num_hidden_layers=1', not '': move"):
        train_runs.main(["--", *flags, "--max_steps", "2", "--config_overrides", ""])
    assert not Path("results/esperberto-softmax1.json").exists()


def test_the_terminal_names_a_run_that_another_process_still_trains(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data_dir", str(sample / "data"), "--tokenizer_dir", str(sample / "tokenizer"), "--vocab_size", "1024"]
    flags += ["--config_overrides", OVERRIDES, "--max_length", "32"]
    with folder.locked("models/esperberto-softmax0"), pytest.raises(SystemExit, match="esperberto-softmax0 failed"):
        train_runs.main(["--softmax_n", "0", "--parallel", "2", "--", *flags])
    at_work = f"process {os.getpid()} is at work on models/esperberto-softmax0: wait until it has ended, or end it"
    assert f"esperberto-softmax0 failed: {at_work} (see results/logs/" in capsys.readouterr().err


def test_a_wrong_flag_ends_before_any_run(stand_in):
    with pytest.raises(SystemExit, match="unknown argument: --learning_rat "):
        train_runs.main(["--", "--learning_rat", "1"])
    assert not Path("results").exists()


def test_nohup_protects_it_from_the_end_of_its_shell():
    source = Path(train_runs.__file__).read_text()
    block = source[source.rindex('if __name__ == "__main__":') :]
    told = block.replace("command.run(main)", "print(signal.getsignal(signal.SIGHUP).name)")
    code = f"import signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{told}"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "SIG_IGN\n"


INTERRUPTIONS = [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 2), (signal.SIGKILL, 1), (signal.SIGKILL, 2)]


@pytest.mark.parametrize(("how", "parallel"), INTERRUPTIONS)
def test_an_interruption_ends_every_run_and_the_next_call_continues(stand_in, tmp_path, how, parallel):
    driver = "import command, pathlib, sys, train_runs; train_runs.TRAIN = pathlib.Path('train.py'); "
    source = Path(train_runs.__file__).read_text()
    main = source[source.rindex('if __name__ == "__main__":') :].replace("run(main)", "run(train_runs.main)", 1)
    # SIGINT would be ignored if a shell's & started the tests, SIGHUP after nohup.
    driver += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    driver += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + main.replace('if __name__ == "__main__":', "if True:")
    command = [sys.executable, "-c", driver, "--parallel", str(parallel)]
    environment = {**os.environ, "MODE": "hang", "PYTHONPATH": str(Path(train_runs.__file__).parent)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(Path("results/started").glob("*")) if Path("results/started").exists() else []) < parallel:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    killed = how == signal.SIGKILL  # it cannot end its trainings then, and they end themselves
    assert process.wait(30) == (-how if killed else 128 + how) and "Traceback" not in process.stderr.read()
    deadline = time.monotonic() + (20 if killed else 0)
    for path in Path("results/started").iterdir():  # no training is left
        while Path("/proc", path.name.rpartition("-")[2]).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.rpartition("-")[2]), 0)
    train_runs.main(["--parallel", "2"])
    assert len(list(Path("results").glob("*.json"))) == 2


def test_the_time_left_is_that_of_all_runs():
    def job(first, step, steps, seconds):
        running = Job("run", [], Path(), Path(), first_step=first, step=step, steps=steps)
        running.started = time.monotonic() - seconds
        return running

    waiting = [Job("waits", [], Path(), Path())] * 2
    assert seconds_left(waiting, [Job("starts", [], Path(), Path())], 2) is None
    # Two runs with 2 s a step have 80 and 60 steps left, and two runs of 100 steps wait: 340 steps, two at a time.
    running = [job(0, 20, 100, 40), job(30, 40, 100, 20)]
    assert seconds_left(waiting, running, 2) == pytest.approx(2 * 340 / 2, rel=1e-3)
    assert seconds_left([], running[:1], 2) == pytest.approx(2 * 80, rel=1e-3)
