"""The runs that an analysis compares: what training wrote about each, and what we measured on its model."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

RESULTS = {  # what we read of a results file, by type
    int: (
        "seed",
        "effective_batch_size",
        "hardware.count",
        "dataset.train_samples",
        "training.steps",
        "training.samples",
    ),
    (int, float): ("softmax_n", "training.wall_seconds"),
    (int, float, type(None)): ("training.cost_usd", "training.loss_mean", "validation.loss", "validation.perplexity"),
    str: ("hardware.device", "hardware.name", "dataset.sha256", "tokenizer.sha256"),
    list: ("dataset.sources", "loss_history", "validation_loss_history"),
    dict: ("weight_excess_kurtosis", "activation_excess_kurtosis"),
    bool: ("test_pipeline",),
}
OPTIONAL = {
    "emergence": list,
    "emergence_texts": int,
}  # what a results file may lack, having been written before there was such a thing
PAIRED = {  # runs compare only where these agree
    "dataset.sha256": "training text",
    "tokenizer.sha256": "tokenizer",
    "training.steps": "steps",
    "effective_batch_size": "effective batch size",
    "seed": "seed",
    "test_pipeline": "--test_pipeline",
    "dtype": "number format",
    "settings.learning_rate": "learning rate",
    "settings.weight_decay": "weight decay",
    "settings.max_length": "maximum length",
}


@dataclass
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
    tokens: int = 0  # real ones in the held-out text, by this model's tokenizer

    @property
    def arm(self) -> str:
        """softmax0, softmax1, ...; a model without results file is an arm by itself."""
        return f"softmax{self.results['softmax_n']:g}" if self.results else self.name

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
        found = {}
        for place, values in self.places.items():
            layer, dot, place = place.rpartition(".")
            for module in MODULES.get(place, ()):
                found[f"{layer}{dot}{module}"] = values["kurtosis_sequence"]
        return found


# The module of the published tables that a place is. In eval mode dropout is the identity.
MODULES = {
    "attention_output": ("attention.output.dense", "attention.output.dropout"),
    "attention_layernorm": ("attention.output",),
    "ffn_output": ("output.dense",),
    "ffn_layernorm": ("output",),
}


def arms(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of every arm, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def setting(run: Run, key: str):
    """A setting that runs must share to be compared; None where the results file does not tell it."""
    try:
        return look_up(run.results, key)
    except KeyError:
        return None


def paired(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """{arm: {seed: run}} of the runs that may be compared: those that agree in everything but n and seed.

    Where several such sets are here, the one with most runs, then the one with most steps.
    """

    def settings(run: Run) -> tuple:
        return tuple(setting(run, key) for key in PAIRED if key != "seed")

    trained = [run for run in runs if run.results]
    sets = Counter(map(settings, trained))
    best = max(trained, key=lambda run: (sets[settings(run)], setting(run, "training.steps")), default=None)
    found: dict[str, dict[int, Run]] = {}
    for run in trained:
        if settings(run) == settings(best):
            found.setdefault(run.arm, {})[run.results["seed"]] = run
    return found


# ------------------------------------------------------------------------------------------------ what training wrote


def look_up(results: dict, key: str):
    """The value at a dotted key. Raises KeyError where it is missing."""
    value = results
    for part in key.split("."):
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[part]
    return value


def read_results(path: Path) -> dict:
    """The results file of one run, checked: exits with one line where a key is missing or of another kind."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"error: {path} is not valid JSON ({error}); train that run again or move the file away")
    expected = [(types, key) for types, keys in RESULTS.items() for key in keys]
    expected += [(types, key) for key, types in OPTIONAL.items() if isinstance(results, dict) and key in results]
    for types, key in expected:
        try:
            value = look_up(results, key)
        except KeyError:
            sys.exit(f"error: {path} has no {key!r}: not a results file of train_model.py; train again or move it away")
        if not isinstance(value, types):
            sys.exit(f"error: {path}: {key!r} holds {str(value)[:60]!r}, which train_model.py never writes there")
        try:
            if key.endswith("_history"):
                np.array(value, dtype=float).reshape(-1, 2)
            elif key.endswith("_kurtosis"):
                np.array([*value.values()], dtype=float).reshape(-1)
            elif key == "emergence":
                for entry in value:
                    np.array([entry["step"], *entry.values()], dtype=float)
        except (ValueError, TypeError, KeyError, AttributeError):
            sys.exit(f"error: {path}: {key!r} holds something other than numbers and null")
    return results


