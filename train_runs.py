"""Train the runs of an experiment several at a time: every arm with every seed, each in a process of its own.

    python train_runs.py --softmax_n 0 1 --seeds 42 43 44 --parallel 2 -- --max_steps 4000 --bf16

The flags after -- are passed to every train_model.py. A run that has a results file is not trained again (if it had
other settings, that is an error), and an interrupted run continues from its last checkpoint. So the same command
completes what is missing.

Writes the files of train_model.py, and with --parallel <results_dir>/logs/<run>.log. A single run at a time shows its
own progress; several show one line for all, with the time left. If a run fails, the script ends with status 1 after the
other runs; a run that diverges has a result, and does not count as failed. With --push every model is pushed to the Hub
as soon as it is complete; if a push fails, the script ends with status 4.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import command

if __name__ == "__main__":
    command.begin()

import train_model
from checkpoints import checkpoints, delete_checkpoints
from experiment import REMEDIES, read_softmax_n, run_name
from folder import locked, refuse_unwritable
from hub import diverged
from tables import duration

TRAIN = Path(__file__).parent / "train_model.py"
HUB = Path(__file__).parent / "hub.py"
UNPUSHED = 4  # exit status if a push failed, for runner.sh
LOOK_SECONDS = 1.0  # between two readings of the logs
TELL_SECONDS = 60.0  # between two lines of progress outside a terminal, where a line cannot be redrawn
STEP = re.compile(rb"step ([\d,]+) of ([\d,]+)")  # in the log lines of train_model.py
ERROR = re.compile(rb"^error: (.+)$", re.MULTILINE)  # the last line of a training that failed
TAIL_BYTES = 4096
SET_FOR_EACH_RUN = {  # flag of train_model.py: the flag here
    "softmax_n": "--softmax_n",
    "use_softmax1": "--softmax_n 1",
    "control": "--controls",
    "seed": "--seeds",
    "results_dir": "--results_dir",
    "output_dir": "--output_dir",
}


@dataclass
class Job:
    """A run: its command, its files, and its progress."""

    name: str
    command: list[str]
    log: Path
    results: Path
    model: str = ""
    process: subprocess.Popen | None = None
    started: float = 0.0
    first_step: int | None = None  # the first one that was logged in this session; above 1 after a resumption
    step: int = 0
    steps: int | None = None
    log_start: int = 0

    def start(self, threads: int) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log_start = self.log.stat().st_size if self.log.exists() else 0  # the part that an earlier session wrote
        self.started = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=command.child_environment(OMP_NUM_THREADS=str(threads)),
                start_new_session=True,  # Ctrl-C then reaches it only once, from this script
            )

    def tail(self) -> bytes:
        """The end of what this session has logged so far."""
        with open(self.log, "rb") as log:
            log.seek(max(self.log_start, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            return log.read()

    def look(self) -> None:
        """Read the progress of the run from the end of its log."""
        if logged := STEP.findall(self.tail()):
            self.step, self.steps = (int(number.replace(b",", b"")) for number in logged[-1])
            if self.first_step is None:
                self.first_step, self.started = self.step, time.monotonic()

    def failure(self) -> str:
        """The last line of a training that failed, and the path of its log."""
        errors = ERROR.findall(self.tail())
        return f"{errors[-1].decode(errors='replace')} (see {self.log})" if errors else f"see {self.log}"

    @property
    def seconds_a_step(self) -> float | None:
        done = 0 if self.first_step is None else self.step - self.first_step
        return (time.monotonic() - self.started) / done if done else None


def seconds_left(waiting: list[Job], running: list[Job], parallel: int) -> float | None:
    """Estimated seconds until all runs have ended, from the steps left and the mean seconds a step of the current runs.

    None while the time of a step is unknown.
    """
    paces = [job.seconds_a_step for job in running if job.seconds_a_step]
    steps = [job.steps for job in running if job.steps]
    if not paces or not steps:
        return None
    left = [job.steps - job.step for job in running if job.steps] + [max(steps)] * len(waiting)
    pace = sum(paces) / len(paces)
    # The time is at least that of the longest run, and at least that of all steps divided evenly.
    return pace * max(max(left), sum(left) / parallel)


def progress(jobs: list[Job], waiting: list[Job], running: list[Job], parallel: int) -> str:
    """One line: how many runs are complete, the time left, and the steps of the current runs."""
    done = len(jobs) - len(waiting) - len(running)
    left = seconds_left(waiting, running, parallel)
    now = ", ".join(f"{job.name} {job.step:,}/{job.steps:,}" if job.steps else f"{job.name} starts" for job in running)
    left = "time left unknown" if left is None else f"{duration(left)} left"
    return f"{done} of {len(jobs)} runs done, {left}: {now}"


def train_alone(job: Job) -> bool:
    """Run one job in this terminal. Returns whether it wrote its results file. An interruption ends the job too."""
    # In a session of its own, so that Ctrl-C reaches it only once, from this script.
    process = subprocess.Popen(job.command, env=command.child_environment(), start_new_session=True)
    try:
        process.wait()
    except BaseException:
        process.terminate()  # it writes a checkpoint first
        process.wait()
        raise
    return job.results.is_file()


def train(jobs: list[Job], parallel: int, push: Callable[[Job], None]) -> list[Job]:
    """Run the jobs, `parallel` at a time; returns those that failed. An interruption ends all of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    threads = max(1, cores // parallel)
    waiting, running, failed = list(jobs), [], []
    terminal = sys.stderr.isatty()
    last_line = -TELL_SECONDS
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                waiting[0].start(threads)
                running.append(waiting.pop(0))
            time.sleep(LOOK_SECONDS)
            for job in list(running):
                job.look()
                if job.process.poll() is not None:
                    running.remove(job)
                    if job.results.is_file():
                        push(job)
                    else:
                        failed.append(job)
                        print(f"\n{job.name} failed: {job.failure()}", file=sys.stderr)
            if terminal:
                print(f"\r\033[K{progress(jobs, waiting, running, parallel)}", end="", file=sys.stderr, flush=True)
            elif time.monotonic() - last_line > TELL_SECONDS:
                last_line = time.monotonic()
                print(progress(jobs, waiting, running, parallel), file=sys.stderr, flush=True)
    finally:
        for job in running:
            os.killpg(job.process.pid, signal.SIGTERM)
        for job in running:
            job.process.wait()
    if terminal:
        print(file=sys.stderr)
    return failed


class Push:
    """Pushes the models of complete runs. After a failure, the next call of the same command pushes again."""

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self.failed: list[str] = []

    def __call__(self, job: Job) -> None:
        if not self.wanted or not Path(job.model).is_dir():
            return
        print(f"== Push of {job.model}", flush=True)
        argv = [sys.executable, str(HUB), "push", job.model, "--results", str(job.results)]
        done = subprocess.run(argv, env=command.child_environment())
        if done.returncode in (130, -signal.SIGINT):  # Ctrl-C is meant for the whole script
            sys.exit(130)
        if done.returncode:
            self.failed.append(job.name)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    parser.add_argument(
        "--softmax_n", type=read_softmax_n, nargs="+", default=[0.0, 1.0], metavar="N", help="arms (0 1)"
    )
    parser.add_argument("--controls", nargs="+", default=[], choices=list(REMEDIES), help="controls to train too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], metavar="SEED", help="seeds (42)")
    parser.add_argument("--parallel", type=command.positive, default=1, metavar="K", help="runs at a time (1)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="where <run>.json goes (results)")
    parser.add_argument("--output_dir", default="models/<run>", help="where a model goes (models/<run>)")
    parser.add_argument("--push", action="store_true", help="push every model as soon as it is complete (see hub.py)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of train_model.py")
    args = parser.parse_args(argv)
    for name in (flag.split("=")[0].replace("-", "_").lstrip("_") for flag in args.flags if flag.startswith("--")):
        if name in SET_FOR_EACH_RUN:
            parser.error(f"--{name} differs from run to run: give it before the -- ({SET_FOR_EACH_RUN[name]})")
    for name in ("softmax_n", "controls", "seeds"):
        if len(set(given := getattr(args, name))) < len(given):
            parser.error(f"--{name} names one of them twice")
    if "<run>" not in args.output_dir:
        parser.error("--output_dir needs <run> in it, or the runs overwrite each other")
    return args


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The jobs in order: all arms of the first seed, then those of the next, so that pairs are complete early."""
    places = ["--results_dir", str(args.results_dir), "--output_dir", args.output_dir]
    jobs = []
    for seed in args.seeds:
        arms = [(run_name(n, seed), ["--softmax_n", str(n)]) for n in args.softmax_n]
        arms += [(run_name(0.0, seed, control), ["--control", control]) for control in args.controls]
        for name, arm in arms:
            jobs.append(
                Job(
                    name,
                    [sys.executable, str(TRAIN), *arm, "--seed", str(seed), *places, *args.flags],
                    args.results_dir / "logs" / f"{name}.log",
                    args.results_dir / f"{name}.json",
                    args.output_dir.replace("<run>", name),
                )
            )
    return jobs


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    jobs = jobs_of(args)
    push = Push(args.push)
    missing = []
    for job in jobs:
        # A wrong flag ends this script now, not each training later.
        settings = train_model.parse(job.command[2:])
        if job.results.is_file():
            train_model.refuse_other_settings(job.results, *settings)
            print(f"{job.results}: found and kept, not trained again", flush=True)
            if checkpoints(job.model) and not diverged(job.results):  # the run was killed after it wrote the results
                with locked(job.model):
                    delete_checkpoints(job.model)
            push(job)
        else:
            missing.append(job)
    if missing:
        refuse_unwritable(args.results_dir)  # now, not in each training
    if args.parallel > 1:
        failed = train(missing, args.parallel, push)
    else:
        failed = []
        started = time.monotonic()
        for done, job in enumerate(missing):
            left = duration((time.monotonic() - started) / done * (len(missing) - done)) if done else "unknown"
            now = f"== {time.strftime('%H:%M')} Run {done + 1} of {len(missing)}: {job.name}"
            print(now if len(missing) == 1 else f"{now} (time left for all of them: {left})", flush=True)
            if train_alone(job):
                push(job)
            else:
                failed.append(job)
    if failed:
        names = ", ".join(job.name for job in failed)
        sys.exit(f"error: {names} failed: see {args.results_dir / 'logs' if args.parallel > 1 else 'above'}")
    if push.failed:
        print(f"error: not on the Hub: {', '.join(push.failed)} (see above)", file=sys.stderr)
        sys.exit(UNPUSHED)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # by default they would end this script but not the trainings
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    command.run(main)
