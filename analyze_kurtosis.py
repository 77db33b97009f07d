"""Kurtosis of weights and activations of the trained models, beside the published figures: tables and plots.

    python analyze_kurtosis.py                       # every run that train_model.py finished
    python analyze_kurtosis.py FOLDER HUB/NAME ...   # these models instead

Reads   results/<run>.json, models/<run>/ (or the models named), the validation split of data/
Writes  results/report.md, results/analysis.json, results/loss.png, results/kurtosis.png

Everything here is excess kurtosis, mean((x - mean)^4) / variance^2 - 3: a Gaussian has 0. Of weights, over all entries
of one parameter of the saved model. Of activations, per sequence, its tokens and channels pooled, then the mean over
the sequences; twice: as training recorded it (train mode: dropout is on and padding counts, as published), and of the
final model on held-out text (eval mode, padding left out).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub
import matplotlib
import numpy as np
import scipy.stats
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import softmax1  # noqa: F401  (registers RoBERTa with softmax_n, so that from_pretrained below knows it)
from outliers import ActivationKurtosis

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MAX_LENGTH = 512  # tokens; longer texts are cut, as in training

# The published figures (EsperBERTo, 2023): 285,899 steps of 16 sentences, one seed, softmax0 then softmax1. The mean
# and the population standard deviation over its 6 layers; activations in train mode, padding included.
PUBLISHED = ("published softmax0", "published softmax1")
PUBLISHED_LAYERS = 6
SUMMARY = [  # (label, published softmax0, published softmax1, what training wrote -> our cell)
    ("softmax_n", "0", "1", lambda results: f"{results['softmax_n']:g}"),
    ("seed", "42", "42", lambda results: str(results["seed"])),
    ("steps", "285,899", "285,899", lambda results: f"{results['training']['steps']:,}"),
    ("samples seen", "4.57 M", "4.57 M", lambda results: f"{results['training']['samples']:,}"),
    # Its logs: the mean of all steps, and the last logged window of 1,000 steps. It had no held-out text.
    ("training loss, mean of the whole run", "4.46", "4.44", lambda results: number(results["training"]["loss_mean"])),
    (
        "training loss, last logged",
        "3.79",
        "3.78",
        lambda results: number((results["loss_history"] or [[0, None]])[-1][1]),
    ),
    ("held-out loss", "–", "–", lambda results: number(results["validation"]["loss"])),
    ("held-out perplexity", "–", "–", lambda results: number(results["validation"]["perplexity"])),
    ("runtime", "9 h 16 m", "9 h 16 m", lambda results: duration(results["training"]["wall_seconds"])),
    # At 1.212 USD an hour.
    ("cost, USD", "11.22", "11.24", lambda results: number(results["training"]["cost_usd"])),
    ("hardware", "1 × NVIDIA A10G", "1 × NVIDIA A10G", lambda results: hardware(results)),
]
WEIGHTS = [  # (label, name behind `layer.<i>.`, published softmax0, published softmax1)
    ("dense weight", "attention.output.dense.weight", "0.031 ± 0.021", "0.040 ± 0.027"),
    ("dense bias", "attention.output.dense.bias", "0.6 ± 1.1", "1.4 ± 1.4"),
    ("LayerNorm weight", "attention.output.LayerNorm.weight", "6.8 ± 3.9", "4.4 ± 2.9"),
    ("LayerNorm bias", "attention.output.LayerNorm.bias", "0.5 ± 0.8", "1.9 ± 2.3"),
]
ACTIVATIONS = [
    ("dense", "attention.output.dense", "0.74 ± 0.29", "1.96 ± 1.58"),
    ("dropout", "attention.output.dropout", "1.15 ± 0.32", "2.51 ± 1.76"),
    ("output (LayerNorm)", "attention.output", "0.77 ± 1.35", "0.90 ± 1.31"),
]
# The FFN output by layer, which the published table leaves out but its result files hold.
FFN = "output.dense"
PUBLISHED_FFN = [[6.0, 8.3, 20.6, 78.3, 100.1, 4.5], [26.0, 10.7, 11.4, 7.3, 0.3, 0.7]]

PANELS = [  # of kurtosis.png: (title, name behind `layer.<i>.`)
    ("attention.output.dense", "attention.output.dense"),
    ("attention.output (LayerNorm)", "attention.output"),
    ("output.dense (FFN output)", FFN),
    ("output (LayerNorm)", "output"),
]

# Runs compare only where these agree.
PAIRED = {
    "dataset.sha256": "training text",
    "tokenizer.sha256": "tokenizer",
    "training.steps": "steps",
    "effective_batch_size": "effective batch size",
    "seed": "seed",
    "test_pipeline": "--test_pipeline",
}


@dataclass
class Run:
    """One model, what training wrote about it, and what we measured on it."""

    name: str
    model: str  # folder or Hub name
    results: dict | None  # results/<name>.json; None where there is none
    weights: dict[str, float | None] = field(default_factory=dict)
    activations: dict[str, float | None] = field(default_factory=dict)
    tokens: int = 0  # real ones in the held-out text, by this model's tokenizer


# ------------------------------------------------------------------------------------------------ what training wrote


NUMBER = (int, float)
RESULTS = {  # what we read of a results file, and what it has to be
    "softmax_n": NUMBER,
    "seed": NUMBER,
    "test_pipeline": bool,
    "effective_batch_size": NUMBER,
    "hardware.name": str,
    "hardware.count": NUMBER,
    "dataset.sources": list,
    "dataset.train_samples": NUMBER,
    "dataset.sha256": str,
    "tokenizer.sha256": str,
    "training.steps": NUMBER,
    "training.samples": NUMBER,
    "training.wall_seconds": NUMBER,
    "training.cost_usd": (*NUMBER, type(None)),
    "training.loss_mean": (*NUMBER, type(None)),
    "loss_history": list,
    "validation_loss_history": list,
    "validation.loss": (*NUMBER, type(None)),
    "validation.perplexity": (*NUMBER, type(None)),
    "weight_excess_kurtosis": dict,
    "activation_excess_kurtosis": dict,
}


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
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)  # NaN is null
    except ValueError as error:
        sys.exit(f"error: {path} is not valid JSON ({error}); train that run again or move the file away")
    for key, types in RESULTS.items():
        try:
            value = look_up(results, key)
        except KeyError:
            sys.exit(f"error: {path} has no {key!r}: not a results file of train_model.py; train again or move it away")
        if not isinstance(value, types):
            sys.exit(f"error: {path}: {key!r} holds {str(value)[:60]!r}, which train_model.py never writes there")
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
    files = sorted(path for path in results_dir.glob("*.json") if path.name != "analysis.json")
    if not files:
        sys.exit(f"error: no results in {results_dir}/: run train_model.py first, or name a model folder or Hub model")
    runs = [Run(path.stem, str(models_dir / path.stem), read_results(path)) for path in files]
    for run, path in zip(runs, files, strict=True):
        if not Path(run.model).is_dir():
            sys.exit(f"error: {path} has no model folder {run.model}: set --models_dir, or move the file away")
    return sorted(runs, key=lambda run: (run.results["softmax_n"], run.results["seed"]))


# ----------------------------------------------------------------------------------------------------- what we measure


def held_out_texts(data_dir: Path, max_samples: int) -> list[str]:
    """The first texts of the validation split that build_dataset.py wrote."""
    try:
        validation = datasets.load_from_disk(str(data_dir))["validation"]
        texts = validation[:max_samples]["text"]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"error: no texts in the validation split of {data_dir} ({reason}): run build_dataset.py first")
    if not texts:
        sys.exit(f"error: the validation split of {data_dir} is empty: build it with a larger --validation_fraction")
    return texts


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub name; exits with one line where either is missing or damaged."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        sys.exit(f"error: no model folder {name}")
    try:
        model, loading = AutoModelForMaskedLM.from_pretrained(
            name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        kind = "a damaged model folder" if Path(name).is_dir() else "neither a folder here nor loadable from the Hub"
        sys.exit(f"error: {name} is {kind}: {reason}")
    if loading["missing_keys"]:
        sys.exit(f"error: {name} is not a complete masked language model: it lacks {sorted(loading['missing_keys'])}")
    # A folder without tokenizer files loads as a tokenizer that knows its special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        sys.exit(f"error: {name} has no tokenizer: copy the one it was trained with into the folder")
    if len(tokenizer) > model.config.vocab_size:
        sys.exit(f"error: {name}: its tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    if not by_layer(dict(model.named_modules()), ACTIVATIONS[0][1]):
        sys.exit(f"error: {name} ({model.config.model_type}) has no layer.<i>.{ACTIVATIONS[0][1]}: not BERT-shaped")
    return model, tokenizer


def weight_kurtosis(model: PreTrainedModel) -> dict[str, float | None]:
    """Excess kurtosis of every parameter, all entries pooled, in float64; None where they are all equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, about parameters that are constant
        return {
            name: finite(scipy.stats.kurtosis(parameter.detach().numpy().ravel().astype(np.float64)))
            for name, parameter in model.named_parameters()
        }


