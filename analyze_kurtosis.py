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
import re
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
from record import git_state, one_line, versions, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

MAX_LENGTH = 512  # tokens; longer texts are cut, as in training

# The published experiment (EsperBERTo, 2023): mean ± population standard deviation over its 6 layers; activations in
# train mode with padding. (label, name behind `layer.<i>.`, published softmax0, published softmax1)
PUBLISHED = ["published softmax0", "published softmax1"]
WEIGHTS = [
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
# The FFN output layer by layer, then mean ± deviation: the published table leaves it out, its result files hold it.
FFN = "output.dense"
PUBLISHED_FFN = [
    ["6.0", "8.3", "20.6", "78.3", "100.1", "4.5", "36.3 ± 38.3"],
    ["26.0", "10.7", "11.4", "7.3", "0.3", "0.7", "9.4 ± 8.6"],
]

PANELS = {  # of kurtosis.png: name behind `layer.<i>.`, title
    "attention.output.dense": "attention.output.dense",
    "attention.output": "attention.output (LayerNorm)",
    FFN: "output.dense (FFN output)",
    "output": "output (LayerNorm)",
}
# Colours of different lightness and a marker for each run, so that the plots read in grey too.
LOOKS = [("#0B3C7D", "o"), ("#E8850C", "s"), ("#1B7F5C", "^"), ("#C06FA5", "D"), ("#56B4E9", "v"), ("#8C2D04", "P")]

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
PAIRED = {  # runs compare only where these agree
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
    weights: dict[str, float] = field(default_factory=dict)  # excess kurtosis by parameter
    held_out: dict[str, float] = field(default_factory=dict)  # and by module, on held-out text
    tokens: int = 0  # real ones in the held-out text, by this model's tokenizer

    @property
    def training(self) -> dict[str, float | None]:
        """Excess kurtosis by module as training recorded it; empty where there is no results file."""
        return self.results["activation_excess_kurtosis"] if self.results else {}


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
    for types, key in ((types, key) for types, keys in RESULTS.items() for key in keys):
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
        except (ValueError, TypeError):
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
    """Texts of the validation split, evenly spread over it, because its sources lie one behind the other."""
    try:
        split = datasets.load_from_disk(str(data_dir))["validation"]
        if not len(split):
            raise ValueError("it is empty")
        texts = split[np.linspace(0, len(split) - 1, min(max_samples, len(split))).astype(int)]["text"]
    except (OSError, ValueError, LookupError) as error:  # LookupError: no such split or column, or no rows at all
        sys.exit(
            f"error: no texts in the validation split of {data_dir} ({one_line(error)}): run build_dataset.py first"
        )
    return texts


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub name; exits with one line where either is missing or damaged."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        sys.exit(f"error: no model folder {name}")
    try:
        model, loading = AutoModelForMaskedLM.from_pretrained(
            name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        kind = "a damaged model folder" if Path(name).is_dir() else "neither a folder here nor loadable from the Hub"
        sys.exit(f"error: {name} is {kind}: {one_line(error)}")
    if loading["missing_keys"]:
        sys.exit(f"error: {name} is not a complete masked language model: it lacks {sorted(loading['missing_keys'])}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(
            f"error: {name} has no tokenizer that loads, copy the one it was trained with there: {one_line(error)}"
        )
    # A folder without tokenizer files loads as a tokenizer that knows its special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        sys.exit(f"error: {name} has no tokenizer, copy the one it was trained with there")
    if len(tokenizer) > model.config.vocab_size:
        sys.exit(f"error: {name}: its tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    if not any(module.endswith(f"layer.0.{FFN}") for module, _ in model.named_modules()):
        sys.exit(
            f"error: {name} ({model.config.model_type}) has no layer.0.{FFN}: only BERT-shaped models fit the tables"
        )
    return model, tokenizer


def weight_kurtosis(model: PreTrainedModel) -> dict[str, float]:
    """Excess kurtosis of every parameter, all entries pooled, in float64; NaN where they are all equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, about parameters that are constant
        return {
            name: float(scipy.stats.kurtosis(parameter.detach().numpy().ravel().astype(np.float64)))
            for name, parameter in model.named_parameters()
        }


@torch.inference_mode()
def activation_kurtosis(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int, label: str
) -> tuple[dict[str, float], int]:
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
    return kurtosis.result(), tokens


# -------------------------------------------------------------------------------------------------------------- tables


def by_layer(kurtosis: dict[str, float | None], suffix: str) -> np.ndarray:
    """The values named `...layer.<i>.<suffix>`, in the order of the layers; NaN where a layer has none."""
    pattern = re.compile(rf"\blayer\.(\d+)\.{re.escape(suffix)}$")
    layers = {int(match[1]): value for name, value in kurtosis.items() if (match := pattern.search(name))}
    return np.array([layers[layer] for layer in sorted(layers)], dtype=float)  # turns None into NaN


def number(value: float | None, decimals: int = 2) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{decimals}f}"


def plus_minus(values: np.ndarray) -> str:
    """`mean ± population standard deviation`; a third decimal where both are small, as published."""
    if not len(values) or np.isnan(values).any():
        return "–"
    decimals = 3 if max(abs(values.mean()), values.std()) < 0.1 else 2
    return f"{number(values.mean(), decimals)} ± {number(values.std(), decimals)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest} s" if minutes < 60 else "{} h {} m".format(*divmod(round(seconds / 60), 60))


def machine(hardware: dict) -> str:
    if hardware["device"] == "cpu":
        return f"{hardware['name']} (CPU threads: {hardware['count']})"
    return f"{hardware['count']} × {hardware['name']}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(runs: list[Run], data_dir: Path) -> list[str]:
    """What a reader has to know before comparing the columns."""
    lines = []
    trained = [run for run in runs if run.results]
    if smoke := [run.name for run in trained if run.results["test_pipeline"]]:
        lines.append(f"These tables show only that the pipeline works: --test_pipeline made {', '.join(smoke)}.")
    for key, label in PAIRED.items():
        values = {run.name: str(look_up(run.results, key))[:12] for run in trained}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            lines.append(f"The runs differ in {label} ({listed}): compare only those that agree.")
    train_sha = train_text(data_dir)
    for run in trained:
        if train_sha and train_sha != run.results["dataset"]["sha256"]:
            lines.append(f"{run.name} was not trained on {data_dir}, whose held-out text it may have seen in training.")
        theirs = run.results["weight_excess_kurtosis"]
        pairs = np.array([(value, theirs.get(name)) for name, value in run.weights.items()], dtype=float)
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


def trained_on(runs: list[Run]) -> str:
    """Steps, text and hardware of the runs (and whether they are smoke runs), said once where they agree."""
    said = []
    for results in (run.results for run in runs if run.results):
        training, text = results["training"], results["dataset"]
        sources = ", ".join(text["sources"][:3]) + f" and {len(text['sources']) - 3} more" * (len(text["sources"]) > 3)
        said.append(
            f"{training['steps']:,} steps, {training['samples']:,} sequences of {sources} "
            f"({text['train_samples']:,} samples), {machine(results['hardware'])}"
            + ", --test_pipeline"
            * results["test_pipeline"]
        )
    return " / ".join(dict.fromkeys(said)) or "no results file"


def summary(runs: list[Run]) -> list[list[str]]:
    """Rows of the first table: label, published softmax0, published softmax1, ours."""

    def ours(key: str, show=number) -> list[str]:
        return [show(look_up(run.results, key)) if run.results else "–" for run in runs]

    return [
        ["softmax_n", "0", "1", *ours("softmax_n", "{:g}".format)],
        ["seed", "42", "42", *ours("seed", str)],
        ["steps", "285,899", "285,899", *ours("training.steps", "{:,}".format)],
        ["sequences seen", "4.57 M", "4.57 M", *ours("training.samples", "{:,}".format)],
        ["training loss, mean of the whole run", "4.46", "4.44", *ours("training.loss_mean")],
        # Published: the mean of the last 1,000 steps.
        ["training loss, last logged", "3.79", "3.78", *ours("loss_history", last)],
        ["held-out loss", "–", "–", *ours("validation.loss")],
        ["held-out perplexity", "–", "–", *ours("validation.perplexity")],
        ["runtime", "9 h 16 m", "9 h 16 m", *ours("training.wall_seconds", duration)],
        # Published: at 1.212 USD an hour (AWS g5.2xlarge).
        ["cost, USD", "11.22", "11.24", *ours("training.cost_usd")],
        ["hardware", "1 × NVIDIA A10G", "1 × NVIDIA A10G", *ours("hardware", machine)],
    ]


def last(history: list[list]) -> str:
    return number(history[-1][1]) if history else "–"


def report(runs: list[Run], warned: list[str], sequences: int, data_dir: Path) -> str:
    """The tables with their captions, as Markdown."""
    columns = [*PUBLISHED, *(run.name for run in runs)]
    weights = [
        [label, *published, *(plus_minus(by_layer(run.weights, suffix)) for run in runs)]
        for label, suffix, *published in WEIGHTS
    ]
    activations = [
        [f"{label}, training", *published, *(plus_minus(by_layer(run.training, suffix)) for run in runs)]
        for label, suffix, *published in ACTIVATIONS
    ] + [
        [f"{label}, held-out", "–", "–", *(plus_minus(by_layer(run.held_out, suffix)) for run in runs)]
        for label, suffix, *_ in ACTIVATIONS
    ]
    depth = max(6, *(len(by_layer(run.held_out, FFN)) for run in runs))
    lead = [[f"{name}, training", *published] for name, published in zip(PUBLISHED, PUBLISHED_FFN, strict=True)]
    for run in runs:
        for when, kurtosis in (("training", run.training), ("held-out", run.held_out)):
            values = by_layer(kurtosis, FFN)
            lead.append([f"{run.name}, {when}", *map(number, values), plus_minus(values)])
    for row in lead:
        row[-1:-1] = ["–"] * (depth + 2 - len(row))  # models of different depth

    trained = trained_on(runs)
    layers = "/".join(sorted({str(len(by_layer(run.held_out, FFN))) for run in runs}))
    tokens = "/".join(sorted({f"{run.tokens:,}" for run in runs}))
    spread = (
        f"mean ± population standard deviation over the layers of one run (n = {layers} layers; published: 6); one "
        "seed a column, so ± is no interval over seeds."
    )
    definition = (
        "Excess kurtosis of each sequence, its tokens and channels pooled, then the mean over the sequences. Training: "
        f"train mode (dropout on), padding counted, running mean over every step ({trained}). Held-out: the final "
        f"model in eval mode, padding left out, n = {sequences:,} sequences (evenly spread over the validation "
        f"split of {data_dir}, cut at {MAX_LENGTH} tokens; {tokens} real tokens)."
    )
    parts = [
        "# Kurtosis report",
        "Excess kurtosis throughout: mean((x - mean)^4) / variance^2 - 3, 0 for a Gaussian (full kurtosis is 3 "
        "higher). Published: EsperBERTo (2023), one seed, 285,899 steps of 16 sentences of OSCAR and Leipzig text.",
        *(f"**Note.** {line}" for line in warned),
        "## Summary",
        table(["", *columns], summary(runs)),
        f"*n = 1 run a column. Ours: {trained}. Losses in nats per masked token; the last logged one is the mean over "
        "the last logging window; the held-out loss has the same masks in every run.*",
        "## Weights of attention.output",
        table(["excess kurtosis", *columns], weights),
        f"*Excess kurtosis over all entries of one parameter of the saved model ({trained}): {spread}*",
        "## Activations of attention.output",
        table(["excess kurtosis", *columns], activations),
        f"*{definition} Shown: {spread} The dropout row carries no information: with dropout 0.1 it is "
        "(K + 3) / 0.9 - 3 of the dense row, and in eval mode dropout is the identity.*",
        "## A lead, not a result: the FFN output (output.dense), layer by layer",
        table(["excess kurtosis", *(f"layer {i}" for i in range(depth)), "mean ± std"], lead),
        f"*{definition} Last column: {spread} The published table leaves this module out, though the hypothesis points "
        "at the residual stream and the FFN output; the published rows here come from its result files.*",
    ]
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------------------- plots


def loss_plot(runs: list[Run]) -> bytes:
    """Training and held-out loss by step of runs that have a results file, as PNG."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for (colour, marker), run in zip(itertools.cycle(LOOKS), runs, strict=False):
        for key, look, label in (
            ("loss_history", {"linestyle": "--", "linewidth": 1}, "training"),
            ("validation_loss_history", {"marker": marker}, "held-out"),
        ):
            steps, losses = np.array(run.results[key], dtype=float).reshape(-1, 2).T
            axes.plot(
                steps, losses, **look, color=colour, label=f"{run.name}, {label}, ends at {last(run.results[key])}"
            )
    axes.set(xlabel="step", ylabel="masked-LM loss (nats per masked token)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.grid(alpha=0.3)
    axes.set_title("Training and held-out loss\n" + textwrap.fill(trained_on(runs), 100), fontsize=9)
    return png(figure)


def kurtosis_plot(runs: list[Run], sequences: int) -> bytes:
    """Excess kurtosis of the activations by layer, a panel a module, as PNG."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for axes, (suffix, title) in zip(panels.flat, PANELS.items(), strict=True):
        for (colour, marker), run in zip(itertools.cycle(LOOKS), runs, strict=False):
            look = {"color": colour, "marker": marker}
            if run.training:
                training = by_layer(run.training, suffix)
                axes.plot(training, **look, linestyle="--", markerfacecolor="white", label=f"{run.name}, training")
            axes.plot(by_layer(run.held_out, suffix), **look, label=f"{run.name}, held-out")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="layer", ylabel="excess kurtosis")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        "Excess kurtosis of activations by layer (Gaussian = 0)\n"
        f"training: train mode, padding counted; held-out: final model, eval mode, {sequences:,} texts\n"
        + textwrap.fill(trained_on(runs), 120),
        fontsize=10,
    )
    return png(figure)


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- results


def analysis(runs: list[Run], warned: list[str], sequences: int, data_dir: Path) -> dict:
    """Everything measured, beside the published figures, for analysis.json."""
    modules = dict.fromkeys([suffix for _, suffix, *_ in ACTIVATIONS] + list(PANELS))
    return {
        "git": git_state(),
        "versions": versions(),
        "statistic": "excess kurtosis (Gaussian = 0)",
        "held_out": {"data_dir": str(data_dir), "sequences": sequences, "max_length": MAX_LENGTH},
        "notes": warned,
        "published": {suffix: dict(zip(PUBLISHED, pair, strict=True)) for _, suffix, *pair in WEIGHTS + ACTIVATIONS}
        | {FFN: dict(zip(PUBLISHED, PUBLISHED_FFN, strict=True))},
        "runs": {
            run.name: {
                "model": run.model,
                "held_out_tokens": run.tokens,
                "weights": {suffix: layers(run.weights, suffix) for _, suffix, *_ in WEIGHTS},
                "activations_training": {suffix: layers(run.training, suffix) for suffix in modules},
                "activations_held_out": {suffix: layers(run.held_out, suffix) for suffix in modules},
                "weight_excess_kurtosis": run.weights,
                "held_out_activation_excess_kurtosis": run.held_out,
            }
            for run in runs
        },
    }


def layers(kurtosis: dict[str, float | None], suffix: str) -> dict | None:
    values = by_layer(kurtosis, suffix)
    if not len(values):
        return None
    return {"mean": float(values.mean()), "population_std": float(values.std()), "layers": values.tolist()}


def write(path: Path, content: bytes) -> None:
    """Write beside, then rename, so that a full disk costs no earlier report."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number above 0, got {text!r}")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model folder or Hub name (default: every run)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="results files; the report goes here")
    parser.add_argument("--models_dir", type=Path, default=Path("models"), help="model folders of the runs")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="what build_dataset.py wrote")
    parser.add_argument("--max_samples", type=positive, default=500, help="held-out texts for the activations")
    parser.add_argument("--batch_size", type=positive, default=8, help="texts at a time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    # One clear line instead of theirs.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)

    runs = find_runs(args.models, args.results_dir, args.models_dir)
    texts = held_out_texts(args.data_dir, args.max_samples)
    for run in runs:
        model, tokenizer = load(run.model)
        run.weights = weight_kurtosis(model)
        run.held_out, run.tokens = activation_kurtosis(model, tokenizer, texts, args.batch_size, run.name)
    warned = notes(runs, args.data_dir)
    text = report(runs, warned, len(texts), args.data_dir)
    print(text)

    pictures = {"kurtosis.png": kurtosis_plot(runs, len(texts))}
    if trained := [run for run in runs if run.results]:
        pictures = {"loss.png": loss_plot(trained), **pictures}
    write_json(args.results_dir / "analysis.json", analysis(runs, warned, len(texts), args.data_dir))
    for name, picture in pictures.items():
        write(args.results_dir / name, picture)
    embedded = [f"![{name.removesuffix('.png')} plot]({name})" for name in pictures]
    write(args.results_dir / "report.md", "\n\n".join([text, *embedded, ""]).encode())
    print(f"\nWritten to {args.results_dir}: report.md, analysis.json, {', '.join(pictures)}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
