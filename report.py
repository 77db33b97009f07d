"""The report: the question, the answer in a sentence, the tables with published figures beside. Markdown and HTML.

Everything in it comes from runs that were measured (runs.py) and from comparisons of their pairs (pairs.py).
"""

from __future__ import annotations

import base64
import html
import re

import markdown
import numpy as np

from answer import BASELINE, GLANCE, METRICS, PRIMARY, answer
from controls import CHECKS
from outliers import EMBEDDINGS, IDLE, LOGITS, OUTLIER, PLACES, SINK, TOKEN_CLASSES
from pairs import CONFIDENCE, TEST, Comparison
from quantization import DRAWS, GROUP_SIZE, MOMENTUM, SCHEMES
from runs import Run, arms, by_layer, look_up
from tables import duration, figure, machine, number, plus_minus, spread, table

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


def watched_in_training(runs: list[Run]) -> str:
    """What the training-time kurtosis of the runs is of: padded or packed batches, every step or some."""
    said = []
    for settings in (run.results.get("settings", {}) for run in runs if run.results):
        steps = settings.get("statistics_steps", 1)
        said.append(
            ("padding counted" if settings.get("padded", True) else "packed batches, so no padding counted")
            + (", every step" if steps == 1 else f", every {steps}th step")
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


def comparison_table(compared: dict[str, Comparison], arm: str, keys) -> str:
    rows = []
    for key in keys:
        if key in compared:
            one = compared[key]
            interval = "one pair: no interval" if one.low is None else f"{figure(one.low)} to {figure(one.high)}"
            rows.append(
                [
                    f"**{METRICS[key][0]}**" if key == PRIMARY else METRICS[key][0],
                    spread(one.baseline_mean, one.baseline_std),
                    spread(one.mean, one.std),
                    figure(one.difference),
                    interval,
                ]
            )
    return table(["", BASELINE, arm, "difference", f"{CONFIDENCE:.0%} interval"], rows)


def gap_cell(one: dict) -> str:
    """A gap with its standard error; where it is below twice that, only that it is."""
    if not one["gap"]:
        return "–"
    if not np.isfinite(one["gap"]):
        return "not finite"
    if abs(one["gap"]) < one["floor"]:
        return f"below its noise of {one['floor']:.4f}"
    return f"{one['gap']:+.4f}" + (f" ± {one['error']:.4f}" if np.isfinite(one["error"]) else "")


def damage_table(runs: list[Run]) -> str:
    rows = []
    for scheme, label in SCHEMES.items():
        row = [label]
        for run in runs:
            one = run.damage["schemes"].get(scheme)
            row.append("–" if one is None else f"{one['loss']:.4f} / {figure(one['perplexity'])} / {gap_cell(one)}")
        rows.append(row)
    parts = list(dict.fromkeys(part for run in runs for part in run.damage["parts"]))
    for part in parts:
        gaps = [run.damage["parts"].get(part) for run in runs]
        rows.append([f"W8A8 static in {part} alone", *("–" if gap is None else f"{gap:+.4f}" for gap in gaps)])
    return table(["loss / perplexity / gap", *(run.name for run in runs)], rows)


VERDICTS = {True: "pass", False: "FAIL", None: "undecided"}


def self_check_table(runs: list[Run]) -> str:
    """What every part of the instrument's self-check found, on the first run of every arm."""
    checked = {run.name: run.damage["self_check"] for run in runs if "self_check" in run.damage}
    rows = []
    for key, label in CHECKS.items():
        cells = [f"{VERDICTS[found[key]['passed']]}: {found[key]['said']}" for found in checked.values()]
        rows.append([label, *cells])
    return table(["", *checked], rows)


def self_check_notes(runs: list[Run]) -> list[str]:
    """The first note of the report where the instrument failed on a model; nothing where it did not."""
    return [
        f"THE INSTRUMENT FAILED ITS OWN CHECK on {run.name} "
        f"({', '.join(CHECKS[key] for key in CHECKS if run.damage['self_check'][key]['passed'] is False)}): "
        "no quantization figure of this report may be used."
        for run in runs
        if run.damage.get("self_check", {}).get("passed", True) is False
    ]


def mean_of(runs: list[Run], place: str, statistic: str, pick=np.mean) -> float:
    """Of an arm: mean over its runs of the mean (or what `pick` does) over the layers; NaN where a place is lacking."""
    found = []
    for run in runs:
        layers = [values[statistic] for name, values in run.places.items() if name.rpartition(".")[2] == place]
        found.append(pick(layers) if layers else np.nan)
    return float(np.mean(found))


def places_table(runs: list[Run]) -> str:
    statistics = {
        "kurtosis, sequence": ("kurtosis_sequence", np.mean, 1),
        "kurtosis, token": ("kurtosis_token", np.mean, 1),
        "kurtosis, pooled": ("kurtosis_pooled", np.mean, 1),
        "infinity norm": ("inf_norm", np.max, 1),
        f"% beyond ±{OUTLIER:g}": ("outlier_share", np.mean, 100),
        "% in largest channel": ("largest_channel_share", np.max, 100),
        "largest / median": ("top1_to_median", np.mean, 1),
    }
    by_arm = arms(runs)
    rows = []
    for place in (*EMBEDDINGS, *PLACES, LOGITS):
        for arm, found in by_arm.items():
            cells = [figure(factor * mean_of(found, place, name, pick)) for name, pick, factor in statistics.values()]
            rows.append([f"{place}, {arm}", *cells])
    return table(["", *statistics], rows)


def classes_table(runs: list[Run]) -> str:
    rows = []
    by_arm = arms(runs)
    for place in ("ffn_output", "ffn_residual", "ffn_layernorm"):
        for arm, found in by_arm.items():
            row = [f"{place}, {arm}"]
            for kind in TOKEN_CLASSES:
                values = [
                    (one["classes"][kind]["kurtosis_token"], one["classes"][kind]["max_abs"])
                    for run in found
                    for name, one in run.places.items()
                    if name.endswith(f".{place}") and kind in one["classes"]
                ]
                row.append(f"{figure(np.mean(values, 0)[0])} / {figure(np.max(values, 0)[1])}" if values else "–")
            rows.append(row)
    return table(["kurtosis of a token / largest magnitude", *TOKEN_CLASSES], rows)


def attention_table(runs: list[Run]) -> str:
    labels = {
        "mass_first": "% on the first token",
        "mass_separator": "% on separators",
        "mass_punctuation": "% on punctuation",
        "mass_self": "% on itself",
        "null_mass": "% null",
        "idle_mass": "% idle (of other tokens)",
        "sink_rate_first": "sink rate, first, %",
        "sink_rate_any": "sink rate, any, %",
        "entropy": "entropy, nats",
    }
    rows = []
    depth = max(len(run.attention) for run in runs)
    for key, label in labels.items():
        for arm, found in arms(runs).items():
            row = [f"{label}, {arm}"]
            for layer in range(depth):
                values = [np.mean(run.attention.get(f"layer.{layer}", {}).get(key, [np.nan])) for run in found]
                row.append(figure(float(np.mean(values)) * (1 if key == "entropy" else 100)))
            rows.append(row)
    for bound in IDLE:
        for arm, found in arms(runs).items():
            row = [f"heads with idle mass > {bound:.0%}, {arm}"]
            for layer in range(depth):
                values = [
                    (np.array(run.attention[f"layer.{layer}"]["idle_mass"]) > bound).sum()
                    for run in found
                    if f"layer.{layer}" in run.attention
                ]
                row.append(figure(float(np.mean(values))) if values else "–")
            rows.append(row)
    return table(["mean over heads", *(f"layer {layer}" for layer in range(depth))], rows)


def weights_table(runs: list[Run]) -> str:
    kinds = {
        "attention query, key, value": r"attention\.self\.(query|key|value)\.weight$",
        "attention output": r"attention\.output\.dense\.weight$",
        "FFN, first": r"intermediate\.dense\.weight$",
        "FFN, second": r"\d\.output\.dense\.weight$",
        "LayerNorm": r"layer\.\d+\..*LayerNorm\.weight$",
        "word embeddings": r"word_embeddings\.weight$",
    }
    rows = []
    for label, pattern in kinds.items():
        for arm, found in arms(runs).items():
            row = [f"{label}, {arm}"]
            for key, pick in (
                ("kurtosis", np.mean),
                ("inf_norm", np.max),
                ("int8_error", np.max),
                ("int4_error", np.max),
            ):
                values = [
                    [one[key] for name, one in run.weights.items() if re.search(pattern, name) and key in one]
                    for run in found
                ]
                scale = 100 if key.endswith("error") else 1
                row.append(figure(float(np.mean([pick(one) for one in values])) * scale) if all(values) else "–")
            rows.append(row)
    return table(["", "kurtosis, mean", "largest magnitude", "8-bit error, %", "4-bit error, %"], rows)


# Full kurtosis (Gaussian = 3), BERT-base on English text: Bondarenko et al. 2023, table 2.
QUALCOMM = {
    "BERT-base, softmax (published)": ("4.49", "735", "3,076", "1,294"),
    "BERT-base, clipped softmax (published)": ("4.41", "20", "80", "4.55"),
}


def scheme(run: Run, name: str, key: str) -> float:
    """A figure of one quantization scheme; NaN where it was not measured."""
    return run.damage["schemes"].get(name, {}).get(key, np.nan)


def qualcomm_table(runs: list[Run]) -> str:
    rows = [[name, *cells] for name, cells in QUALCOMM.items()]
    for arm, found in arms(runs).items():
        kurtosis = np.mean([mean_of(found, place, "kurtosis_sequence") for place in ("ffn_output", "ffn_layernorm")])
        rows.append(
            [
                arm,
                figure(float(np.mean([run.damage["schemes"]["float32"]["perplexity"] for run in found]))),
                figure(mean_of(found, "ffn_output", "inf_norm", np.max)),
                figure(kurtosis + 3),
                figure(float(np.mean([scheme(run, "w8a8_static", "perplexity") for run in found]))),
            ]
        )
    return table(["", "perplexity", "infinity norm", "full kurtosis", "W8A8 perplexity"], rows)


def report(
    runs: list[Run],
    warned: list[str],
    compared: dict,
    sequences: int,
    data_dir,
    calibration_batches: int,
    pictures: dict[str, str],
) -> str:
    """The whole report as Markdown; `pictures` is {file name: caption}, shown behind the answer."""
    columns = [*PUBLISHED, *(run.name for run in runs)]
    weights = [
        [label, *published, *(plus_minus(by_layer(run.weight_kurtosis, suffix)) for run in runs)]
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
    scored = {
        f"{run.damage['sequences']:,} of the texts, {run.damage['masked_tokens']:,} masked tokens" for run in runs
    }
    scored = " / ".join(sorted(scored))
    spread_said = (
        f"mean ± population standard deviation over the layers of one run (n = {layers} layers; published: 6); one "
        "seed a column, so ± is no interval over seeds."
    )
    definition = (
        "Excess kurtosis of each sequence, its tokens and channels pooled, then the mean over the sequences. Training: "
        f"train mode (dropout on); published: padding counted, every step; ours: {watched_in_training(runs)} "
        f"({trained}). Held-out: the final model in eval mode, padding left out, n = {sequences:,} sequences (evenly "
        f"spread over the validation split of {data_dir}, cut at {MAX_LENGTH} tokens; {tokens} real tokens)."
    )
    others = ", ".join(arm for arm in arms(runs) if arm != BASELINE)
    glance, everything = [], []
    for arm, one in compared.items():
        some = next(iter(one.values()))
        glance.append(comparison_table(one, arm, GLANCE))
        everything.append(comparison_table(one, arm, METRICS))
        over = (
            "One pair of runs: no interval."
            if some.pairs == 1
            else f"Mean ± sample standard deviation over {some.pairs} seeds; interval: {TEST}."
        )
        glance.append(
            f"*{over} In bold the one metric that was named beforehand; the others explain it and are not corrected "
            f"for their number. n = {sequences:,} held-out texts; losses: {scored}.*"
        )
    parts = [
        "# Does softmax_n remove outliers and rescue quantization?",
        f'**Question.** "Attention Is Off By One" (Miller, 2023) says that softmax makes heads push activations to '
        f"extremes, and that an attention that may attend to nothing ({others or 'softmax1'}) does not. Does 8-bit "
        "quantization with static ranges, which extremes break, then cost less?",
        f"**Answer.** {answer(runs, compared)}",
        *glance,
        *(f"**Note.** {line}" for line in warned),
        *(f"![{caption}]({name})" for name, caption in pictures.items()),
        "## Summary of the runs",
        table(["", *columns], summary(runs)),
        f"*n = 1 run a column. Ours: {trained}. Losses in nats per masked token; the last logged one is the mean over "
        "the last logging window; the held-out loss has the same masks in every run. Published: EsperBERTo (2023), one "
        "seed, 285,899 steps of 16 sentences of OSCAR and Leipzig text.*",
    ]
    if everything:
        parts += [
            "## All comparisons",
            *everything,
            f"*Exploratory but for the bold row: at {CONFIDENCE:.0%}, one in twenty intervals misses 0 by chance. "
            "Lower is better except for the sink rates, the null mass and the idle heads, which are neither.*",
        ]
    parts += [
        "## Quantization damage",
        damage_table(runs),
        f"*Held-out masked-LM loss (nats per masked token), perplexity exp(loss), and the gap to float32; {scored}. "
        "A gap stands with its standard error over texts (and draws of calibration texts); below twice that it is "
        "noise. W8A8 static: weights symmetric, activations asymmetric, one range a tensor, fixed beforehand "
        f"on training text (running minimum and maximum, momentum {MOMENTUM}, mean of {DRAWS} draws of "
        f"{calibration_batches} batches), arithmetic simulated. Percentile, least squares: other ranges from the first "
        "draw. As published: the setting of Bondarenko et al. 2023, calibrated on the text that is scored. Dynamic: a "
        f"scale a token and a scale a row of weights. W4: weights only, a scale for {GROUP_SIZE} inputs. The last rows "
        "quantize one part alone, on some of the texts.*",
        "## Self-check of the instrument",
        self_check_table(runs),
        "*On a few of the texts and the first run of every arm: models with an outlier that is compensated, so that "
        "the function stays and static quantization breaks, in the layer that is known; and the same function in "
        "another class. DEFINITIONS.md says when a check passes; it is undecided where a model has learnt too little "
        "to lose.*",
        "## Beside others' figures",
        qualcomm_table(runs),
        "*Full kurtosis here, Gaussian = 3 (ours elsewhere is excess kurtosis, 3 less): mean over layers, FFN output "
        "and output LayerNorm; infinity norm: mean over sequences, largest layer of the FFN output. Another model, "
        "language, text and tokenizer: perplexities do not compare across rows, the jump from the first to the last "
        "column does (Bondarenko et al., NeurIPS 2023). Ours: mean over the runs of an arm.*",
        "## Activations by place",
        places_table(runs),
        "*Excess kurtosis (Gaussian = 0), mean over layers; infinity norm (mean over sequences) and share of the "
        "squares in the largest channel: largest layer; mean over the runs of an arm. The residual stream is what "
        "enters a LayerNorm. DEFINITIONS.md says what each column is.*",
        "## First token, separators, punctuation",
        classes_table(runs),
        "*Excess kurtosis over the channels of a token (mean over tokens and layers), and the largest |x| of all; mean "
        "and maximum over the runs of an arm.*",
        "## Attention",
        attention_table(runs),
        f"*Mean over real queries, then over heads; a sink is a token that gets more than {SINK:g} of a sequence's "
        "attention (Gu et al. 2025); idle: what goes to the first token, separators, punctuation or nowhere.*",
        "## Weights",
        weights_table(runs),
        "*Excess kurtosis over all entries of a parameter, mean over parameters; the others: the largest parameter. "
        "Error: ||W - Q(W)|| / ||W||, symmetric, 8 bits per tensor and 4 bits per group.*",
        "## Weights of attention.output, as published",
        table(["excess kurtosis", *columns], weights),
        f"*Excess kurtosis over all entries of one parameter of the saved model ({trained}): {spread_said}*",
        "## Activations of attention.output, as published",
        table(["excess kurtosis", *columns], activations),
        f"*{definition} Shown: {spread_said} The dropout row carries no information: with dropout 0.1 it is "
        "(K + 3) / 0.9 - 3 of the dense row, and in eval mode dropout is the identity.*",
        "## A lead, not a result: the FFN output (output.dense), layer by layer",
        table(["excess kurtosis", *(f"layer {i}" for i in range(depth)), "mean ± std"], lead),
        f"*{definition} Last column: {spread_said} The published table leaves this module out, though the hypothesis "
        "points at the residual stream and the FFN output; the published rows here come from its result files.*",
    ]
    return "\n\n".join(parts) + "\n"


# -------------------------------------------------------------------------------------------------------------- HTML

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #111; }}
h1 {{ font-size: 1.5rem; line-height: 1.2; }}
h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }}
img {{ max-width: 100%; height: auto; display: block; margin: 1rem auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; }}
th, td {{ padding: 0.25rem 0.6rem; border-bottom: 1px solid #ccc; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; min-width: 8rem; }}
em {{ color: #444; font-size: 0.9rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_page(text: str, pictures: dict[str, bytes]) -> str:
    """The Markdown report as one page that needs no other file: `pictures` ({name: PNG}) are put into it."""
    body = markdown.markdown(text, extensions=["tables"])
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    for name, picture in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"')
    return PAGE.format(title=html.escape(text.partition("\n")[0].lstrip("# ")), body=body)
