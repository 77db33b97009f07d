"""The runs that an analysis compares: the results file of each, and what was measured on its model."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiment import arm_name, arm_order
from outliers import PLACES
from record import look_up
from softmax1 import LEARNED


class Kind(NamedTuple):
    """A kind of value in a results file."""

    words: str  # completes "train_model.py writes ... there"
    holds: Callable  # whether a value is of this kind


def _is_number(value, types: tuple[type[float], ...] = (int, float)) -> bool:
    """Whether a value is a finite number. A bool is an int in Python, but not a number here."""
    try:
        return isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _each(value, type_: type[list] | type[dict], holds: Callable) -> bool:
    """Whether a value is a list or a dict, and all that it contains is of a kind."""
    return isinstance(value, type_) and all(map(holds, value.values() if type_ is dict else value))


COUNT = Kind("a whole number from 0 on", lambda value: _is_number(value, (int,)) and value >= 0)
AMOUNT = Kind("a number from 0 on", lambda value: _is_number(value) and value >= 0)
NUMBER = Kind("a number or null", lambda value: value is None or _is_number(value))
ARM = Kind(f"a number from 0 on, or {LEARNED!r},", lambda value: value == LEARNED or AMOUNT.holds(value))
TEXT = Kind("a text", lambda value: isinstance(value, str))
YES_NO = Kind("true or false", lambda value: isinstance(value, bool))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
STATUS = Kind("'complete' or 'diverged'", lambda value: value in ("complete", "diverged"))
NUMBERS = Kind("an object of numbers", lambda value: _each(value, dict, NUMBER.holds))
HEADS = Kind("lists of numbers", lambda value: _each(value, dict, lambda heads: _each(heads, list, NUMBER.holds)))
PAIR = Kind("two numbers", lambda value: _each(value, list, NUMBER.holds) and len(value) == 2)
HISTORY = Kind("pairs of numbers", lambda value: _each(value, list, PAIR.holds))
WATCHED = Kind("numbers and a step", lambda value: NUMBERS.holds(value) and COUNT.holds(value.get("step")))
EMERGENCE = Kind("objects of numbers with a step", lambda value: _each(value, list, WATCHED.holds))
_KEYS = {  # what we read of every results file: kind -> dotted keys
    ARM: "softmax_n",
    COUNT: "seed effective_batch_size emergence_texts hardware.count dataset.train_samples training.steps"
    " training.samples",
    AMOUNT: "training.wall_seconds",
    NUMBER: "training.cost_usd training.loss_mean validation.loss validation.perplexity",
    TEXT: "hardware.device hardware.name dataset.sha256 tokenizer.sha256",
    YES_NO: "test_pipeline",
    LIST: "dataset.sources",
    OBJECT: "settings",
    NUMBERS: "weight_excess_kurtosis activation_excess_kurtosis",
    HISTORY: "loss_history validation_loss_history",
    EMERGENCE: "emergence",
}
RESULTS = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}
# Keys that a results file may lack, or that hold null.
OPTIONAL = {
    "validation.unigram_loss": NUMBER,
    "validation.context_free_loss": NUMBER,
    "status": STATUS,
    "diverged": OBJECT,
    "diverged.step": COUNT,
    "log_n": HEADS,
    "versions": OBJECT,
}
BINS = np.linspace(-20, 20, 161)  # edges of the histograms, in standard deviations; the outermost bins count the rest
FEW_RUNS = 6  # so many can be named in a sentence, and their columns can be read side by side
MEASURED_DIR = "measured"  # inside the folder of the results: the measurements of each run, for later analyses


@dataclass(eq=False)  # runs are compared by identity, and can be keys of a dict
class Run:
    """A model, the results of its training, and our measurements of it (DEFINITIONS.md defines the statistics)."""

    name: str
    model: str  # folder or Hub name
    results: dict | None  # results/<name>.json; None where there is none
    weights: dict[str, dict[str, float]] = field(default_factory=dict)  # by parameter
    places: dict[str, dict] = field(default_factory=dict)  # of the activations, on held-out text
    attention: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by layer: a list over its heads
    attention_uniform: dict = field(default_factory=dict)  # the same figures of uniform attention
    untrained: dict = field(default_factory=dict)  # {"places", "attention"} before the first update, where known
    interventions: dict = field(default_factory=dict)  # by intervention
    damage: dict = field(default_factory=dict)  # by quantization
    maps: list = field(default_factory=list)  # attention maps, for the picture
    histograms: dict = field(default_factory=dict)  # of the FFN output by layer, for the picture
    max_length: int = 0  # tokens at which texts were cut
    tokens: int = 0  # real ones in the held-out text, by this model's tokenizer
    file: Path | None = None  # where the results were read
    digest: str | None = None  # SHA-256 of the weights that were measured
    made_with: dict = field(default_factory=dict)  # texts, settings, code and packages of the measurement
    measured_at: dict = field(default_factory=dict)  # record.git_state() of the measurement's checkout

    @property
    def arm(self) -> str:
        """softmax0, softmax1, ..., clipped, gated; a model without a results file is an arm by itself."""
        return arm_name(*self._design) if self.results else self.name

    @property
    def arm_order(self) -> tuple:
        """The key by which arms are sorted; only for runs with results."""
        return arm_order(*self._design)

    @property
    def _design(self) -> tuple:
        return self.results["softmax_n"], self.results["settings"].get("control")

    @property
    def diverged(self) -> bool:
        """Whether training stopped because the loss became NaN or infinite: there is no model to measure."""
        return bool(self.results) and self.results.get("status") == "diverged"

    @property
    def ending(self) -> str:
        """How training ended; a dash where there is no results file."""
        if self.diverged:
            return f"diverged at step {self.results['diverged']['step']:,}"
        return "complete" if self.results else "–"

    @property
    def title(self) -> str:
        """The name, followed by "(diverged)" if the run diverged."""
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
        """Excess kurtosis of a sequence on held-out text, by the module names of the published tables."""
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


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in ascending order: 43 to 47, 49, 50."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{of[0]} to {of[-1]}" if len(of) > 2 else ", ".join(map(str, of)) for of in parts)


def named(runs: list[Run]) -> str:
    """The names of a few runs; of more, every arm with its seeds."""
    if len(runs) <= FEW_RUNS:
        return ", ".join(run.name for run in runs)
    seeds = {arm: [run.results["seed"] for run in of_arm if run.results] for arm, of_arm in arms(runs).items()}
    return ", ".join(f"{arm} (seed{'s' * (len(of) > 1)} {ranges(of)})" if of else arm for arm, of in seeds.items())


# ------------------------------------------------------------------------------------------------ what training wrote


def read_results(path: Path) -> dict:
    """The results file of a run. Exits with one line if a key is missing or holds a value of another kind."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        sys.exit(f"error: {path} is not valid JSON ({error}); train that run again or move the file away")
    optional = {key: kind for key, kind in OPTIONAL.items() if look_up(results, key, None) is not None}
    for key, kind in (RESULTS | optional).items():
        try:
            value = look_up(results, key)
        except KeyError:
            sys.exit(f"error: {path} has no {key!r}: not a results file of train_model.py; train again or move it away")
        if not kind.holds(value):
            sys.exit(
                f"error: {path}: {key!r} holds {str(value)[:60]!r}, but train_model.py writes {kind.words} there: "
                "train again or move the file away"
            )
    if results.get("status") == "diverged" and "diverged.step" not in optional:
        sys.exit(f"error: {path}: the status is 'diverged', but it has no 'diverged.step': move the file away")
    return results


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