@torch.inference_mode()
def activation_kurtosis(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int, label: str
) -> tuple[dict[str, float | None], int]:
    """Mean over the texts of every module's excess kurtosis, in eval mode and without padding; and the real tokens.

    The encoder alone runs: the masked-LM head is half of the work and in none of the tables.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.eval().to(device)
    texts = sorted(texts, key=len)  # so that little is padded
    length = min(MAX_LENGTH, tokenizer.model_max_length)
    tokens = 0
    with ActivationKurtosis(model) as kurtosis:
        for start in tqdm(range(0, len(texts), batch_size), desc=label, unit="batch"):
            chunk = texts[start : start + batch_size]
            batch = tokenizer(chunk, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
            kurtosis.mask = batch["attention_mask"]
            tokens += int(kurtosis.mask.sum())
            model.base_model(**batch)
    return {name: finite(value) for name, value in kurtosis.result().items()}, tokens


def measure(run: Run, texts: list[str], batch_size: int) -> None:
    model, tokenizer = load(run.model)
    run.weights = weight_kurtosis(model)
    run.activations, run.tokens = activation_kurtosis(model, tokenizer, texts, batch_size, run.name)


def finite(value: float) -> float | None:
    """JSON has no NaN: None stands for it from here on."""
    return float(value) if math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------------------- tables


def by_layer(named: dict, suffix: str) -> list:
    """The values named `...layer.<i>.<suffix>`, in the order of the layers."""
    pattern = re.compile(rf"(?:.*\.)?layer\.(\d+)\.{re.escape(suffix)}")
    layers = {int(match[1]): value for name, value in named.items() if (match := pattern.fullmatch(name))}
    return [layers[layer] for layer in sorted(layers)]


def number(value: float | None, decimals: int = 2) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} m {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} m"


def hardware(results: dict) -> str:
    return f"{results['hardware']['count']} × {results['hardware']['name']}"


def mean_and_deviation(values: list[float | None]) -> tuple[float, float] | None:
    """Mean and population standard deviation over the layers; None where a layer has no value."""
    if not values or None in values:
        return None
    return statistics.fmean(values), statistics.pstdev(values)


def plus_minus(values: list[float | None]) -> str:
    """`mean ± population standard deviation`, with a third decimal where both are small, as published."""
    if (spread := mean_and_deviation(values)) is None:
        return "–"
    decimals = 3 if max(map(abs, spread)) < 0.1 else 2
    return " ± ".join(number(value, decimals) for value in spread)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recorded(run: Run, key: str) -> dict[str, float | None]:
    """What training recorded under `key`; nothing where there is no results file."""
    return run.results[key] if run.results else {}


def notes(runs: list[Run]) -> list[str]:
    """What a reader has to know before comparing the columns."""
    lines = []
    trained = [run for run in runs if run.results]
    if smoke := [run.name for run in trained if run.results["test_pipeline"]]:
        lines.append(f"The tables show only that the pipeline works: --test_pipeline made {', '.join(smoke)}.")
    for key, label in PAIRED.items():
        values = {run.name: str(look_up(run.results, key))[:12] for run in trained}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            lines.append(f"The runs differ in {label} ({listed}): compare only runs that agree.")
    for run in trained:
        theirs = recorded(run, "weight_excess_kurtosis")
        # Both are float64 sums over the same float32 numbers: 1e-6 is far above rounding, far below another model.
        wrong = [
            name
            for name in theirs.keys() | run.weights.keys()
            if name not in theirs
            or name not in run.weights
            or not np.isclose(*as_nans([theirs[name], run.weights[name]]), rtol=1e-6, atol=1e-6, equal_nan=True)
        ]
        if wrong:
            lines.append(
                f"{run.name}: results file and model {run.model} do not belong together: the weight kurtosis of "
                f"{len(wrong)} of {len(theirs)} parameters is not what training recorded (first: {min(wrong)})."
            )
    return lines


def as_nans(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def describe(runs: list[Run], sequences: int, data_dir: Path) -> dict[str, str]:
    """The sentences that the captions share: which layers, which text, what ± is."""
    layers = sorted({str(len(by_layer(run.activations, FFN))) for run in runs})
    trained = [
        f"{run.name}: {run.results['training']['steps']:,} steps, {run.results['training']['samples']:,} sequences of "
        f"{text_of(run)}"
        for run in runs
        if run.results
    ]
    tokens = ", ".join(f"{run.name} {run.tokens:,}" for run in runs)
    return {
        "spread": f"mean ± population standard deviation over the layers of one run (n = {'/'.join(layers)} layers; "
        f"published: {PUBLISHED_LAYERS}). One seed a column: ± is no interval over seeds.",
        "training": "; ".join(trained) or "no results file",
        "held_out": f"the first {sequences:,} texts of the validation split of {data_dir}, cut at {MAX_LENGTH} tokens "
        f"(real tokens: {tokens})",
    }


def text_of(run: Run) -> str:
    """`a, b, c and 2 more (1,000 samples)`."""
    sources = run.results["dataset"]["sources"]
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return f"{', '.join(sources[:3])}{more} ({run.results['dataset']['train_samples']:,} samples)"


def report(runs: list[Run], warned: list[str], sequences: int, data_dir: Path) -> str:
    """The tables with their captions, as Markdown."""
    say = describe(runs, sequences, data_dir)
    header = [*PUBLISHED, *(run.name for run in runs)]
    summary = [
        [label, *published, *(ours(run.results) if run.results else "–" for run in runs)]
        for label, *published, ours in SUMMARY
    ]
    weights = [
        [label, *published, *(plus_minus(by_layer(run.weights, suffix)) for run in runs)]
        for label, suffix, *published in WEIGHTS
    ]
    activations = [
        [f"{label}, training", *published]
        + [plus_minus(by_layer(recorded(run, "activation_excess_kurtosis"), suffix)) for run in runs]
        for label, suffix, *published in ACTIVATIONS
    ] + [
        [f"{label}, held-out", "–", "–", *(plus_minus(by_layer(run.activations, suffix)) for run in runs)]
        for label, suffix, *_ in ACTIVATIONS
    ]
    ffn = [(f"{name}, training", values) for name, values in zip(PUBLISHED, PUBLISHED_FFN, strict=True)]
    for run in runs:
        ffn.append((f"{run.name}, training", by_layer(recorded(run, "activation_excess_kurtosis"), FFN)))
        ffn.append((f"{run.name}, held-out", by_layer(run.activations, FFN)))
    depth = max(len(values) for _, values in ffn)
    ffn_rows = [
        [label, *(number(value) for value in values), *["–"] * (depth - len(values)), plus_minus(values)]
        for label, values in ffn
    ]
    return "\n\n".join(
        [
            "# Kurtosis report",
            "Excess kurtosis throughout: mean((x - mean)^4) / variance^2 - 3, 0 for a Gaussian (full kurtosis is 3 "
            "higher). Published: EsperBERTo (2023), 285,899 steps of 16 sentences of OSCAR and Leipzig text, one seed.",
            *(f"**Note.** {line}" for line in warned),
            "## Summary",
            table(["", *header], summary),
            f'*Losses in nats per masked token. Trained on: {say["training"]}. "Last logged" is the mean over the '
            "last logging window; held-out loss has fixed masks. n = 1 run a column.*",
            "## Weights of attention.output",
            table(["excess kurtosis", *header], weights),
            f"*Over all entries of one parameter of the saved model, {say['spread']}*",
            "## Activations of attention.output",
            table(["excess kurtosis", *header], activations),
            "*Per sequence, tokens and channels pooled, mean over the sequences of each layer; then "
            f"{say['spread']} Training: train mode (dropout on), padding counted, running mean over all steps "
            f"({say['training']}). Held-out: the final model in eval mode, padding left out, {say['held_out']}. "
            "The dropout row carries no information: with dropout p = 0.1 it is (K + 3) / 0.9 - 3 of the dense row, "
            "and in eval mode dropout is the identity.*",
            "## A lead, not a result: the FFN output, output.dense, by layer",
            table(["excess kurtosis", *(f"layer {i}" for i in range(depth)), "mean ± std"], ffn_rows),
            "*Same definitions as the table above. The published table leaves these out, though the hypothesis points "
            "at the residual stream and the FFN output; the published rows come from its result files. "
            "One seed: a lead, not a result.*",
        ]
    )


# --------------------------------------------------------------------------------------------------------------- plots

# Colours of different lightness and a marker for each run, so that the plots read in grey too.
LOOKS = [("#0B3C7D", "o"), ("#E8850C", "s"), ("#1B7F5C", "^"), ("#C06FA5", "D"), ("#56B4E9", "v"), ("#8C2D04", "P")]


def subtitle(runs: list[Run]) -> str:
    """Text, steps and hardware of the runs; each said once where they agree."""
    trained = [run for run in runs if run.results]
    parts = [
        {text_of(run) for run in trained},
        {f"{run.results['training']['steps']:,} steps" for run in trained},
        {hardware(run.results) for run in trained},
        {"smoke run of the pipeline" for run in trained if run.results["test_pipeline"]},
    ]
    return " · ".join(" / ".join(sorted(part)) for part in parts if part) or "no results files"


def loss_plot(runs: list[Run]) -> bytes:
    """Training and held-out loss by step of the runs that have a results file, as PNG."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run, (colour, marker) in zip(runs, itertools.cycle(LOOKS)):
        if history := run.results["loss_history"]:
            axes.plot(*zip(*history, strict=True), color=colour, linewidth=1.2, label=f"{run.name}, training")
        if history := run.results["validation_loss_history"]:
            look = {"color": colour, "marker": marker, "linestyle": "--", "markersize": 6}
            axes.plot(*zip(*history, strict=True), **look, label=f"{run.name}, held-out")
    axes.set(xlabel="step", ylabel="masked-LM loss (nats per masked token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.set_title("Training and held-out loss\n" + textwrap.fill(subtitle(runs), 100), fontsize=9)
    return png(figure)


def kurtosis_plot(runs: list[Run], sequences: int) -> bytes:
    """Excess kurtosis of the activations by layer, a panel a module, as PNG."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for axes, (title, suffix) in zip(panels.flat, PANELS, strict=True):
        for run, (colour, marker) in zip(runs, itertools.cycle(LOOKS)):
            look = {"color": colour, "marker": marker, "markersize": 6}
            training = as_nans(by_layer(recorded(run, "activation_excess_kurtosis"), suffix))
            if training:
                axes.plot(training, **look, linestyle="--", markerfacecolor="white", label=f"{run.name}, training")
            axes.plot(as_nans(by_layer(run.activations, suffix)), **look, label=f"{run.name}, held-out")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="layer", ylabel="excess kurtosis")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"Excess kurtosis of activations by layer (Gaussian = 0), mean over sequences; held-out: {sequences:,} texts\n"
        + textwrap.fill(subtitle(runs), 120),
        fontsize=10,
    )
    return png(figure)


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- results


def analysis(runs: list[Run], warned: list[str], sequences: int, data_dir: Path, argv: list[str]) -> dict:
    """Everything measured, for analysis.json."""

    def spread(values: list[float | None]) -> dict:
        mean, deviation = mean_and_deviation(values) or (None, None)
        return {"mean": mean, "population_std": deviation, "layers": values}

    return {
        "argv": argv,
        "statistic": "excess kurtosis (Gaussian = 0)",
        "held_out": {"data_dir": str(data_dir), "sequences": sequences, "max_length": MAX_LENGTH},
        "notes": warned,
        "published": {
            "weights": {suffix: dict(zip(PUBLISHED, pair, strict=True)) for _, suffix, *pair in WEIGHTS},
            "activations": {suffix: dict(zip(PUBLISHED, pair, strict=True)) for _, suffix, *pair in ACTIVATIONS}
            | {FFN: dict(zip(PUBLISHED, PUBLISHED_FFN, strict=True))},
        },
        "runs": {
            run.name: {
                "model": run.model,
                "summary": {label: ours(run.results) for label, *_, ours in SUMMARY} if run.results else None,
                "held_out_tokens": run.tokens,
                "weights": {suffix: spread(by_layer(run.weights, suffix)) for _, suffix, *_ in WEIGHTS},
                "activations": {
                    suffix: {
                        "training": spread(by_layer(recorded(run, "activation_excess_kurtosis"), suffix)),
                        "held_out": spread(by_layer(run.activations, suffix)),
                    }
                    for suffix in dict.fromkeys(name for _, name, *_ in (*ACTIVATIONS, *PANELS))
                },
                "weight_excess_kurtosis": run.weights,
                "held_out_activation_excess_kurtosis": run.activations,
            }
            for run in runs
        },
    }


def write(path: Path, content: bytes) -> None:
    """Write beside, then rename, so that a full disk costs no earlier report."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number above 0, got {text!r}")
    return int(text)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model folder or Hub name (default: every run)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="results files; the report goes here")
    parser.add_argument("--models_dir", type=Path, default=Path("models"), help="model folders of the runs")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="what build_dataset.py wrote")
    parser.add_argument("--max_samples", type=positive, default=500, help="held-out texts for the activations")
    parser.add_argument("--batch_size", type=positive, default=8)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    # One clear line instead of theirs.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)

    runs = find_runs(args.models, args.results_dir, args.models_dir)
    texts = held_out_texts(args.data_dir, args.max_samples)
    for run in runs:
        measure(run, texts, args.batch_size)
    warned = notes(runs)
    text = report(runs, warned, len(texts), args.data_dir)
    print(text)

    args.results_dir.mkdir(parents=True, exist_ok=True)
    results = analysis(runs, warned, len(texts), args.data_dir, argv)
    write(
        args.results_dir / "analysis.json",
        json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n",
    )
    pictures = {"kurtosis.png": kurtosis_plot(runs, len(texts))}
    if trained := [run for run in runs if run.results]:
        pictures["loss.png"] = loss_plot(trained)
    for name, picture in pictures.items():
        write(args.results_dir / name, picture)
    links = "".join(f"\n\n![{name}]({name})" for name in sorted(pictures, reverse=True))
    write(args.results_dir / "report.md", (text + links + "\n").encode())
    print(f"\nWritten: {args.results_dir}/report.md, analysis.json, {', '.join(sorted(pictures))}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
