"""The runs that an analysis compares: what training wrote about each, and what we measured on its model."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiment import arm_name, arm_order
from outliers import PLACES
from record import look_up
from softmax1 import LEARNED

COUNT, AMOUNT, NUMBER = "a whole number from 0 on", "a number from 0 on", "a number or null"
ARM = f"a number from 0 on, or {LEARNED!r}"
RESULTS = {  # what we read of a results file: dotted key -> kind
    "softmax_n": ARM,
    "seed": COUNT,
    "effective_batch_size": COUNT,
    "hardware.count": COUNT,
    "dataset.train_samples": COUNT,
    "training.steps": COUNT,
    "training.samples": COUNT,
    "training.wall_seconds": AMOUNT,
    "training.cost_usd": NUMBER,
    "training.loss_mean": NUMBER,
    "validation.loss": NUMBER,
    "validation.perplexity": NUMBER,
    "hardware.device": str,
    "hardware.name": str,
    "dataset.sha256": str,
    "tokenizer.sha256": str,
    "dataset.sources": list,
    "loss_history": list,
    "validation_loss_history": list,
    "weight_excess_kurtosis": dict,
    "activation_excess_kurtosis": dict,
    "emergence": list,
    "emergence_texts": COUNT,
    "settings": dict,
    "test_pipeline": bool,
}
# Keys that a results file may lack.
OPTIONAL = {
    "validation.unigram_loss": NUMBER,
    "validation.context_free_loss": NUMBER,
    "status": str,
    "diverged": dict,
    "diverged.step": COUNT,
    "log_n": dict,
}
STATUS = ("complete", "diverged")
BINS = np.linspace(-20, 20, 161)  # of the histograms, in standard deviations; what lies beyond is in the outermost ones
MEASURED_DIR = "measured"  # in the folder of the results: what was measured of each run, for the next analysis


@dataclass(eq=False)  # two runs are never equal, whatever was measured of them
class Run:
    """One model, what training wrote about it, and what we measured on it (DEFINITIONS.md has the statistics)."""

    name: str
    model: str  # folder or Hub name
    results: dict | None  # results/<name>.json; None where there is none
    weights: dict[str, dict[str, float]] = field(default_factory=dict)  # by parameter
    places: dict[str, dict] = field(default_factory=dict)  # of the activations, on held-out text
    attention: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by layer: a list over its heads
    attention_uniform: dict = field(default_factory=dict)  # of attention that tells no key from another
    untrained: dict = field(default_factory=dict)  # {"places", "attention"} before the first update, where known
    interventions: dict = field(default_factory=dict)  # by intervention
    damage: dict = field(default_factory=dict)  # by quantization
    maps: list = field(default_factory=list)  # attention maps, for the picture
    histograms: dict = field(default_factory=dict)  # of the FFN output by layer, for the picture
    max_length: int = 0  # tokens at which texts were cut
    tokens: int = 0  # real ones in the held-out text, by this model's tokenizer
    file: Path | None = None  # where the results were read
    digest: str | None = None  # SHA-256 of the weights that were measured
    made_with: dict = field(default_factory=dict)  # texts, settings, code and packages it was measured with
    measured_at: dict = field(default_factory=dict)  # record.git_state() of the checkout it was measured in

    @property
    def arm(self) -> str:
        """softmax0, softmax1, ..., clipped, gated; a model without results file is an arm by itself."""
        return arm_name(*self._design) if self.results else self.name

    @property
    def arm_order(self) -> tuple:
        """The sort key of the arms of runs with results."""
        return arm_order(*self._design)

    @property
    def _design(self) -> tuple:
        return self.results["softmax_n"], self.results.get("settings", {}).get("control")

    @property
    def diverged(self) -> bool:
        """Whether training ended without a model, because the loss became NaN or infinite: nothing is measured."""
        return bool(self.results) and self.results.get("status") == "diverged"

    @property
    def title(self) -> str:
        """The name, with "(diverged)" behind it where the run diverged."""
        return f"{self.name} (diverged)" if self.diverged else self.name

    @property
    def training(self) -> dict[str, float | None]:
        """Excess kurtosis by module as training recorded it; empty where there is no results file."""
        return self.results["activation_excess_kurtosis"] if self.results else {}

    @property
    def weight_kurtosis(self) -> dict[str, float]:
        """Excess kurtosis by parameter."""
        return {name: values["kurtosis"] for name, values in self.weights.items()}

    @property
    def held_out(self) -> dict[str, float]:
        """Excess kurtosis of a sequence by the names of the modules that the published tables have."""
        kurtosis = {}
        for place, values in self.places.items():
            layer, dot, place = place.rpartition(".")
            if place in PLACES and PLACES[place].side == "output":
                for module in (PLACES[place].module, *PLACES[place].same):
                    kurtosis[f"{layer}{dot}{module}"] = values["kurtosis_sequence"]
        return kurtosis


def arms(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of every arm, in order."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    return by_arm


# ------------------------------------------------------------------------------------------------ what training wrote


def read_results(path: Path) -> dict:
    """The results file of one run, checked: exits with one line where a key is missing or of another kind."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        sys.exit(f"error: {path} is not valid JSON ({error}); train that run again or move the file away")
    expected = dict(RESULTS)
    for key, kind in OPTIONAL.items():
        if has(results, key):
            expected[key] = kind
    for key, kind in expected.items():
        try:
            value = look_up(results, key)
        except KeyError:
            sys.exit(f"error: {path} has no {key!r}: not a results file of train_model.py; train again or move it away")
        if not (isinstance(value, kind) if isinstance(kind, type) else _is(kind, value)):
            wanted = "" if isinstance(kind, type) else f" (it is {kind})"
            sys.exit(
                f"error: {path}: {key!r} holds {str(value)[:60]!r}, which train_model.py never writes there{wanted}"
            )
        if isinstance(value, (list, dict)) and not _numbers(key, value):
            sys.exit(f"error: {path}: {key!r} holds something other than numbers and null")
    status = results.get("status", "complete")
    if status not in STATUS or (status == "diverged" and not has(results, "diverged.step")):
        sys.exit(f"error: {path}: the status {str(status)[:60]!r} is none, or has no 'diverged.step'")
    return results


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