def find_runs(models: list[str], results_dir: Path, models_dir: Path) -> list[Run]:
    """The models named, or else every results file with its model folder, ordered by n and seed."""
    if models:
        names = [Path(model).name or model for model in models]
        # Same-named models from two places are told apart by the whole argument.
        labels = [model if names.count(name) > 1 else name for model, name in zip(models, names, strict=True)]
        files = [results_dir / f"{name}.json" for name in names]
        return [
            Run(label, model, read_results(file) if file.is_file() else None)
            for label, model, file in zip(labels, models, files, strict=True)
        ]
    files = sorted(results_dir.glob("esperberto-*.json"))
    if not files:
        sys.exit(f"error: no results in {results_dir}/: run train_model.py first, or name a model folder or Hub model")
    runs = [Run(path.stem, str(models_dir / path.stem), read_results(path)) for path in files]
    for run, path in zip(runs, files, strict=True):
        if not Path(run.model).is_dir():
            sys.exit(f"error: {path} has no model folder {run.model}: set --models_dir, or move the file away")
    return sorted(runs, key=lambda run: (run.results["softmax_n"], run.results["seed"]))


def by_layer(kurtosis: dict[str, float | None], suffix: str) -> np.ndarray:
    """The values named `...layer.<i>.<suffix>`, in the order of the layers; NaN where a layer has none."""
    pattern = re.compile(rf"\blayer\.(\d+)\.{re.escape(suffix)}$")
    layers = {int(match[1]): value for name, value in kurtosis.items() if (match := pattern.search(name))}
    return np.array([layers[layer] for layer in sorted(layers)], dtype=float)  # turns None into NaN


def notes(runs: list[Run], data_dir: Path) -> list[str]:
    """What a reader has to know before comparing the columns."""
    lines = []
    trained = [run for run in runs if run.results]
    if smoke := [run.name for run in trained if run.results["test_pipeline"]]:
        lines.append(f"These tables show only that the pipeline works: --test_pipeline made {', '.join(smoke)}.")
    for key, label in PAIRED.items():
        values = {run.name: str(setting(run, key))[:12] for run in trained}
        if key != "seed" and len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            lines.append(f"The runs differ in {label} ({listed}): only those that agree are compared.")
    seeds = [set(found) for found in paired(runs).values()]
    if len(seeds) > 1 and (alone := set.union(*seeds) - set.intersection(*seeds)):
        listed = ", ".join(map(str, sorted(alone)))
        lines.append(f"Not every arm has seed {listed}: only seeds that two arms share are compared.")
    train_sha = train_text(data_dir)
    for run in trained:
        if train_sha and train_sha != run.results["dataset"]["sha256"]:
            lines.append(f"{run.name} was not trained on {data_dir}, whose held-out text it may have seen in training.")
        theirs = run.results["weight_excess_kurtosis"]
        pairs = np.array([(value["kurtosis"], theirs.get(name)) for name, value in run.weights.items()], dtype=float)
        # Both are float64 sums over the same float32 numbers: 1e-6 is far above rounding, far below another model.
        if theirs.keys() != run.weights.keys() or not np.allclose(*pairs.T, rtol=1e-6, atol=1e-6, equal_nan=True):
            lines.append(
                f"{run.name}: results file and {run.model} do not belong together: their weight kurtosis differs."
            )
    return lines


def train_text(data_dir: Path) -> str | None:
    """SHA-256 of the training split that build_dataset.py wrote down; None where there is no manifest."""
    try:
        return json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))["splits"]["train"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
