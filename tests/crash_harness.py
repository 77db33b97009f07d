"""Kill the experiment at random moments, restart it until it ends, and compare its files with an undisturbed run.

    python tests/crash_harness.py                         six kills, one training at a time
    python tests/crash_harness.py --kills 100 --seed 1    the kills in docs/reliability.md

Runs the project's own runner.sh on a tiny experiment: download (from a server on loopback), split, BPE, tokenization,
two arms, results, push (to a Hub on loopback), analysis. First a stage is drawn, so that short stages are killed too,
then a moment within it. All processes of the experiment get SIGKILL at once, as if the machine was switched off. At the
end every file must have the same bytes, except for the parts in CUT_OUT, for example times. In every second experiment
the two trainings run at the same time. Linux only.

Importing PyTorch takes seconds, so the scripts are forked from a process that has imported everything. With
--import_each_time they start as on a user's machine, which takes several times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hub_server import HubServer

ROOT = Path(__file__).parent.parent
TOKEN, USER = "hf_KrasxasSedRevenas1", "zamenhof"
MARK = "ESPERBERTO_CRASH_HARNESS"  # environment variable that identifies the processes of one experiment
LOOK_SECONDS = 0.002
LIMIT_SECONDS = 300  # of one start of the runner
KILLS_PER_EXPERIMENT = 6

# In this order. Kills are counted by stage.
STAGES = ["download", "split", "BPE", "tokenization", "training", "checkpoint", "final save", "results", "push"]
STAGES += ["analysis"]
BETWEEN = "between stages"

RECIPE = """work=work
dataset=(--sources oscar --oscar_url {url} --download_dir work/downloads --validation_fraction 0.1)
tokenizer=(--vocab_size 400)
training=(--vocab_size 400 --max_length 24 --max_steps 8 --per_device_train_batch_size 4 --logging_steps 2)
training+=(--eval_steps 4 --save_steps 2 --max_eval_samples 8 --config_overrides {size} --use_cpu)
analysis=(--max_samples 8 --max_scored 4 --calibration_batches 1)
softmax_n="0 1"
controls=""
first_seed=42
seeds=1
"""
SIZE = "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=32,max_position_embeddings=26"

# Parts that differ between two undisturbed runs, removed before files are compared: (names of files, pattern, why).
CUT_OUT = [
    (r"results/.*\.json", rb'"(wall_seconds|cost_usd)": [^,\n]+', "time"),
    (r"results/measured/.*\.json", rb'"results": "\w+"', "digest of the results file, which holds times"),
    (r"results/report\.(md|html)", rb" *\d+ m \d+ s", "time"),
    (r"data/.*state\.json", rb'"_fingerprint": "\w+"', "computed from the time by datasets"),
]
NOT_COMPARED = (
    r".*\.lock|results/logs/.*|results/analysed\.txt"  # ids of processes; lines with the time left; digests of results
)


# ------------------------------------------------------------------------------- scripts that are forked, not started

# Replaces Python in runner.sh and train_runs.py: lets the server fork the script, and ends with its status.
CLIENT = """#!{python} -SE
import os, socket, sys
if sys.argv[1] == "-":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
what = repr((sys.argv[1:], os.getcwd(), dict(os.environ))).encode()
socket.send_fds(server, [len(what).to_bytes(4, "big")], [0, 1, 2])
server.sendall(what)
os._exit((server.recv(1) or bytes([137]))[0])
"""

SERVER = """
import ast, atexit, os, random, runpy, signal, socket, sys, traceback
sys.path.insert(0, os.getcwd())
import analyze_kurtosis, build_dataset, hub, train_model, train_runs, train_tokenizer
import numpy, torch

