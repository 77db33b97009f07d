"""Reading what training wrote: only what train_model.py can have written gets in, and n keeps its name."""

import json

import pytest
from made_runs import RESULTS, changed, diverged

from experiment import arm_name, run_name
from runs import find_runs, labelled, ranges, read_results
from sets import refuse_duplicates

GOOD = changed({**RESULTS, "softmax_n": 1.0, "seed": 42}, {})


def read(tmp_path, text):
    path = tmp_path / "esperberto-softmax1.json"
    path.write_text(text)
    return read_results(path)


def test_a_good_file_is_read(tmp_path):
    assert read(tmp_path, json.dumps(GOOD)) == GOOD
    lost = diverged(0, 43).results
    assert read(tmp_path, json.dumps(lost)) == lost
    assert read(tmp_path, json.dumps({**GOOD, "status": "complete"}))["status"] == "complete"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("softmax_n", -1, "'softmax_n' holds '-1'"),
        ("softmax_n", True, "'softmax_n' holds 'True'"),
        ("softmax_n", None, "'softmax_n' holds 'None'"),
        ("softmax_n", float("nan"), "NaN is no JSON"),
        ("softmax_n", float("inf"), "Infinity is no JSON"),
        ("softmax_n", 10**400, "'softmax_n' holds '1000"),
        ("seed", -1, "'seed' holds '-1'"),
        ("seed", 42.5, "'seed' holds '42.5'"),
        ("training.steps", True, "'training.steps' holds 'True'"),
        ("training.steps", -3, "'training.steps' holds '-3'"),
        ("effective_batch_size", False, "'effective_batch_size' holds 'False'"),
        ("training.wall_seconds", -1.0, "'training.wall_seconds' holds '-1.0'"),
        ("validation.loss", True, "'validation.loss' holds 'True'"),
        ("test_pipeline", 1, "'test_pipeline' holds '1'"),
        ("settings", [], "'settings' holds '[]'"),
        ("loss_history", [[1, True]], "'loss_history' holds '[[1, True]]', but train_model.py writes pairs of numbers"),
        ("weight_excess_kurtosis", {"a": True}, "'weight_excess_kurtosis' holds \"{'a': True}\""),
        ("emergence", [{"step": True}], "'emergence' holds \"[{'step': True}]\""),
        ("status", "lost", "'status' holds 'lost', but train_model.py writes 'complete' or 'diverged' there"),
        ("status", "diverged", "the status is 'diverged', but it has no 'diverged.step'"),
        ("diverged", {"step": "late"}, "'diverged.step' holds 'late'"),
    ],
)
def test_what_training_never_writes_ends_in_one_line(tmp_path, key, value, said):
    with pytest.raises(SystemExit) as stop:
        read(tmp_path, json.dumps(changed(GOOD, {key: value})))
    message = stop.value.code
    assert message.startswith("error: ") and said in message and "\n" not in message


def test_a_number_too_large_for_a_float(tmp_path):
    with pytest.raises(SystemExit, match="'softmax_n' holds 'inf'"):
        read(tmp_path, json.dumps(GOOD).replace('"softmax_n": 1.0', '"softmax_n": 1e999'))


def test_a_diverged_run_needs_no_model_and_a_duplicate_is_named(tmp_path):
    for name, results in (("esperberto-softmax0", diverged(0, 42).results), ("esperberto-softmax0-again", None)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results or diverged(0, 42).results))
    runs = find_runs([], tmp_path, tmp_path / "models")
    assert [run.diverged for run in runs] == [True, True]
    with pytest.raises(SystemExit) as stop:
        refuse_duplicates(runs)
    assert f"{tmp_path}/esperberto-softmax0.json" in stop.value.code
    assert f"{tmp_path}/esperberto-softmax0-again.json" in stop.value.code


@pytest.mark.parametrize(
    ("n", "name"),
    [(0, "softmax0"), (1.0, "softmax1"), (0.5, "softmax0.5"), (1.0000001, "softmax1.0000001"), (1e-30, "softmax1e-30"),
     (-0.0, "softmax0"), (1234567, "softmax1234567")],
)  # fmt: skip
def test_different_n_never_share_a_name(n, name):
    assert arm_name(n) == name
    assert run_name(n, 42) == f"esperberto-{name}" and run_name(n, 43) == f"esperberto-{name}-seed43"


def test_models_in_folders_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    for name in ("a/final", "b/final"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert labelled(["a/final", "./b/final/"]) == ["a--final", "b--final"]
    assert labelled(["a/final", "you/final", "you/other"]) == ["a--final", "you--final", "other"]
    with pytest.raises(SystemExit, match=r"a/final and \./a/final have the same name"):
        labelled(["a/final", "./a/final"])
    monkeypatch.chdir("a/final")
    assert labelled([".", "../../b", "you/bert"]) == ["final", "b", "bert"]


def test_ranges_of_seeds():
    assert ranges([48, 43, 44, 45, 50, 51, 45]) == "43 to 45, 48, 50, 51" and ranges([]) == ""