def has(results, key: str) -> bool:
    """Whether the results hold a value at a dotted key; null counts as none."""
    return look_up(results, key, None) is not None


def _is(kind: str, value) -> bool:
    """Whether a value of a results file is of a kind. A bool is an int in Python, but not a number here."""
    if kind == ARM and value == LEARNED:
        return True
    if value is None:
        return kind == NUMBER
    if isinstance(value, bool) or not isinstance(value, int if kind == COUNT else (int, float)):
        return False
    try:
        return math.isfinite(value) and (kind == NUMBER or value >= 0)
    except OverflowError:  # a whole number beyond float64
        return False


def _numbers(key: str, value: list | dict) -> bool:
    """Whether the lists and tables at the keys that hold numbers contain numbers only; True for other keys."""
    if key.endswith("_history"):
        return all(isinstance(pair, list) and len(pair) == 2 and all(_is(NUMBER, x) for x in pair) for pair in value)
    if key.endswith("_kurtosis"):
        return all(_is(NUMBER, number) for number in value.values())
    if key == "log_n":
        return all(isinstance(heads, list) and all(_is(NUMBER, x) for x in heads) for heads in value.values())
    if key == "emergence":
        return all(
            isinstance(entry, dict) and _is(COUNT, entry.get("step")) and all(_is(NUMBER, x) for x in entry.values())
            for entry in value
        )
    return True


def refuse_missing(model: str) -> None:
    """Exit with one line where `model` is no folder and cannot be the name of a model on the Hub."""
    if not Path(model or "-").is_dir() and (os.path.lexists(model) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)):
        what = ": that is a file, or a link that leads nowhere" if os.path.lexists(model) else ""
        sys.exit(f"error: no model folder {model}{what}")


def unused_layer(loading: dict) -> str | None:
    """A parameter of a layer that the model of `from_pretrained(output_loading_info=True)` lacks; None without one."""
    return min((key for key in loading["unexpected_keys"] if re.search(r"\blayer\.\d+\.", key)), default=None)


def folder_name(model: str) -> str:
    """The last part of a model folder, `.` and `..` resolved, or of a Hub name."""
    return Path(os.path.abspath(model) if Path(model).is_dir() else model).name or "model"


def labelled(models: list[str]) -> list[str]:
    """A name for the files of each model: the name of its folder, or its whole path where several folders share it.

    The name has no slash, so that it can be the name of a file. Exits with one line where two models have the same.
    """
    names = [folder_name(model) for model in models]
    labels = [
        "--".join(part for part in Path(model).parts if part not in "/.") if names.count(name) > 1 else name
        for model, name in zip(models, names, strict=True)
    ]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            sys.exit(f"error: {models[labels.index(label)]} and {models[i]} have the same name: name each model once")
    return labels


def find_runs(models: list[str], results_dir: Path, models_dir: Path) -> list[Run]:
    """The models named, or else every results file with its model folder, ordered by arm and seed.

    A run that diverged has no model folder, and a run that was measured before needs none.
    """
    if models:
        runs = []
        for label, model in zip(labelled(models), models, strict=True):
            file = results_dir / f"{folder_name(model)}.json"
            results = read_results(file) if file.is_file() else None
            runs.append(Run(label, model, results, file=file if results else None))
        return runs
    files = sorted(results_dir.glob("esperberto-*.json"))
    if not files:
        sys.exit(f"error: no results in {results_dir}/: run train_model.py first, or name a model folder or Hub model")
    runs = [Run(path.stem, str(models_dir / path.stem), read_results(path), file=path) for path in files]
    for run in runs:
        measured = results_dir / MEASURED_DIR / f"{run.name}.json"
        if not run.diverged and not Path(run.model).is_dir() and not measured.is_file():
            sys.exit(f"error: {run.file} has no model folder {run.model}: set --models_dir, or move the file away")
    return sorted(runs, key=lambda run: (*run.arm_order, run.results["seed"]))
