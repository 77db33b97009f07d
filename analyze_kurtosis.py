"""Outliers and quantization damage of the trained models, in pairs, beside the published figures: report and plots.

    python analyze_kurtosis.py                       # every run that train_model.py finished
    python analyze_kurtosis.py FOLDER HUB/NAME ...   # these models instead: any BERT-shaped masked-LM
    python analyze_kurtosis.py --onnxruntime         # and run them in INT8, by ONNX Runtime

Reads   results/<run>.json, models/<run>/ (or the models named), both splits of data/
Writes  results/report.md and report.html (the same, in one file), results/analysis.json, results/<picture>.png

What is measured is defined in DEFINITIONS.md. Activations: of the final model on held-out text, in eval mode, padding
left out. Quantization: calibrated on training text, scored on the same held-out text, masked as in training.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import scipy.stats
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import plots
import softmax1  # noqa: F401  (registers RoBERTa with softmax_n, so that from_pretrained below knows it)
from answer import PRIMARY, PRIMARY_ARM, Finding, answer, findings
from controls import GATE, self_check  # which registers the controls' classes too
from held_out import HELD_OUT_SEED, evenly_spread, held_out_batches, longest_text, padded_batches
from interventions import interventions
from outliers import PLACES, SINK, eager_attention, measure_model, uniform_attention
from packing import MaskedLMCollator
from quantization import (
    CALIBRATION_BATCHES,
    DRAWS,
    PUBLISHED_LENGTH,
    SCHEMES,
    joined,
    measure_damage,
    weight_errors,
)
from questions import questions
from record import git_state, one_line, versions, weights_sha256, write_json
from report import (
    ACTIVATIONS,
    FFN,
    PUBLISHED,
    PUBLISHED_FFN,
    WEIGHTS,
    html_page,
    report,
    self_check_notes,
    trained_on,
)
from runs import Run, arms, by_layer, find_runs
from sets import BASELINE, from_modified_tree, headline, notes, refuse_copies, refuse_duplicates

MAX_LENGTH = 512  # tokens at which texts are cut, where neither the model nor its training is shorter
PUBLISHED_TEXTS = 1_000  # a batch of the published setting; its 4,096 tokens are about 200 texts of the experiment
CALIBRATION_SIZE = 32  # texts in a calibration batch, as Bondarenko et al. have it
MLM_PROBABILITY = 0.15  # of the held-out masks, as in training
HISTOGRAM_TEXTS = 32  # are held in memory at once, for the histograms
INTERVENTION_TEXTS = 100  # of those that are scored under each quantization, evenly spread
MAPPED_TEXTS = 2
MAPPED_LENGTH = range(8, 17)  # tokens: a map that can be read

PANELS = {  # of kurtosis.png and norms.png
    "context": "attention context",
    "attention_output": "attention output (dense)",
    "attention_layernorm": "attention LayerNorm",
    "ffn_intermediate": "FFN intermediate",
    "ffn_output": "FFN output (dense)",
    "ffn_residual": "residual stream (into LayerNorm)",
}
EMERGING = {  # of emergence.png: statistic: (title, label of the axis)
    "ffn_output.kurtosis_sequence": ("FFN output: kurtosis", "excess kurtosis"),
    "ffn_output.inf_norm": ("FFN output: infinity norm", "infinity norm"),
    "ffn_residual.kurtosis_sequence": ("residual stream: kurtosis", "excess kurtosis"),
    "ffn_residual.inf_norm": ("residual stream: infinity norm", "infinity norm"),
    "attention.sink_rate_any_renormalised": ("sink rate, any token, renormalised", "share of texts and heads"),
    "attention.null_mass": ("null mass", "share of the attention"),
}
SEEDS = {  # of emergence_seeds.png: statistic: (title, label of the axis, its scale, factor)
    "attention.sink_rate_any": ("Attention sinks", "% of heads and texts", "linear", 100),
    "ffn_residual.inf_norm": ("Residual stream, largest entry", "infinity norm", "log", 1),
}


# -------------------------------------------------------------------------------------------------- models and texts


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
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        sys.exit(f"error: {name}: its tokenizer has no mask or no padding token, so this is no masked language model")
    if not any(module.endswith(f"layer.0.{FFN}") for module, _ in model.named_modules()):
        sys.exit(
            f"error: {name} ({model.config.model_type}) has no layer.0.{FFN}: only BERT-shaped models fit the tables"
        )
    if not model._supports_attention_backend:
        sys.exit(f"error: {name} ({model.config.model_type}) does not take its attention from transformers' interface")
    tokenizer.model_max_length = min(MAX_LENGTH, tokenizer.model_max_length, longest_text(model))
    return model, tokenizer


def texts_of(data_dir: Path, split: str, max_samples: int) -> list[str]:
    """Texts of a split, evenly spread over it, because its sources lie one behind the other."""
    try:
        rows = datasets.load_from_disk(str(data_dir))[split]
        if not len(rows):
            raise ValueError("it is empty")
        return rows[evenly_spread(len(rows), max_samples)]["text"]
    except (OSError, ValueError, LookupError) as error:  # LookupError: no such split or column, or no rows at all
        sys.exit(f"error: no texts in the {split} split of {data_dir} ({one_line(error)}): run build_dataset.py first")


def in_order(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Every text's tokens; texts without a token are left out."""
    if not len(texts):
        return []
    found = tokenizer(list(texts), truncation=True)["input_ids"]  # at model_max_length
    special = set(tokenizer.all_special_ids)
    return [ids for ids in found if not special.issuperset(ids)]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The same, the shortest text first, so that little is padded."""
    return sorted(in_order(tokenizer, texts), key=len)


# ------------------------------------------------------------------------------------------------------ what we measure


@dataclass
class Texts:
    """What the runs are measured on, the same for all of them."""

    held_out: list[str]
    scored: int  # as many of these are scored under each quantization
    calibration: list[str]  # of the training split, dealt into several draws
    published: list[str]  # of the held-out split, joined for the published setting
    calibration_batches: int


def measure(run: Run, texts: Texts, batch_size: int, checked: bool, execute: Callable | None) -> None:
    """Fill in everything that is measured of a run.

    `checked`: the instrument checks itself on this model; `execute`: executed.execute, or None to leave that out.
    """
    model, tokenizer = load(run.model)
    n = getattr(model.config, "softmax_n", 0.0)
    if run.results and n != run.results["softmax_n"]:
        sys.exit(f"error: {run.model} has n = {n}, but {run.file} is of a run with n = {run.results['softmax_n']}")
    if run.results:  # what the model was not trained on tells nothing of the training
        trained = run.results.get("settings", {}).get("max_length", MAX_LENGTH)
        tokenizer.model_max_length = min(tokenizer.model_max_length, trained)
    run.max_length = tokenizer.model_max_length
    run.digest = weights_sha256(model)
    run.weights = weight_statistics(model)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    ids = token_ids(tokenizer, texts.held_out)
    if not ids:
        sys.exit(f"error: {run.name}: its tokenizer finds no token in the held-out texts")

    batches = tqdm(padded_batches(tokenizer, ids, batch_size), desc=f"{run.name}: activations", unit="batch")
    run.places, run.attention, seen = measure_model(model, batches, tokenizer)
    run.tokens = seen["tokens"]
    run.attention_uniform = uniform_attention(seen["lengths"], n, getattr(model.config, "attention_weights", None))
    if (before := untrained_model(model, run.results)) is not None:
        batches = tqdm(padded_batches(tokenizer, ids, batch_size), desc=f"{run.name}: untrained", unit="batch")
        run.untrained = dict(zip(("places", "attention"), measure_model(before, batches, tokenizer), strict=False))
        del before
    run.histograms = ffn_histograms(
        model, padded_batches(tokenizer, ids[:: max(1, len(ids) // HISTOGRAM_TEXTS)], batch_size)
    )
    run.maps = attention_maps(model, tokenizer, ids, run.attention)

    masks = MaskedLMCollator(tokenizer, mlm_probability=MLM_PROBABILITY, seed=HELD_OUT_SEED)
    some = [ids[i] for i in evenly_spread(len(ids), texts.scored)]
    scored = held_out_batches({"input_ids": some}, masks, batch_size)
    few = [some[i] for i in evenly_spread(len(some), INTERVENTION_TEXTS)]
    run.interventions = interventions(model, held_out_batches({"input_ids": few}, masks, batch_size), tokenizer)
    draws = calibration_draws(tokenizer, texts.calibration, masks)
    if not draws:
        sys.exit(f"error: {run.name}: its tokenizer finds no token in the training texts")
    # As Bondarenko et al. have it: the first full sequences of the held-out split, joined in its own order.
    limit = texts.calibration_batches * CALIBRATION_SIZE
    full = joined(in_order(tokenizer, texts.published), min(PUBLISHED_LENGTH, run.max_length))[:limit]
    published = held_out_batches({"input_ids": full}, masks, CALIBRATION_SIZE)
    run.damage = {
        "sequences": len(some),
        "calibration_tokens": {"draws": list(map(real_tokens, draws)), "published": real_tokens(published)},
        **measure_damage(model, scored, draws, published, run.name),
    }
    if execute:
        run.damage["executed"] = execute(model, scored, draws[0], run.damage)
        if "error" in run.damage["executed"]:
            print(f"note: {run.name} was not executed in INT8: {run.damage['executed']['error']}", file=sys.stderr)
    if checked:
        run.damage["self_check"] = self_check(model, scored, draws[0])


def calibration_draws(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], masks: MaskedLMCollator
) -> list[list[dict]]:
    """DRAWS lists of calibration batches, of other texts each: the same for every run with this tokenizer."""
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    draws = []
    for i in range(DRAWS):
        if ids := token_ids(tokenizer, shuffled[i::DRAWS]):
            draw = held_out_batches({"input_ids": ids}, masks, CALIBRATION_SIZE)
            # The running range forgets: in the order of length, the longest texts would have the last word.
            random.Random(i).shuffle(draw)
            draws.append(draw)
    return draws


def real_tokens(batches: list[dict]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def untrained_model(model: PreTrainedModel, results: dict | None) -> PreTrainedModel | None:
    """The model as it was before its first update, on the same device; None where that is not known for sure.

    Training starts from a seed, so the model is built again from class, config and seed. It must have the digest of the
    initial weights that training wrote down: another release of a package may draw other random numbers.
    """
    expected = ((results or {}).get("model") or {}).get("initial_weights")
    if expected is None:
        return None
    transformers.set_seed(results["seed"])
    before = type(model)(copy.deepcopy(model.config))
    return before.eval().to(model.device) if weights_sha256(before, leave_out=GATE) == expected else None


def weight_statistics(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """{parameter: {"kurtosis" (scipy, float64; NaN where all are equal), "inf_norm", "int8_error", "int4_error"}}."""
    found = weight_errors(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, about parameters that are constant
        for name, parameter in model.named_parameters():
            values = parameter.detach().numpy().ravel().astype(np.float64)
            found[name] = {
                "kurtosis": float(scipy.stats.kurtosis(values)),
                "inf_norm": float(np.abs(values).max()),
                **found[name],
            }
    return found


@torch.inference_mode()
def ffn_histograms(model: PreTrainedModel, batches: list[dict]) -> dict[str, np.ndarray]:
    """Counts in plots.BINS of the standardised FFN output of every layer, on a few texts."""
    held: dict[str, list[torch.Tensor]] = {}
    suffix, _ = PLACES["ffn_output"]
    mask = None

    def keep(name: str):
        return lambda module, inputs, output: held.setdefault(name, []).append(output[mask].flatten().float().cpu())

    handles = [
        module.register_forward_hook(keep(f"layer {match[1]}"))
        for name, module in model.named_modules()
        if (match := re.search(rf"\blayer\.(\d+)\.{re.escape(suffix)}$", name))
    ]
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        mask = batch["attention_mask"].bool()
        model.base_model(**batch)
    for handle in handles:
        handle.remove()
    counts = {}
    for name, values in held.items():
        values = torch.cat(values).double().numpy()
        scores = (values - values.mean()) / (values.std() or 1.0)
        counts[name] = np.histogram(np.clip(scores, plots.BINS[0], plots.BINS[-1]), plots.BINS)[0]
    return counts


@torch.inference_mode()
def attention_maps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], attention: dict
) -> list[tuple[str, list[str], np.ndarray, np.ndarray]]:
    """(caption, tokens, weights, null mass) of the head that does least, on a few short texts."""
    some = [one for one in ids if len(one) in MAPPED_LENGTH] or ids
    some = [some[i] for i in sorted(set(np.linspace(0, len(some) - 1, MAPPED_TEXTS).astype(int)))]
    if not attention:
        return []
    idle = {(layer, head): mass for layer, found in attention.items() for head, mass in enumerate(found["idle_mass"])}
    layer, head = max(idle, key=idle.get)
    maps = []
    for one in some:
        one = one[: MAPPED_LENGTH[-1]]
        with eager_attention(model):
            output = model.base_model(torch.tensor([one], device=model.device), output_attentions=True)
        weights = output.attentions[int(layer.partition(".")[2])][0, head].float().cpu().numpy()
        # Half a letter of a byte-level tokenizer decodes to the replacement character, which no font shows well.
        tokens = [tokenizer.decode([i]).strip().replace("\ufffd", "·") or "_" for i in one]
        maps.append((f"{layer.replace('.', ' ')}, head {head}", tokens, weights, 1 - weights.sum(1)))
    return maps


# ------------------------------------------------------------------------------------------------------------ pictures


def pictures(runs: list[Run], sequences: int) -> dict[str, tuple[str, bytes]]:
    """{file name: (caption, PNG)}; a picture without data is left out."""
    made: dict[str, tuple[str, bytes]] = {}
    what = trained_on(runs)
    everyone, runs = runs, [run for run in runs if not run.diverged]

    def add(name: str, caption: str, draw, data, *extra) -> None:
        if data:
            made[f"{name}.png"] = (caption, draw(data, f"{caption}\n{what}", *extra))

    emerging, watched = emergence_curves(everyone, {key: (title, factor) for key, (title, *_, factor) in SEEDS.items()})
    if len(emerging) == len(SEEDS):
        growth = (
            f"Sinks (share of heads and texts in which one token gets more than {SINK:.0%} of the attention) and "
            "infinity norm of the residual stream (largest layer) during training, from before the first update on: a "
            f"thin line a run, in bold the median of an arm; {watched} held-out texts"
        )
        axes_of = {title: (label, scale) for title, label, scale, _ in SEEDS.values()}
        made["emergence_seeds.png"] = (growth, plots.bundles(emerging, (BASELINE, PRIMARY_ARM), axes_of))

    gaps, lost = [], [f"{run.name} (diverged)" for run in everyone if run.diverged]
    for run in runs:
        found = {name: (one["gap"], one["error"]) for name, one in run.damage["schemes"].items() if name != "float32"}
        lost += [
            f"{run.name}, {SCHEMES[name]} (not finite)" for name, pair in found.items() if not np.isfinite(pair[0])
        ]
        gaps.append((run.arm, {SCHEMES[name]: pair for name, pair in found.items()}))
    without = f". Without a mark: {'; '.join(lost)}" if lost else ""
    add("damage", f"Quantization damage, one mark a run (bars: standard error){without}", plots.damage, gaps)

    def layers(statistic: str) -> dict[str, list[tuple]]:
        found = {}
        for place, title in PANELS.items():
            curves = []
            for run in runs:
                values = by_layer({name: one[statistic] for name, one in run.places.items()}, place)
                if len(values):
                    curves.append((run.arm, values))
            if curves:
                found[title] = curves
        return found

    held_out = f"on {sequences:,} held-out texts, eval mode, one curve a run"
    kurtosis = f"Excess kurtosis of activations by layer and place (Gaussian = 0), {held_out}"
    axes = ("layer", "excess kurtosis")
    add("kurtosis", kurtosis, plots.panels, layers("kurtosis_sequence"), *axes)
    norms = f"Infinity norm of activations by layer and place, {held_out}"
    add("norms", norms, plots.panels, layers("inf_norm"), "layer", "infinity norm")

    emerging, watched = emergence_curves(everyone, {key: (title, 1) for key, (title, _) in EMERGING.items()})
    growth = (
        f"Emergence: outliers during training, from before the first update on. {watched} texts evenly spread over the "
        "held-out split, unmasked, eval mode, padding left out, as in the analysis (mean of the layers; norms: the "
        "largest)"
    )
    add("emergence", growth, plots.panels, emerging, "step", dict(EMERGING.values()))

    curves = [
        (run.arm + " (diverged)" * run.diverged, run.results["loss_history"], run.results["validation_loss_history"])
        for run in everyone
        if run.results
    ]
    add("loss", "Training and held-out loss, one curve a run", plots.loss, curves)

    maps = [(f"{arm}: {caption}", *rest) for arm, found in arms(runs).items() for caption, *rest in found[0].maps]
    add("attention_map", "Attention of the head that does least, with its null mass", plots.attention, maps)

    shown: dict[str, list] = {}
    for found in arms(runs).values():
        for layer, counts in found[0].histograms.items():
            shown.setdefault(layer, []).append((found[0].arm, counts))
    chosen = evenly_spread(len(shown), 6)  # of deeper models, some layers
    shown = {name: curves for i, (name, curves) in enumerate(shown.items()) if i in chosen}
    density = f"FFN output against a Gaussian, standardised, {HISTOGRAM_TEXTS} texts, the first run of every arm"
    add("histograms", density, plots.histograms, shown)
    return made


def emergence_curves(runs: list[Run], statistics: dict[str, tuple[str, float]]) -> tuple[dict[str, list[tuple]], str]:
    """({title: [(arm, values, steps)]}, how many texts they are of); `statistics` is {name: (title, factor)}.

    Results files that do not say how many were written when the texts were others (the shortest ones, masked): they
    are left out.
    """
    told = [run for run in runs if run.results and {"emergence", "emergence_texts"} <= run.results.keys()]
    curves: dict[str, list[tuple]] = {}
    for statistic, (title, factor) in statistics.items():
        reduce = np.max if "inf_norm" in statistic else np.mean
        for run in told:
            entries = run.results["emergence"]
            for_layers = [by_layer(entry, statistic) for entry in entries]
            if entries and all(len(values) for values in for_layers):
                steps = [entry["step"] for entry in entries]
                curves.setdefault(title, []).append(
                    (run.arm, [factor * reduce(values) for values in for_layers], steps)
                )
    return curves, "/".join(sorted({str(run.results["emergence_texts"]) for run in told}))


# ------------------------------------------------------------------------------------------------------------- results


def analysis(runs: list[Run], warned: list[str], found: list[Finding], sequences: int, data_dir: Path) -> dict:
    """Everything measured, beside the published figures, for analysis.json."""
    modules = dict.fromkeys([suffix for _, suffix, *_ in ACTIVATIONS] + [FFN, "output"])
    compared = found[0].compared if found else {}
    return {
        "git": git_state(),
        "record": is_record(runs),
        "versions": versions(),
        "statistic": "excess kurtosis (Gaussian = 0)",
        "held_out": {"data_dir": str(data_dir), "sequences": sequences},
        "notes": warned,
        "answer": answer(runs, found),
        "questions": {key: asdict(one) for key, one in questions(found).items()},
        "primary_metric": PRIMARY,
        "comparisons": {arm: {metric: asdict(one) for metric, one in each.items()} for arm, each in compared.items()},
        "other_sets": [
            {
                "runs": [run.name for run in other.group.runs],
                "steps": other.group.steps,
                "comparisons": {
                    arm: {metric: asdict(one) for metric, one in each.items()} for arm, each in other.compared.items()
                },
            }
            for other in found[1:]
        ],
        "published": {suffix: dict(zip(PUBLISHED, pair, strict=True)) for _, suffix, *pair in WEIGHTS + ACTIVATIONS}
        | {FFN: dict(zip(PUBLISHED, PUBLISHED_FFN, strict=True))},
        "runs": {
            run.name: {
                "model": run.model,
                "arm": run.arm,
                "diverged": run.diverged,
                "weights_sha256": run.digest,
                "max_length": run.max_length,
                "held_out_tokens": run.tokens,
                "weights": {suffix: layers(run.weight_kurtosis, suffix) for _, suffix, *_ in WEIGHTS},
                "activations_training": {suffix: layers(run.training, suffix) for suffix in modules},
                "activations_held_out": {suffix: layers(run.held_out, suffix) for suffix in modules},
                "parameters": run.weights,
                "places": run.places,
                "attention": run.attention,
                "attention_uniform": run.attention_uniform,
                "untrained": run.untrained or None,
                "interventions": run.interventions,
                "quantization": run.damage,
            }
            for run in runs
        },
    }


def is_record(runs: list[Run]) -> bool:
    """Whether this analysis and all results it reads were made from unmodified checkouts, which can be looked up."""
    return git_state()["dirty"] is False and not any(from_modified_tree(run) for run in runs)


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
    parser.add_argument("--max_samples", type=positive, default=500, help="held-out texts, evenly spread")
    parser.add_argument(
        "--max_scored",
        type=positive,
        default=500,
        help="of these texts, those that are scored under each quantization: a CPU is slow in bfloat16",
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="texts at a time")
    parser.add_argument(
        "--calibration_batches",
        type=positive,
        default=CALIBRATION_BATCHES,
        help=f"batches of {CALIBRATION_SIZE} training texts that static ranges come from, for each of {DRAWS} draws",
    )
    parser.add_argument(
        "--onnxruntime",
        action="store_true",
        help="also export every model to ONNX, quantize it to INT8 with ONNX Runtime and run it: loss, size, latency",
    )
    return parser.parse_args(argv)


def executor(wanted: bool) -> Callable | None:
    """executed.execute if it is wanted; exits with one line where a package for it is missing."""
    if not wanted:
        return None
    try:
        import executed  # here, so that an analysis without it needs none of its packages
    except ImportError as error:
        sys.exit(f"error: --onnxruntime needs onnx, onnxscript and onnxruntime (requirements.txt): {one_line(error)}")
    return executed.execute


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    execute = executor(args.onnxruntime)  # before hours of measuring
    # One clear line instead of theirs.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)

    runs = find_runs(args.models, args.results_dir, args.models_dir)
    refuse_duplicates(runs)
    refuse_copies(runs)  # by what training wrote, before hours of measuring
    texts = Texts(
        texts_of(args.data_dir, "validation", args.max_samples),
        args.max_scored,
        texts_of(args.data_dir, "train", DRAWS * args.calibration_batches * CALIBRATION_SIZE),
        texts_of(args.data_dir, "validation", PUBLISHED_TEXTS * args.calibration_batches),
        args.calibration_batches,
    )
    checked: set[str] = set()  # the arms on which the instrument has checked itself
    for i, run in enumerate(runs):
        if not run.diverged:
            measure(run, texts, args.batch_size, run.arm not in checked, execute)
            checked.add(run.arm)
        refuse_copies(runs[: i + 1])
    warned = [*self_check_notes(runs), *notes(runs, args.data_dir)]
    found = findings(runs)
    made = pictures(headline(runs), len(texts.held_out))
    captions = {name: caption for name, (caption, _) in made.items()}
    text = report(runs, warned, found, len(texts.held_out), args.data_dir, captions, is_record(runs))
    print(text)

    write_json(args.results_dir / "analysis.json", analysis(runs, warned, found, len(texts.held_out), args.data_dir))
    images = {name: picture for name, (_, picture) in made.items()}
    for name, picture in images.items():
        write(args.results_dir / name, picture)
    write(args.results_dir / "report.html", html_page(text, images).encode())
    write(args.results_dir / "report.md", text.encode())
    print(f"Written to {args.results_dir}: report.md, report.html, analysis.json, {', '.join(images)}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
