"""What is measured of one model: activations, attention, weights, interventions, quantization. Fills in a runs.Run.

Everything that was measured of a run is kept in a file, so that a later analysis need not measure it again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import scipy.stats
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import softmax1  # which registers RoBERTa with softmax_n, so that from_pretrained below knows it
from controls import self_check  # which registers the controls' classes too
from experiment import MAX_LENGTH, MLM_PROBABILITY, OWN_PARAMETERS
from held_out import (
    HELD_OUT_SEED,
    evenly_spread,
    held_out_batches,
    kept_positions,
    longest_text,
    padded_batches,
)
from hooks import Hooks, modules_by_layer
from interventions import interventions
from kurtosis import weights_of
from outliers import FFN, eager_attention, hides_attention, measure_model, uniform_attention
from packing import MaskedLMCollator
from quantization import DRAWS, PUBLISHED_LENGTH, joined, measure_damage, measured_copy, rounding_errors
from record import git_state, one_line, versions, weights_sha256, write_whole
from runs import BINS, Run, refuse_missing, unused_layer
from sources import NOT_UTF8, Source, check, samples

PUBLISHED_TEXTS = 1_000  # a batch of the published setting; its 4,096 tokens are about 200 texts of the experiment
CALIBRATION_SIZE = 32  # texts in a calibration batch, as Bondarenko et al. have it
HISTOGRAM_TEXTS = 32  # whose FFN outputs are held in memory at once, for the histograms
INTERVENTION_TEXTS = 100  # evenly spread over those that are scored under each quantization
MAPPED_TEXTS = 2
MAPPED_LENGTH = range(8, 17)  # tokens: a map that can be read


# -------------------------------------------------------------------------------------------------- models and texts


class NotFinite(ValueError):
    """The weights of a model hold NaN or infinities, so nothing can be measured."""


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub name; exits with one line where they cannot be loaded or measured."""
    refuse_missing(name)
    unreadable = "a damaged model folder" if Path(name).is_dir() else "neither a folder here nor loadable from the Hub"
    # A folder or a repository can hold anything, so reading it may raise any exception.
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        family = config.model_type
        if type(config) not in AutoModelForMaskedLM._model_mapping:
            sys.exit(f"error: {name} ({family}) is not a masked language model, and only those are measured")
        model, loading = AutoModelForMaskedLM.from_pretrained(
            name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        sys.exit(f"error: {name} is {unreadable}: {one_line(error)}")
    n = getattr(config, "softmax_n", 0)
    if n and not str(model.config._attn_implementation).startswith(softmax1.ATTENTION):
        sys.exit(
            f"error: {name} says softmax_n = {n}, but {type(model).__name__} attends with softmax: apply_softmax_n "
            "changed its attention before it was saved, and this class does not restore that change"
        )
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        sys.exit(f"error: {name} is not a complete masked language model: it lacks {missing[0]}{more}")
    if unused := unused_layer(loading):
        sys.exit(
            f"error: {name} is {unreadable}: its config.json has fewer layers than the weights, which hold {unused}"
        )
    if "layer.0" not in dict(modules_by_layer(model, FFN)):
        sys.exit(f"error: {name} ({family}) has no layer.0.{FFN}: only BERT-shaped models fit the tables")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # A folder without tokenizer files loads as a tokenizer that knows its special tokens only.
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            raise ValueError("it has no entries besides its special tokens")
    except Exception as error:
        sys.exit(
            f"error: {name} has no tokenizer that can be loaded ({one_line(error)}): copy the tokenizer that the model "
            "was trained with into the folder"
        )
    if len(tokenizer) > model.config.vocab_size:
        sys.exit(f"error: {name}: its tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        sys.exit(f"error: {name}: its tokenizer has no mask or no padding token, so this is no masked language model")
    try:
        tokenizer.model_max_length = min(MAX_LENGTH, tokenizer.model_max_length, longest_text(model))
        try_out(model, tokenizer)
        measured_copy(model)  # raises an error where an attention of the model cannot be replaced
    except Exception as error:
        sys.exit(f"error: {name} ({family}) cannot be measured: {one_line(error)}")
    return model, tokenizer


@torch.inference_mode()
def try_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Run the model on a long and a short text, as all measurements do.

    Raises:
        ValueError: a layer or the head does not return one row for every token, padding changes the logits of real
            tokens, or a layer that would have to be quantized does not run.
        Exception: any other error of the model.
    """
    length, short = tokenizer.model_max_length - 1, 3  # an odd length, because some models pad texts to whole windows
    ids = torch.full((2, length), tokenizer.mask_token_id)
    ids[1, short:] = tokenizer.pad_token_id
    mask = (ids != tokenizer.pad_token_id).long()
    shapes: dict[nn.Module, tuple] = {}

    def keep_shape(module: nn.Module, inputs: tuple, output) -> None:
        shapes[module] = getattr(output, "shape", ())[:2]

    chosen = mask.bool() & (torch.arange(length) < short)
    with Hooks((module, keep_shape) for module in model.modules()), kept_positions(model, chosen):
        logits = model(input_ids=ids, attention_mask=mask).logits
    for layer, module in modules_by_layer(model, FFN):
        if shapes.get(module, mask.shape) != mask.shape:
            raise ValueError(f"{layer}.{FFN} does not return one row for every token of a text")
    if logits.shape[:2] != (1, int(chosen.sum())):
        raise ValueError("its head does not compute the logits of each token alone")
    unpadded = model(input_ids=ids[1:, :short], attention_mask=mask[1:, :short]).logits[0]
    if (unpadded - logits[0, -len(unpadded) :]).abs().max() > 1e-3 * unpadded.abs().max():
        raise ValueError("padding changes its logits, so the figures of a text would depend on the other texts")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module not in shapes and not hides_attention(model):
            raise ValueError(f"{name} does not run, so its activations have no range to be quantized with")


def texts_of(source: Path, split: str, max_samples: int) -> list[str]:
    """Texts of a split, evenly spread over it, because the split holds one source after the other.

    `source` is the folder that build_dataset.py wrote, or a text file: then its first, third, ... line is in the split
    "validation", and the others are in "train".
    """
    if source.is_file():
        rows = lines_of(source)[int(split == "train") :: 2]
        return [rows[i] for i in evenly_spread(len(rows), max_samples)]
    try:
        rows = datasets.load_from_disk(str(source))[split]
        if not len(rows):
            raise ValueError("it is empty")
        return rows[evenly_spread(len(rows), max_samples)]["text"]
    except (OSError, ValueError, LookupError) as error:  # LookupError: no such split or column, or no rows at all
        sys.exit(f"error: no texts in the {split} split of {source} ({one_line(error)}): run build_dataset.py first")


def lines_of(file: Path) -> list[str]:
    """The different lines of a text file, read and bounded as in build_dataset.py; exits with one line on bad input."""
    source = Source(file.name, str(file), file)
    lines = list(dict.fromkeys(samples(source)))
    check(source, whole=True)
    if dropped := source.lines_dropped[NOT_UTF8]:
        print(f"note: {file}: lines that are not UTF-8 are left out: {dropped:,}", file=sys.stderr)
    if len(lines) < 2 * DRAWS:
        sys.exit(
            f"error: {file} has {len(lines)} different lines, and {2 * DRAWS} are needed: half of them are scored, the "
            "others calibrate the quantization"
        )
    return lines


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of every text, in the order of the texts; a text that has only special tokens is left out."""
    if not len(texts):
        return []
    encoded = tokenizer(list(texts), truncation=True)["input_ids"]  # at model_max_length
    special = set(tokenizer.all_special_ids)
    return [ids for ids in encoded if not special.issuperset(ids)]


# ------------------------------------------------------------------------------------------------------ what we measure


@dataclass
class Texts:
    """The texts that all runs are measured on."""

    held_out: list[str]
    scored: int  # number of held-out texts that are scored under each quantization
    calibration: list[str]  # of the training split; divided into several draws
    published: list[str]  # of the held-out split; joined for the published setting
    calibration_batches: int


def measure(run: Run, texts: Texts, batch_size: int, check: bool, execute: Callable | None) -> None:
    """Fill in everything that is measured of a run.

    `check`: whether the instrument checks itself on this model; `execute`: executed.execute, or None to omit it.

    Raises:
        NotFinite: the weights hold NaN or infinities; nothing was filled in.
    """
    model, tokenizer = load(run.model)
    sinks = softmax1.learned_sinks(model)
    for name, parameter in model.named_parameters():
        is_softmax = (parameter == -math.inf) if name in sinks else False  # log n of a head with n = 0
        if not (parameter.isfinite() | is_softmax).all():
            raise NotFinite(f"{run.name} was not measured: its weights hold NaN or infinities, the first in {name}.")
    n = getattr(model.config, "softmax_n", 0.0)
    if run.results and n != run.results["softmax_n"]:
        sys.exit(f"error: {run.model} has n = {n}, but {run.file} is of a run with n = {run.results['softmax_n']}")
    if run.results:  # texts longer than those of the training would not show what was trained
        trained = run.results["settings"].get("max_length", MAX_LENGTH)
        tokenizer.model_max_length = min(tokenizer.model_max_length, trained)
    run.max_length = tokenizer.model_max_length
    run.digest = weights_sha256(model)
    run.weights = weight_statistics(model)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    ids = sorted(token_ids(tokenizer, texts.held_out), key=len)
    if not ids:
        sys.exit(f"error: {run.name}: its tokenizer finds no token in the held-out texts")

    batches = tqdm(padded_batches(tokenizer, ids, batch_size), desc=f"{run.name}: activations", unit="batch")
    run.places, run.attention, lengths = measure_model(model, batches, tokenizer)
    run.tokens = sum(lengths)
    learned_n = [math.exp(log_n) for layer in run.attention.values() for log_n in layer.get("log_n", ())]
    own_weights = getattr(model.config, "attention_weights", None)
    run.attention_uniform = uniform_attention(lengths, learned_n or n, own_weights)
    if (untrained := untrained_model(model, run.results)) is not None:
        batches = tqdm(padded_batches(tokenizer, ids, batch_size), desc=f"{run.name}: untrained", unit="batch")
        run.untrained = dict(zip(("places", "attention"), measure_model(untrained, batches, tokenizer), strict=False))
        del untrained
    run.histograms = ffn_histograms(
        model, padded_batches(tokenizer, ids[:: max(1, len(ids) // HISTOGRAM_TEXTS)], batch_size)
    )
    run.maps = attention_maps(model, tokenizer, ids, run.attention)

    masks = MaskedLMCollator(tokenizer, mlm_probability=MLM_PROBABILITY, seed=HELD_OUT_SEED)
    scored_ids = [ids[i] for i in evenly_spread(len(ids), texts.scored)]
    scored = held_out_batches({"input_ids": scored_ids}, masks, batch_size)
    intervention_ids = [scored_ids[i] for i in evenly_spread(len(scored_ids), INTERVENTION_TEXTS)]
    intervention_batches = held_out_batches({"input_ids": intervention_ids}, masks, batch_size)
    run.interventions = interventions(model, intervention_batches, tokenizer)
    measure_quantization(run, texts, model, tokenizer, masks, scored, check, execute)


def measure_quantization(
    run: Run,
    texts: Texts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    masks: MaskedLMCollator,
    scored: list[dict],
    check: bool,
    execute: Callable | None,
) -> None:
    """Fill in the damage by every quantization, simulated and executed, and the instrument's check of itself."""
    draws = calibration_draws(tokenizer, texts.calibration, masks)
    if not draws:
        sys.exit(f"error: {run.name}: its tokenizer finds no token in the training texts")
    # As in Bondarenko et al.: texts from the start of the held-out split, joined and cut into full sequences.
    limit = texts.calibration_batches * CALIBRATION_SIZE
    sequences = joined(token_ids(tokenizer, texts.published), min(PUBLISHED_LENGTH, run.max_length))[:limit]
    published = held_out_batches({"input_ids": sequences}, masks, CALIBRATION_SIZE)
    run.damage = {
        "sequences": sum(len(batch["input_ids"]) for batch in scored),
        "calibration_tokens": {"draws": list(map(real_tokens, draws)), "published": real_tokens(published)},
        **measure_damage(model, scored, draws, published, run.name),
    }
    if execute:
        outside = {"error": "its attention is not from transformers' attention interface"}
        run.damage["executed"] = outside if hides_attention(model) else execute(model, scored, draws[0], run.damage)
        if error := run.damage["executed"].get("error"):
            print(f"note: {run.name} was not executed in INT8: {error}", file=sys.stderr)
    if check:
        run.damage["self_check"] = self_check(model, scored, draws[0])


def calibration_draws(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], masks: MaskedLMCollator
) -> list[list[dict]]:
    """DRAWS lists of calibration batches that share no text, the same for every run with this tokenizer."""
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    draws = []
    for i in range(DRAWS):
        if ids := token_ids(tokenizer, shuffled[i::DRAWS]):
            draw = held_out_batches({"input_ids": ids}, masks, CALIBRATION_SIZE)
            # The running range forgets early batches: if they were sorted by length, the longest texts would decide it.
            random.Random(i).shuffle(draw)
            draws.append(draw)
    return draws


def real_tokens(batches: list[dict]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def untrained_model(model: PreTrainedModel, results: dict | None) -> PreTrainedModel | None:
    """The model as it was before its first update, on the same device; None where that cannot be verified.

    The model is built again from class, config and seed. Its weights must have the digest that training recorded for
    the initial weights, because another version of a package may draw different random numbers.
    """
    expected = ((results or {}).get("model") or {}).get("initial_weights")
    if expected is None:
        return None
    transformers.set_seed(results["seed"])
    built = type(model)(copy.deepcopy(model.config))
    return built.eval().to(model.device) if weights_sha256(built, leave_out=OWN_PARAMETERS) == expected else None


def weight_statistics(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """{weight: {"kurtosis" (scipy, float64; NaN where all entries are equal), "inf_norm", and its rounding_errors}}."""
    statistics = {}
    for name, parameter in weights_of(model).items():
        values = parameter.detach().numpy().ravel().astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns about constant parameters
            kurtosis = float(scipy.stats.kurtosis(values))
        statistics[name] = {"kurtosis": kurtosis, "inf_norm": float(np.abs(values).max()), **rounding_errors(parameter)}
    return statistics


@torch.inference_mode()
def ffn_histograms(model: PreTrainedModel, batches: list[dict]) -> dict[str, np.ndarray]:
    """Counts in runs.BINS of the standardised FFN output of every layer, on a few texts."""
    outputs: dict[str, list[torch.Tensor]] = {}
    mask = None

    def keep(layer: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        outputs.setdefault(layer, []).append(output[mask].flatten().float().cpu())

    with Hooks((module, partial(keep, layer)) for layer, module in modules_by_layer(model, FFN)):
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask = batch["attention_mask"].bool()
            model.base_model(**batch)
    counts = {}
    for layer, batch_outputs in outputs.items():
        values = torch.cat(batch_outputs).double().numpy()
        scores = (values - values.mean()) / (values.std() or 1.0)
        counts[layer.replace(".", " ")] = np.histogram(np.clip(scores, BINS[0], BINS[-1]), BINS)[0]
    return counts


@torch.inference_mode()
def attention_maps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], attention: dict
) -> list[tuple[str, list[str], np.ndarray, np.ndarray]]:
    """(caption, tokens, weights, null mass by query) of the head with the largest idle mass, on a few short texts."""
    if not attention:
        return []
    short = [text for text in ids if len(text) in MAPPED_LENGTH] or ids
    idle = {
        (layer, head): mass for layer, of_layer in attention.items() for head, mass in enumerate(of_layer["idle_mass"])
    }
    layer, head = max(idle, key=idle.get)
    maps = []
    for i in evenly_spread(len(short), MAPPED_TEXTS):
        text = short[i][: MAPPED_LENGTH[-1]]
        with eager_attention(model):
            output = model.base_model(torch.tensor([text], device=model.device), output_attentions=True)
        weights = output.attentions[int(layer.partition(".")[2])][0, head].float().cpu().numpy()
        # A token of a byte-level tokenizer that is half a letter decodes to the replacement character; show a dot.
        tokens = [tokenizer.decode([token_id]).strip().replace("\ufffd", "·") or "_" for token_id in text]
        maps.append((f"{layer.replace('.', ' ')}, head {head}", tokens, weights, 1 - weights.sum(1)))
    return maps


# --------------------------------------------------------------------------------------------- what was measured before


# The modules that figures are computed with: when one of them changes, models are measured again.
CODE = (
    "controls executed held_out hooks interventions kurtosis measurement outliers packing quantization softmax1".split()
)
MEASURED = (
    "digest max_length tokens weights places attention attention_uniform untrained interventions damage histograms maps"
).split()


def made_with(texts: Texts, batch_size: int, execute: bool) -> dict:
    """What figures depend on besides the model: texts and settings, our code, packages, and the kind of device."""
    settings = json.dumps([asdict(texts), batch_size, execute], sort_keys=True)
    code = hashlib.sha256()
    for name in CODE:
        code.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return {
        "texts": len(texts.held_out),
        "texts_and_settings": hashlib.sha256(settings.encode()).hexdigest(),
        "code": code.hexdigest(),
        "packages": {name: version for name, version in versions().items() if name != "python"},
        "cuda": torch.cuda.is_available(),
    }


def model_sha256(run: Run) -> str:
    """SHA-256 of a run's model folder: its configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(run.model).iterdir()):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def results_sha256(run: Run) -> str:
    return hashlib.sha256(json.dumps(run.results, sort_keys=True).encode()).hexdigest()


def read_measured(run: Run, file: Path) -> dict | None:
    """What an earlier analysis wrote about a run; None where the file is missing, damaged or about other results."""
    try:
        measured = json.loads(file.read_text(encoding="utf-8"), object_hook=_decoded)
        complete = {*MEASURED, "model", "made_with", "git"} <= measured.keys()
        return measured if complete and measured["results"] == results_sha256(run) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # then the run is measured again


def take(run: Run, measured: dict) -> None:
    """Fill in a run with what read_measured returned."""
    for name in MEASURED:
        setattr(run, name, measured[name])
    run.made_with, run.measured_at = measured["made_with"], measured["git"]


def measured_already(run: Run, file: Path, wanted: dict, check: bool) -> bool:
    """Fill in a run from `file`, if that is about this model and was made with `wanted`; returns whether it was.

    `check`: whether the file must hold the self-check. Where the model folder is gone, only texts and settings have to
    agree: a note in the report then says where code or packages differ.
    """
    measured = read_measured(run, file)
    if Path(run.model).is_dir():
        if measured is None or measured["made_with"] != wanted or measured["model"] != model_sha256(run):
            return False
        if check and "self_check" not in measured["damage"]:
            return False
    elif measured is None or measured["made_with"]["texts_and_settings"] != wanted["texts_and_settings"]:
        sys.exit(
            f"error: {run.file} has no model folder {run.model}, and {file} is damaged, or of another training, other "
            "texts or other settings: set --models_dir, or move the results file away"
        )
    take(run, measured)
    return True


def take_measured(runs: list[Run], folder: Path) -> int:
    """Fill in all runs from `folder`, without models or texts; returns the number of texts.

    Exits with one line if a run was not measured, or if two runs were measured on different texts or settings.
    """
    for run in runs:
        if (measured := read_measured(run, folder / f"{run.name}.json")) is None:
            sys.exit(
                f"error: {folder / run.name}.json is missing, damaged or of another training: measure it, without "
                "--report_only, where the models are"
            )
        take(run, measured)
        if run.made_with["texts_and_settings"] != runs[0].made_with["texts_and_settings"]:
            sys.exit(
                f"error: {runs[0].name} and {run.name} were measured on different texts or with different settings: "
                "measure them again, without --report_only, where the models are"
            )
    return runs[0].made_with["texts"] if runs else 0


def keep_measured(run: Run, file: Path, made: dict) -> None:
    """Write what was measured of a run. NaN and infinities are kept."""
    run.made_with, run.measured_at = made, git_state()
    source = {"results": results_sha256(run), "model": model_sha256(run), "made_with": made, "git": run.measured_at}
    values = source | {name: getattr(run, name) for name in MEASURED}
    write_whole(file, json.dumps(_encoded(values), allow_nan=False).encode())


def _encoded(value):
    """`value` in a form that strict JSON can represent: it has no NaN, infinity or arrays."""
    if isinstance(value, dict):
        return {key: _encoded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return {"array": _encoded(value.tolist()), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return _encoded(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decoded(entry: dict):
    if entry.keys() == {"float"}:
        return float(entry["float"])
    if entry.keys() == {"array", "dtype"}:
        return np.array(entry["array"], dtype=entry["dtype"])
    return entry
