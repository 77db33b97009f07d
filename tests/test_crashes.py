"""Kills at random moments: the experiment must end with the files of an undisturbed one (see crash_harness.py)."""

import signal
import time
from pathlib import Path

import crash_harness
import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds its processes by Linux's /proc")


def test_a_killed_experiment_ends_like_an_undisturbed_one(tmp_path):
    """The short form, for the default tests: two trainings at a time, killed in three stages."""
    with crash_harness.experiment(import_each_time=False) as made:
        fell, _, files = crash_harness.survive(made, kills=3, seed=48, keep=tmp_path)
    assert fell.total() == 3 and files > 50


@pytest.mark.slow
def test_every_stage_is_killed(tmp_path):
    with crash_harness.experiment(import_each_time=False) as made:
        fell, _, _ = crash_harness.survive(made, kills=40, seed=1, keep=tmp_path)
    assert set(crash_harness.STAGES) <= set(fell)


@pytest.mark.slow
def test_kills_of_separately_started_scripts(tmp_path):
    with crash_harness.experiment(import_each_time=True) as made:
        crash_harness.survive(made, kills=3, seed=2, keep=tmp_path)


@pytest.mark.slow
def test_a_runner_that_is_killed_alone_takes_its_trainings_with_it():
    with crash_harness.experiment(import_each_time=True) as made:
        made.watched(parallel=2)
        expected = made.artefacts()
        made.new()
        process = made.begin(parallel=2)
        while made.stage() != "training":
            assert process.poll() is None
            time.sleep(crash_harness.LOOK_SECONDS)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while list(made.processes()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not (made.work / "results" / "report.md").exists()
        made.expect(made.begin(parallel=2))
        assert crash_harness.differing(expected, made.artefacts()) == []