def run(connection, argv, cwd, environment):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.executable = argv, CLIENT
    for reseed in (random.seed, numpy.random.seed, torch.seed):  # as in a new process
        reseed()
    code = 0
    try:
        runpy.run_path(os.path.abspath(argv[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(bytes([code or 0]))
    os._exit(code or 0)

CLIENT, path = sys.argv[1:]
listening = socket.socket(socket.AF_UNIX)
listening.bind(path)
listening.listen()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
while True:
    connection, _ = listening.accept()
    length, descriptors, *_ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as stream:
        what = stream.read(int.from_bytes(length, "big"))
    connection.setblocking(False)
    try:
        alive = bool(what) and connection.recv(1) and False  # b"" means that the client has ended
    except BlockingIOError:
        alive = True
    connection.setblocking(True)
    if alive and os.fork() == 0:
        os.setpgid(0, 0)
        listening.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        run(connection, *ast.literal_eval(what.decode()))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.close()
"""


@contextlib.contextmanager
def forking(project: Path, environment: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen]]:
    """(the replacement of Python, the process of the server, which has imported everything)."""
    with tempfile.TemporaryDirectory() as folder:
        path, client = str(Path(folder) / "socket"), Path(folder) / "python"
        client.write_text(CLIENT.format(python=sys.executable, path=path))
        client.chmod(0o755)
        command = [sys.executable, "-c", SERVER, str(client), path]
        server = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True)
        try:
            while not Path(path).exists():
                if server.poll() is not None:
                    sys.exit("error: the process that forks the scripts has not started")
                time.sleep(0.05)
            yield str(client), server
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


# ---------------------------------------------------------------------------------------------------- the experiment


def text_server(text: bytes) -> ThreadingHTTPServer:
    """Serves the corpus from any byte, slowly enough to be interrupted."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(text) - 1}/{len(text)}")
            self.send_header("Content-Length", str(len(text) - start))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client was killed
                for i in range(start, len(text), len(text) // 10):
                    self.wfile.write(text[i : i + len(text) // 10])
                    self.wfile.flush()
                    time.sleep(0.03)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class Experiment:
    """The tiny experiment in its own folder and with its own Hub; `begin` starts runner.sh once."""

    def __init__(self, project: Path, python: str, server: subprocess.Popen | None, hub: HubServer):
        self.project, self.work, self.log = project, project / "work", project / "log"
        self.python, self.server, self.hub = python, server, hub
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.began, self.printed_before = 0.0, 0

    def new(self) -> None:
        """Delete all results, so that the next start is the first."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.hub.repos.clear()

    def begin(self, parallel: int) -> subprocess.Popen:
        self.began = time.time()
        self.printed_before = self.log.stat().st_size if self.log.exists() else 0
        environment = {**self.environment(), "PYTHON": self.python, MARK: self.mark}
        command = ["bash", "runner.sh", "--no_venv", "--recipe", "crash", "--parallel", str(parallel)]
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                command, cwd=self.project, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def environment(self) -> dict[str, str]:
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(self.project / "hf")}
        settings |= {"HUGGINGFACE_TOKEN": TOKEN, "HUGGINGFACE_USER": USER, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **settings, "NO_PROXY": "127.0.0.1"}

    def fresh(self, *patterns: str) -> bool:
        """Whether this start of the runner created or changed a path below work/ that matches a pattern."""
        for pattern in patterns:
            for path in self.work.glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime >= self.began:
                        return True
        return False

    def stage(self) -> str:
        """The current stage of the experiment, according to its files and the last line that it printed."""
        printed = self.log.read_bytes()[self.printed_before :]
        if printed.rstrip().rpartition(b"\n")[2].startswith(b"== Push of"):
            return "push"
        if b"Stage 4 of 4" in printed:
            return "analysis"
        if self.fresh("downloads/*.partial"):
            return "download"
        if self.fresh("data.partial-*"):
            return "split"
        if self.fresh("tokenizer.partial-*"):
            return "BPE"
        if self.fresh("data/tokenized-*.partial"):
            return "tokenization"
        current = BETWEEN
        for lock in self.work.glob("models/*.lock"):
            if not self.fresh(f"models/{lock.name}"):
                continue
            run = lock.stem
            if self.fresh(f"models/{run}/tokenizer.json"):  # the last file of the model
                return "results"
            if self.fresh(f"models/{run}/*.*"):
                return "final save"
            if any(not (path / "SHA256SUMS").exists() for path in self.work.glob(f"models/{run}/checkpoint-*")):
                return "checkpoint"
            current = "training"
        return current

    def processes(self) -> Iterator[int]:
        """The ids of all running processes of the experiment; first those that the server forked, which do the work."""
        if self.server:
            children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children")
            yield from map(int, children.read_text().split())
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                ours = entry.name.isdecimal() and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes()
                if ours and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    yield int(entry.name)

    def kill(self) -> None:
        """Send SIGKILL to every process of the experiment."""
        if self.server:
            self.server.send_signal(signal.SIGSTOP)  # so that it forks nothing more
        left = True
        while left:
            left = False
            for pid in self.processes():
                left = True
                with contextlib.suppress(ProcessLookupError):
                    if self.server and os.getpgid(pid) == self.server.pid:  # forked just now
                        os.kill(pid, signal.SIGKILL)
                    else:
                        os.killpg(os.getpgid(pid), signal.SIGKILL)
        if self.server:
            self.server.send_signal(signal.SIGCONT)

    def watched(self, parallel: int) -> dict[str, list[float]]:
        """Run undisturbed to the end; returns the seconds of each stage, once for each time that it occurred."""
        seconds: dict[str, list[float]] = {}
        process, last, since = self.begin(parallel), None, 0.0
        while process.poll() is None:
            if (now := self.stage()) != last:
                if last in STAGES:
                    seconds.setdefault(last, []).append(time.monotonic() - since)
                last, since = now, time.monotonic()
            time.sleep(LOOK_SECONDS)
        seconds.setdefault(last, []).append(time.monotonic() - since)
        self.expect(process)
        return seconds

    def killed(self, parallel: int, stage: str, skip: int, moment: float) -> str | None:
        """Run, and kill it `moment` seconds after a stage began, not counting the first `skip` times of that stage.

        Returns the stage in which it was killed; None if it ended before.
        """
        process, deadline, inside = self.begin(parallel), None, False
        limit = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None:
            now = time.monotonic()
            if now > limit:
                self.kill()
                sys.exit(f"error: runner.sh has not ended after {LIMIT_SECONDS} s: see {self.log}")
            if deadline is None:
                if (there := self.stage() == stage) and not inside:
                    deadline, skip = (now + moment, 0) if skip == 0 else (None, skip - 1)
                inside = there
            if deadline is not None and now >= deadline:
                self.kill()
                process.wait()
                return self.stage()
            time.sleep(LOOK_SECONDS)
        self.expect(process)
        return None

    def expect(self, process: subprocess.Popen) -> None:
        if process.wait() != 0:
            sys.exit(f"error: runner.sh ended with {process.returncode}:\n{self.log.read_text()[-3000:]}")

    def artefacts(self) -> dict[str, bytes]:
        """{name: content} of all files of the experiment, on the disk and on the Hub, without the parts in CUT_OUT."""
        files = {str(path.relative_to(self.work)): path for path in self.work.rglob("*") if path.is_file()}
        found = {name: path.read_bytes() for name, path in files.items() if not re.fullmatch(NOT_COMPARED, name)}
        for kind, repo in self.hub.repos:
            found |= {f"hub/{kind}/{repo}/{name}": data for name, data in self.hub.files(kind, repo).items()}
        for name in found:
            for names, what, _ in CUT_OUT:
                if re.fullmatch(names, name):
                    found[name] = re.sub(what, b"", found[name])
        return found


@contextlib.contextmanager
def experiment(import_each_time: bool) -> Iterator[Experiment]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        project = Path(folder) / "project"
        project.mkdir()
        for path in [*ROOT.glob("*.py"), ROOT / "runner.sh", ROOT / "requirements.txt"]:
            shutil.copy(path, project)
        for name in ("recipes", "sample"):
            shutil.copytree(ROOT / name, project / name)
        hub = HubServer()
        stack.callback(hub.close)
        hub.user(TOKEN, USER)
        [text] = (ROOT / "sample").glob("*.txt")
        served = text_server(text.read_bytes())
        stack.callback(served.shutdown)
        url = f"http://127.0.0.1:{served.server_port}/oscar.txt"
        (project / "recipes" / "crash.sh").write_text(RECIPE.format(url=url, size=SIZE))
        made = Experiment(project, sys.executable, None, hub)
        if not import_each_time:
            made.python, made.server = stack.enter_context(forking(project, made.environment()))
        stack.callback(made.kill)
        yield made


def differing(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Names of files that differ, or that exist on one side only."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def survive(made: Experiment, kills: int, seed: int, keep: Path | None = None) -> tuple[Counter, int, int]:
    """Kill experiments `kills` times; returns ({stage: kills}, number of experiments, number of files in each).

    Exits with one line if an experiment does not end, or if its files differ from those of an undisturbed one, which
    are then copied to `keep`.
    """
    draw = random.Random(seed)
    seconds = made.watched(parallel=1)
    expected = made.artefacts()
    for stage in set(STAGES) - set(seconds):  # too short to be noticed on a busy machine
        seconds[stage] = [LOOK_SECONDS]
    print({stage: [round(value, 3) for value in seconds[stage]] for stage in STAGES}, file=sys.stderr)
    fell: Counter = Counter()
    experiments = 0
    while fell.total() < kills:
        if experiments > kills + 5:
            sys.exit(f"error: only {fell.total()} of {kills} kills met their stage: is this machine too busy?")
        made.new()
        parallel = 2 - experiments % 2
        experiments += 1
        count = min(KILLS_PER_EXPERIMENT, kills - fell.total())
        # The stages with the fewest kills come first, so that all are killed.
        rare = sorted(STAGES, key=lambda stage: (fell[stage], draw.random()))
        wanted = sorted(rare[:count], key=STAGES.index)
        for stage in wanted:
            moment = draw.uniform(0, draw.choice(seconds[stage]))
            hit = made.killed(parallel, stage, draw.randrange(2) if len(seconds[stage]) > 1 else 0, moment)
            if hit is None:
                break
            fell[hit] += 1
            print(f"kill {fell.total()} of {kills}: {hit} (intended: {stage} + {moment:.3f} s)", file=sys.stderr)
        else:
            made.expect(made.begin(parallel))
        if names := differing(expected, found := made.artefacts()):
            if keep:
                for side, files in (("undisturbed", expected), ("killed", found)):
                    for name in set(names) & files.keys():
                        (keep / side / name).parent.mkdir(parents=True, exist_ok=True)
                        (keep / side / name).write_bytes(files[name])
            why = f"after {fell.total()} kills with seed {seed}, files differ from those of an undisturbed run"
            sys.exit(f"error: {why}: {', '.join(names)}")
    return fell, experiments, len(expected)


def table(fell: Counter, experiments: int, files: int, seed: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    rows = [f"| {stage} | {fell[stage]} |" for stage in [*STAGES, BETWEEN]]
    return "\n".join(
        [
            f"{time.strftime('%d %B %Y')}, commit {commit.strip() or 'unknown'}, seed {seed}, {platform.machine()}: "
            f"{fell.total()} kills in {experiments} experiments, after each of which all {files} files were the same.",
            "",
            "| stage | kills |",
            "| --- | ---: |",
            *rows,
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="number of kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the stages and moments (%(default)s)")
    parser.add_argument("--import_each_time", action="store_true", help="start a new Python for every script")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder for copies of files that differ")
    args = parser.parse_args(argv)
    with experiment(args.import_each_time) as made:
        print(table(*survive(made, args.kills, args.seed, args.keep), args.seed))


if __name__ == "__main__":
    main()