def refuse_missing(model: str) -> None:
    """Exit with one line if `model` is not a folder and cannot be the name of a model on the Hub."""
    if not Path(model or "-").is_dir() and (os.path.lexists(model) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)):
        what = ": that is a file, or a link that leads nowhere" if os.path.lexists(model) else ""
        sys.exit(f"error: no model folder {model}{what}")


def unused_layer(loading: dict) -> str | None:
    """The first saved parameter of a layer that the loaded model does not have; None if there is none.

    Args:
        loading: what `from_pretrained(output_loading_info=True)` returned besides the model.
    """
    return min((key for key in loading["unexpected_keys"] if re.search(r"\blayer\.\d+\.", key)), default=None)


def folder_name(model: str) -> str:
    """The last part of the path of a model folder, with `.` and `..` resolved, or of a Hub name."""
    return Path(os.path.abspath(model) if Path(model).is_dir() else model).name or "model"


def labelled(models: list[str]) -> list[str]:
    """A name for the files of each model: the name of its folder, or its whole path if several folders share that name.

    A slash becomes "--", so that the name can be that of a file. Exits with one line if two models get the same name.
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
    """The named models, or, if none is named, the runs of all results files, ordered by arm and seed.

    Exits with one line if a run needs a model folder and has none: it did not diverge and was not measured before.
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
