"""Runs with made-up figures, for the tests of what is compared and concluded: no model is needed."""

from __future__ import annotations

import copy

from experiment import arm_name
from outliers import CONTEXTS, EMBEDDINGS, LOGITS, PLACES, SINK_RATES, TOKEN_CLASSES
from runs import Run
from softmax1 import LEARNED

RESULTS = {
    "test_pipeline": False,
    "emergence": [],
    "emergence_texts": 64,
    "effective_batch_size": 16,
    "dtype": "float32",
    "settings": {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "max_length": 512,
        "mlm_probability": 0.15,
        "vocab_size": 52032,
        "data_seed": None,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "lr_scheduler_kwargs": None,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "tf32": None,
        "padded": False,
        "attention": "auto",
        "torch_compile": False,
        "statistics_steps": 10,
    },
    "git": {"commit": "c" * 40, "dirty": False},
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
    "hardware": {"device": "cuda", "name": "NVIDIA H200", "count": 1},
    "dataset": {"sources": ["a"], "train_samples": 1000, "sha256": "d" * 64},
    "tokenizer": {"sha256": "e" * 64},
    "model": {"parameters": 83_529_024},
    "training": {"steps": 3000, "samples": 48_000, "wall_seconds": 60.0, "cost_usd": None, "loss_mean": 4.5},
    "loss_history": [[1, 10.9], [3000, 3.2]],
    "validation_loss_history": [[3000, 3.3]],
    "validation": {"loss": 3.3, "perplexity": 27.1},
    "weight_excess_kurtosis": {},
    "activation_excess_kurtosis": {},
}


CALIBRATION = {"part_floors": {}, "calibration_tokens": {"draws": [30, 32], "published": 65536}}


def changed(results: dict, changes: dict) -> dict:
    """A copy with the values at dotted keys replaced; the value `...` removes a key."""
    results = copy.deepcopy(results)
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = results
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return results


def made(n: float | str, seed: int, gap: float | None = 0.5, loss: float = 3.0, size: float = 1.0, **changes) -> Run:
    """A run whose static W8A8 loss is `loss` + `gap`; everything else that is measured is `size`.

    Keyword arguments change the results file: `settings__learning_rate=1e-4` is settings.learning_rate.
    """
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    results = changed({**RESULTS, "softmax_n": n if n == LEARNED else float(n), "seed": seed}, changes)
    steps = results["training"]["steps"]
    name = f"esperberto-{arm_name(n)}-seed{seed}" + ("" if steps == 3000 else f"-{steps}")
    if results.get("status") == "diverged":
        return Run(name, f"models/{name}", results)
    noise = {"error": 1e-6, "floor": 2e-6}
    schemes = {"float32": {"loss": loss, "gap": 0.0, "perplexity": 20.0 * size, **noise}}
    if gap is not None:
        schemes["w8a8_static"] = {"loss": loss + gap, "gap": gap, "perplexity": 30.0 * size, **noise}
    values = dict.fromkeys(
        "kurtosis_sequence kurtosis_token kurtosis_pooled inf_norm outlier_share largest_channel_share top1_to_median"
        " max_abs".split(),
        size,
    )
    values["classes"] = {kind: {"kurtosis_token": size, "max_abs": size} for kind in TOKEN_CLASSES}
    top = {"value": size, "ratio": size, "token": "la", "position": 1, "channel": 2}
    values["massive"] = {"count": 1, "above_100": 1, "above_1000_medians": 1, "top": [top]}
    masses = "mass_first mass_separator mass_punctuation mass_self null_mass idle_mass entropy".split()
    masses += ["context_near_zero", "attending_share"]
    heads = {key: [size / 10, size / 10] for key in (*masses, *SINK_RATES)} | dict.fromkeys(CONTEXTS, size)
    places = {f"layer.{layer}.{place}": values for layer in range(2) for place in PLACES}
    parameter = "roberta.encoder.layer.0.output.dense.weight"
    return Run(
        name,
        f"models/{name}",
        changed(results, {"weight_excess_kurtosis": {parameter: size}}),
        weights={parameter: {"kurtosis": size, "inf_norm": size, "int8_error": size, "int4_error": size}},
        places=places | dict.fromkeys((*EMBEDDINGS, LOGITS), values),
        attention={f"layer.{layer}": heads for layer in range(2)},
        attention_uniform=dict.fromkeys(("null_mass", *SINK_RATES), size / 10),
        damage={"schemes": schemes, "sequences": 4, "masked_tokens": 9, "parts": {}, "ranges": {}} | CALIBRATION,
        tokens=40,
    )


def diverged(n: float, seed: int, step: int = 1200, **changes) -> Run:
    """A run whose loss became NaN at that step: a results file without figures, and no model."""
    return made(
        n,
        seed,
        status="diverged",
        diverged={"step": step, "loss": None},
        training__steps=step,
        training__samples=16 * step,
        training__loss_mean=None,
        validation={"loss": None, "perplexity": None},
        validation_loss_history=[],
        loss_history=[[1, 10.9], [step, None]],
        **changes,
    )


def pairs(before: list[float], after: list[float], n: float = 1, loss: float = 3.0, after_loss=None, **changes):
    """Pairs of softmax0 and softmax_n with these gaps, seeds 42, 43, ..."""
    runs = []
    for seed, (one, other) in enumerate(zip(before, after, strict=True), start=42):
        other_loss = loss if after_loss is None else after_loss
        runs += [made(0, seed, one, loss, **changes), made(n, seed, other, other_loss, **changes)]
    return runs
