"""The sections of the report with a row for each arm: activations, attention, weights, others' figures.

A section is a heading, a table and a caption. A cell is the mean over the runs of an arm that did not diverge.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from interventions import DRAWS as RANDOM_DRAWS
from interventions import INTERVENTIONS
from outliers import (
    ATTENDING,
    EMBEDDINGS,
    FFN_PLACES,
    IDLE,
    LOGITS,
    MASSIVE,
    MASSIVE_RATIO,
    NEAR_ZERO,
    OUTLIER,
    PLACES,
    SHORT,
    SINK,
    SINK_RATES,
    TOKEN_CLASSES,
)
from runs import Run, arms
from tables import figure, over_runs, table

# {sink_rate_first_renormalised_short: "sink rate, first token, renormalised, short"}
SINK_LABELS = {
    key: "sink rate, " + key.removeprefix("sink_rate_").replace("any_or_null", "any or nowhere").replace("_", ", ")
    for key in SINK_RATES
}
# Full kurtosis (Gaussian = 3), BERT-base on English text: Bondarenko et al. 2023, clipped softmax with gamma = -0.03.
# ± as they give it: over two trained models, each quantized three times.
QUALCOMM = {
    "BERT-base, softmax (published)": ("4.49 ± 0.01", "735 ± 55", "3,076 ± 262", "1,294 ± 1,046"),
    "BERT-base, clipped softmax (published)": ("4.41 ± 0.01", "20 ± 1", "80 ± 6", "4.55 ± 0.01"),
}


def arm_sections(runs: list[Run], sequences: int) -> list[str]:
    """All sections of this file, for the runs of one set."""
    measured = [run for run in runs if not run.diverged]
    return [
        "## Beside others' figures",
        qualcomm_table(runs),
        "*Full kurtosis here, 3 for a Gaussian (our other tables have excess kurtosis, 3 less): mean over layers of "
        "the FFN output and the output LayerNorm. Infinity norm: mean over sequences, in the largest layer of the FFN "
        "output. Model, language, text and tokenizer differ: compare not the perplexities of different rows, but how "
        "far each row rises from the first to the last columns (Bondarenko et al., NeurIPS 2023; their ±: two models, "
        "each quantized three times). Ours: mean ± sample standard deviation over the runs of an arm.*",
        *(activation_sections(measured) if measured else []),
        *(attention_sections(measured, sequences) if any(run.attention for run in measured) else []),
        "## Weights",
        weights_table(runs),
        "*Kurtosis: excess kurtosis over all entries of a parameter, mean over the parameters. The other columns show "
        "the parameter with the largest value. Error: ||W - Q(W)|| / ||W||, symmetric, 8 bits per tensor or 4 bits per "
        "group.*",
    ]


def by_arm(header: list[str], runs: list[Run], subjects: dict[str, Any], cells: Callable) -> str:
    """A table with a row for every subject and arm.

    Args:
        header: of the columns, that of the row labels first.
        runs: of all arms.
        subjects: {label of the row: the first argument of `cells`}.
        cells: (subject, runs of an arm that did not diverge) -> the cells of the row.
    """
    return table(header, arm_rows(header, runs, subjects, cells))


def arm_rows(header: list[str], runs: list[Run], subjects: dict[str, Any], cells: Callable) -> list[list[str]]:
    """The rows of `by_arm`."""
    rows = []
    for label, subject in subjects.items():
        for arm, of_arm in arms(runs).items():
            measured = [run for run in of_arm if not run.diverged]
            row = cells(subject, measured) if measured else ["diverged"] * (len(header) - 1)
            rows.append([f"{label}, {arm}" if label else arm, *row])
    return rows


def same(names) -> dict[str, str]:
    """Subjects of `by_arm` that are their own labels."""
    return {name: name for name in names}


def layers_of(runs: list[Run], place: str) -> list[tuple[str, dict]]:
    """("layer <i>", statistics of the place) for every layer of the runs; one entry a run for places outside layers."""
    return [
        (name.removesuffix(f".{place}").replace(".", " "), statistics)
        for run in runs
        for name, statistics in run.places.items()
        if name.rpartition(".")[2] == place
    ]


def mean_of(runs: list[Run], place: str, statistic: str, reduce=np.mean) -> float:
    """Mean over runs of a statistic that `reduce` combines over layers; NaN where a model lacks the place."""
    of_runs = [[layer[statistic] for _, layer in layers_of([run], place)] for run in runs]
    return float(np.mean([reduce(layers) if layers else np.nan for layers in of_runs]))


# -------------------------------------------------------------------------------------------------- others' figures


def qualcomm_table(runs: list[Run]) -> str:
    def perplexity(measured: list[Run], scheme: str) -> str:
        schemes = [run.damage["schemes"] for run in measured]
        values = [of_run[scheme]["perplexity"] for of_run in schemes if scheme in of_run]
        return over_runs(values) if values else "–"

    def activations(measured: list[Run], places: tuple, statistic: str, reduce=np.mean, shift: float = 0.0) -> str:
        values = [np.mean([mean_of([run], place, statistic, reduce) for place in places]) + shift for run in measured]
        return "–" if np.isnan(values).all() else over_runs(values)

    def cells(_, measured: list[Run]) -> list[str]:
        return [
            perplexity(measured, "float32"),
            activations(measured, ("ffn_output",), "inf_norm", np.max),
            activations(measured, ("ffn_output", "ffn_layernorm"), "kurtosis_sequence", shift=3.0),
            perplexity(measured, "w8a8_published"),
            perplexity(measured, "w8a8_static"),
        ]

    header = ["", "perplexity", "infinity norm", "full kurtosis", "W8A8 perplexity", "W8A8 perplexity, our setting"]
    published = [[name, *figures, "–"] for name, figures in QUALCOMM.items()]
    return table(header, published + arm_rows(header, runs, {"": None}, cells))


# ------------------------------------------------------------------------------------------------------ activations


def activation_sections(runs: list[Run]) -> list[str]:
    return [
        "## Activations by place",
        places_table(runs),
        "*Kurtosis is excess kurtosis, 0 for a Gaussian. Values are means over layers, except that the infinity norm "
        "(mean over sequences) and the share of the largest channel are those of the largest layer; then the mean over "
        "the runs of an arm. The residual stream is the input of a LayerNorm. DEFINITIONS.md defines every column.*",
        "## First token, separators, punctuation",
        classes_table(runs),
        "*Excess kurtosis over the channels of a token (mean over tokens, layers and runs of an arm), and the largest "
        "|x| of all tokens, layers and runs.*",
        "## Massive activations",
        massive_table(runs),
        f"*Massive (Sun et al. 2024): |x| is above {MASSIVE:g} and above {MASSIVE_RATIO:,.0f} times the median |x| of "
        "its text. Counts are of all layers, mean over the runs of an arm; then follow the largest entries, with token "
        "and position.*",
    ]


def places_table(runs: list[Run]) -> str:
    statistics = {  # column: (statistic, how its layers are reduced, factor)
        "kurtosis, sequence": ("kurtosis_sequence", np.mean, 1),
        "kurtosis, token": ("kurtosis_token", np.mean, 1),
        "kurtosis, pooled": ("kurtosis_pooled", np.mean, 1),
        "infinity norm": ("inf_norm", np.max, 1),
        f"% beyond ±{OUTLIER:g}": ("outlier_share", np.mean, 100),
        "% in largest channel": ("largest_channel_share", np.max, 100),
        "largest / median": ("top1_to_median", np.mean, 1),
    }

    def cells(place: str, of_arm: list[Run]) -> list[str]:
        return [figure(factor * mean_of(of_arm, place, name, reduce)) for name, reduce, factor in statistics.values()]

    return by_arm(["", *statistics], runs, same((*EMBEDDINGS, *PLACES, LOGITS)), cells)


def classes_table(runs: list[Run]) -> str:
    def cells(place: str, of_arm: list[Run]) -> list[str]:
        row = []
        for kind in TOKEN_CLASSES:
            tokens = [layer["classes"][kind] for _, layer in layers_of(of_arm, place) if kind in layer["classes"]]
            kurtosis, largest = ([of_layer[key] for of_layer in tokens] for key in ("kurtosis_token", "max_abs"))
            row.append(f"{figure(np.mean(kurtosis))} / {figure(np.max(largest))}" if tokens else "–")
        return row

    return by_arm(["kurtosis of a token / largest magnitude", *TOKEN_CLASSES], runs, same(FFN_PLACES), cells)


def massive_table(runs: list[Run]) -> str:
    """The number of massive activations (Sun et al.) in all layers, and the three largest of each arm."""

    def cells(place: str, of_arm: list[Run]) -> list[str]:
        layers = [(layer, statistics["massive"]) for layer, statistics in layers_of(of_arm, place)]
        counts = [
            figure(sum(massive[key] for _, massive in layers) / len(of_arm))
            for key in ("count", "above_100", "above_1000_medians")
        ]
        largest = [(entry, layer) for layer, massive in layers for entry in massive["top"]]
        largest.sort(key=lambda pair: -abs(pair[0]["value"]))
        entries = [entry_cell(entry, layer) for entry, layer in largest[:3]]
        return [*counts, *entries, *["–"] * (3 - len(entries))]

    header = ["", "massive", "over 100", "over 1,000 medians", "largest", "second", "third"]
    return by_arm(header, runs, same(FFN_PLACES), cells)


def entry_cell(entry: dict, layer: str) -> str:
    # A token could be read as Markdown: as code, or as the border of a cell.
    token = entry["token"].strip().replace("`", "'").replace("|", "¦").replace("\ufffd", "·") or "_"
    return (
        f"{figure(entry['value'])} ({figure(entry['ratio'])} medians): `{token}` at {entry['position']}, "
        f"channel {entry['channel']}, {layer}"
    )


# -------------------------------------------------------------------------------------------------------- attention


def attention_sections(runs: list[Run], sequences: int) -> list[str]:
    return [
        "## Attention",
        attention_table(runs),
        f"*Mean over real queries (not padding), then over heads. A sink is a token that gets more than {SINK:g} of "
        f"the attention of a text's mean query (Gu et al. 2025), in texts of at least {SHORT} tokens. Renormalised: "
        "the weights of each query are divided by their sum. Idle: attention to the first token, to separators, to "
        "punctuation or to no token.*",
        "## Sinks and null mass, beside step 0 and uniform attention",
        sinks_table(runs),
        "*Null mass and raw sink rates differ between arms by construction: compare them with the model before its "
        f"first update, and with uniform attention, which gives every key 1 / (n + T), on the same {sequences:,} "
        f"texts. Short: texts of fewer than {SHORT} tokens. Nowhere: the null slot counts as one more key.*",
        *learned_section(runs),
        "## Vectors of the heads",
        vectors_table(runs),
        "*Mean over heads and runs; the largest logit is the largest of all heads. Norms are L2 norms of value and key "
        "vectors, by class of token. What the first token adds to the context is its weight times the norm of its "
        "value. The logit range is the largest minus the smallest logit of a query. Near zero: entries of a head's "
        f"context of at most {NEAR_ZERO:.0%} of the layer's root mean square. Context kurtosis is excess kurtosis, of "
        f"one head; active heads: those with an idle mass of at most {IDLE[0]:.0%}; attending queries: in each head, "
        f"those of whose attention at most {ATTENDING:.0%} goes to no token; attending heads: those for which that "
        "holds on average.*",
        "## Interventions",
        interventions_table(runs),
        "*Each intervention is measured on the same masked held-out text, mean over the runs of an arm. A sink head "
        f"gives one token, or the null slot, more than {SINK:.0%} of its attention in more than {SINK:.0%} of the "
        "texts; "
        '"without" it, its context is set to zero. As many other heads: mean of '
        f"{RANDOM_DRAWS} random draws. A dash: a run has no sink head, or too few other heads. The norm is that of the "
        "largest layer, the kurtosis the mean over layers.*",
    ]


def layers_table(runs: list[Run], statistics: dict[str, tuple]) -> str:
    """Attention by layer; `statistics` is {label: (statistic, function that combines the heads, factor)}."""
    depth = max(len(run.attention) for run in runs)

    def cells(statistic: tuple, of_arm: list[Run]) -> list[str]:
        name, reduce, factor = statistic
        of_layers = [[run.attention.get(f"layer.{i}", {}).get(name, [np.nan]) for run in of_arm] for i in range(depth)]
        return [figure(factor * float(np.mean([reduce(heads) for heads in of_runs]))) for of_runs in of_layers]

    return by_arm(["mean over heads", *(f"layer {i}" for i in range(depth))], runs, statistics, cells)


def attention_table(runs: list[Run]) -> str:
    def heads_beyond(bound: float) -> Callable:
        return lambda masses: np.nan if np.isnan(masses).any() else sum(mass > bound for mass in masses)

    return layers_table(
        runs,
        {
            "% on the first token": ("mass_first", np.mean, 100),
            "% on separators": ("mass_separator", np.mean, 100),
            "% on punctuation": ("mass_punctuation", np.mean, 100),
            "% on itself": ("mass_self", np.mean, 100),
            "% null": ("null_mass", np.mean, 100),
            "% idle (of other tokens)": ("idle_mass", np.mean, 100),
            **{f"{label}, %": (key, np.mean, 100) for key, label in SINK_LABELS.items() if not key.endswith("_short")},
            "entropy, nats": ("entropy", np.mean, 1),
            **{f"heads with idle mass > {bound:.0%}": ("idle_mass", heads_beyond(bound), 1) for bound in IDLE},
        },
    )


def sinks_table(runs: list[Run]) -> str:
    """Sink rates and null mass, beside those before training and those of uniform attention."""

    def cells(key: str, of_arm: list[Run]) -> list[str]:
        columns = []
        for attentions in ([run.attention for run in of_arm], [run.untrained.get("attention") for run in of_arm]):
            known = [np.mean([layer[key] for layer in attention.values()]) for attention in attentions if attention]
            columns.append(float(np.mean(known)) if len(known) == len(of_arm) else np.nan)
        columns.append(float(np.mean([run.attention_uniform[key] for run in of_arm])))
        return [figure(100 * value) for value in columns]

    header = ["%, mean over layers and heads", "trained", "at step 0", "uniform attention"]
    return by_arm(header, runs, {"null mass": "null_mass", **{label: key for key, label in SINK_LABELS.items()}}, cells)


def learned_section(runs: list[Run]) -> list[str]:
    """The trained n of the heads of each layer; nothing if no run trained its n."""
    learned = [run for run in runs if any("log_n" in layer for layer in run.attention.values())]
    if not learned:
        return []

    def cells(layer: str, of_arm: list[Run]) -> list[str]:
        n = np.exp([log_n for run in of_arm for log_n in run.attention.get(layer, {}).get("log_n", ())])
        return [figure(reduce(n)) if len(n) else "–" for reduce in (np.min, np.median, np.max)]

    layers = {layer.replace(".", " "): layer for run in learned for layer in run.attention}
    seeds = "/".join(sorted({str(len(of_arm)) for of_arm in arms(learned).values()}))
    return [
        "## Learned sinks: what n became",
        by_arm(["n, over heads and runs", "smallest", "median", "largest"], learned, layers, cells),
        f"*Runs of an arm: {seeds}. Every head began with n = 1; n has no weight decay.*",
    ]


def vectors_table(runs: list[Run]) -> str:
    norms = {
        f"{part} norm, {kind}": (f"{part}_norm_{kind}", np.mean, 1)
        for part in ("value", "key")
        for kind in TOKEN_CLASSES
    }
    return layers_table(
        runs,
        {
            **norms,
            "from the first token into the context": ("contribution_first", np.mean, 1),
            "logit range": ("logit_range", np.mean, 1),
            "largest logit": ("logit_max", np.max, 1),
            "% of context near zero": ("context_near_zero", np.mean, 100),
            "context kurtosis of a head": ("context_kurtosis", np.mean, 1),
            "context kurtosis, active heads": ("context_kurtosis_active", np.mean, 1),
            "% of queries that attend": ("attending_share", np.mean, 100),
            "context kurtosis, attending queries": ("context_kurtosis_attending", np.mean, 1),
            "context kurtosis, attending heads": ("context_kurtosis_attending_heads", np.mean, 1),
        },
    )


def interventions_table(runs: list[Run]) -> str:
    columns = {
        "loss": ("loss", "{:.4f}".format),
        "FFN output kurtosis": ("ffn_output_kurtosis", figure),
        "residual infinity norm": ("residual_inf_norm", figure),
        "sink rate, first, %": ("sink_rate_first", lambda share: figure(100 * share)),
        "null mass, %": ("null_mass", lambda share: figure(100 * share)),
        "heads set to zero": ("heads", figure),
    }

    def cells(name: str, of_arm: list[Run]) -> list[str]:
        if any(name not in run.interventions for run in of_arm):
            return ["–"] * len(columns)
        results = [run.interventions[name] for run in of_arm]
        return [show(float(np.mean([result[key] for result in results]))) for key, show in columns.values()]

    return by_arm(["", *columns], runs, {label: name for name, label in INTERVENTIONS.items()}, cells)


# ---------------------------------------------------------------------------------------------------------- weights


def weights_table(runs: list[Run]) -> str:
    kinds = {  # label: which parameters
        "attention query, key, value": r"attention\.self\.(query|key|value)\.weight$",
        "attention output": r"attention\.output\.dense\.weight$",
        "FFN, first": r"intermediate\.dense\.weight$",
        "FFN, second": r"\d\.output\.dense\.weight$",
        "LayerNorm": r"layer\.\d+\..*LayerNorm\.weight$",
        "word embeddings": r"word_embeddings\.weight$",
    }
    columns = {
        "kurtosis, mean": ("kurtosis", np.mean, 1),
        "largest magnitude": ("inf_norm", np.max, 1),
        "8-bit error, %": ("int8_error", np.max, 100),
        "4-bit error, %": ("int4_error", np.max, 100),
    }

    def cells(pattern: str, measured: list[Run]) -> list[str]:
        parameters = [[weight for name, weight in run.weights.items() if re.search(pattern, name)] for run in measured]
        row = []
        for key, reduce, factor in columns.values():
            of_runs = [[weight[key] for weight in of_run if key in weight] for of_run in parameters]
            known = all(of_runs)  # every model has such a parameter
            row.append(figure(float(np.mean([reduce(values) for values in of_runs])) * factor if known else None))
        return row

    return by_arm(["", *columns], runs, kinds, cells)
