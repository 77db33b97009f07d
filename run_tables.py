"""The sections of the report with a column for each run: summary, quantization damage, INT8 executed, published tables.

If there are more than FEW_RUNS runs, the columns are the arms of the headline's set, and `run_by_run` has the single
runs, one in each row.
"""

from __future__ import annotations

from collections.abc import Callable

from answer import noise_of_mean
from experiment import STEPS
from outliers import FFN
from published import ACTIVATIONS, PUBLISHED, PUBLISHED_FFN, WEIGHTS
from quantization import EXECUTED, GROUP_SIZE, MOMENTUM, SCHEMES
from record import by_layer, look_up
from runs import FEW_RUNS, Run, arms, ranges
from sets import comparison_sets, headline
from tables import (
    duration,
    each_once,
    ends,
    figure,
    gap_cell,
    machine,
    number,
    over_runs,
    plus_minus,
    shortest,
    signed,
    table,
    transposed,
)

OF_ARMS = "Mean ± sample standard deviation over the runs of an arm that did not diverge."


def columns_of(runs: list[Run]) -> dict[str, list[Run]]:
    """{heading of a column: its runs}.

    A column is one run; if there are more than FEW_RUNS, it is an arm of the headline's set: its runs that did not
    diverge.
    """
    if len(runs) <= FEW_RUNS:
        return {run.title: [run] for run in runs}
    columns = {}
    for arm, of_arm in arms(headline(runs)).items():
        complete = [run for run in of_arm if not run.diverged]
        counted = f"mean of {len(complete)} runs" if len(complete) > 1 else "1 run" if complete else "no run"
        if diverged := len(of_arm) - len(complete):
            counted += f", {diverged} diverged"
        columns[arm if len(of_arm) == 1 and complete else f"{arm} ({counted})"] = complete
    return columns


def measured_in(columns: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """The columns without the runs that diverged, because these were not measured; an empty column is left out."""
    left = {heading: [run for run in of_column if not run.diverged] for heading, of_column in columns.items()}
    return {heading: of_column for heading, of_column in left.items() if of_column}


def averaged(columns: dict[str, list[Run]]) -> bool:
    """Whether a column has more than one run, so that its cells are means."""
    return any(len(of_column) > 1 for of_column in columns.values())


# ----------------------------------------------------------------------------------------------- summary of the runs


def trained_on(runs: list[Run]) -> str:
    """Steps, text and hardware of the runs, and --test_pipeline for test runs; stated once if all runs agree."""
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
    return each_once(said) or "no results file"


def last_logged(history: list[list]) -> float | None:
    return history[-1][1] if history else None


def summary(columns: dict[str, list[Run]]) -> list[list[str]]:
    """Rows of the first table: label, published softmax0, published softmax1, ours."""

    def ours(key: str, show: Callable = number, take: Callable = lambda value: value) -> list[str]:
        return [cell([run.results and take(look_up(run.results, key, None)) for run in of], show) for of in each]

    def cell(values: list, show: Callable) -> str:
        known = [value for value in values if value is not None]
        shown = [show(value) for value in known]
        if len(set(shown)) < 2 or isinstance(known[0], (str, dict)):
            return each_once(shown) or "–"
        return over_runs(known, show)

    each = list(columns.values())
    return [
        *states(columns),
        ["softmax_n", "0", "1", *ours("softmax_n", shortest)],
        ["seed", "42", "42", *(ranges(run.results["seed"] for run in of if run.results) or "–" for of in each)],
        ["steps", f"{STEPS:,}", f"{STEPS:,}", *ours("training.steps", "{:,.0f}".format)],
        ["sequences seen", "4.57 M", "4.57 M", *ours("training.samples", "{:,.0f}".format)],
        ["training loss, mean of the whole run", "4.46", "4.44", *ours("training.loss_mean")],
        # Published: the mean of the last 1,000 steps.
        ["training loss, last logged", "3.79", "3.78", *ours("loss_history", take=last_logged)],
        ["held-out loss", "–", "–", *ours("validation.loss")],
        ["held-out loss by token frequencies alone", "–", "–", *ours("validation.unigram_loss")],
        ["held-out loss, the best without context", "–", "–", *ours("validation.context_free_loss")],
        ["held-out perplexity", "–", "–", *ours("validation.perplexity")],
        ["runtime", "9 h 16 m", "9 h 16 m", *ours("training.wall_seconds", duration)],
        # Published: at 1.212 USD an hour (AWS g5.2xlarge).
        ["cost, USD", "11.22", "11.24", *ours("training.cost_usd")],
        ["hardware", "1 × NVIDIA A10G", "1 × NVIDIA A10G", *ours("hardware", machine)],
    ]


def states(columns: dict[str, list[Run]]) -> list[list[str]]:
    """Rows that only some reports have: the comparison set of each run, and how its training ended."""
    if any(len(of_column) != 1 for of_column in columns.values()):
        return []
    runs = [run for (run,) in columns.values()]
    rows = []
    sets = comparison_sets(runs)
    if len(sets) > 1:
        names = {run: str(i) + " (headline)" * (i == 1) for i, group in enumerate(sets, start=1) for run in group.runs}
        rows.append(["comparison set", "–", "–", *(names.get(run, "–") for run in runs)])
    if any(run.diverged for run in runs):
        rows.append(["training", "complete", "complete", *(run.ending for run in runs)])
    return rows


def summary_section(runs: list[Run]) -> list[str]:
    columns = columns_of(runs)
    over = OF_ARMS if averaged(columns) else "n = 1 run a column."
    if len(columns) < len(runs) and len(comparison_sets(runs)) > 1:
        over += " These are the runs of the headline's set; the last section has the runs of other sets too."
    return [
        "## Summary of the runs",
        table(["", *PUBLISHED, *columns], summary(columns)),
        f"*{over} Ours: {trained_on(runs)}. Losses are in nats per masked token. The last logged loss is the mean over "
        "the steps since the previous log entry. The held-out loss has the same masks in every run. Published: "
        f"EsperBERTo (2023), one seed, {STEPS:,} steps of 16 sentences of OSCAR and Leipzig text.*",
    ]


# ----------------------------------------------------------------------------------------------- quantization damage


def scored_texts(runs: list[Run]) -> str:
    """The numbers of texts and masked tokens over which the losses are means."""
    damages = [run.damage for run in runs]
    return each_once(
        sorted(f"{of['sequences']:,} of the texts, {of['masked_tokens']:,} masked tokens" for of in damages)
    )


def calibration_text(runs: list[Run]) -> str:
    """The amount of text with which the static ranges were calibrated."""
    of_runs = [run.damage["calibration_tokens"]["draws"] for run in runs]
    return each_once(f"mean of {len(draws)} draws of {min(draws):,} to {max(draws):,} real tokens" for draws in of_runs)


def published_calibration(runs: list[Run]) -> str:
    """The amount of text with which the setting "as published" was calibrated."""
    return each_once(f"{run.damage['calibration_tokens']['published']:,}" for run in runs)


def schemes_table(columns: dict[str, list[Run]]) -> list[list[str]]:
    """Rows: label, then the loss, perplexity and gap of a scheme in each column."""

    def cell(schemes: list[dict | None]) -> str:
        if None in schemes:
            return "–"
        losses, perplexities = ([scheme[key] for scheme in schemes] for key in ("loss", "perplexity"))
        if len(schemes) == 1:
            return f"{losses[0]:.4f} / {figure(perplexities[0])} / {gap_over(schemes)}"
        return f"{over_runs(losses, '{:.4f}'.format)} / {over_runs(perplexities)} / {gap_over(schemes)}"

    return [
        [label, *(cell([run.damage["schemes"].get(scheme) for run in of]) for of in columns.values())]
        for scheme, label in SCHEMES.items()
    ]


def parts_table(columns: dict[str, list[Run]]) -> list[list[str]]:
    """Rows: label, then the gap in each column, where static W8A8 quantizes only one part of the model."""

    def gaps(of_column: list[Run], part: str) -> list[dict]:
        damage = [run.damage for run in of_column]
        return [{"gap": of_run["parts"].get(part), "floor": of_run["part_floors"].get(part)} for of_run in damage]

    parts = dict.fromkeys(part for of_column in columns.values() for run in of_column for part in run.damage["parts"])
    return [[f"W8A8 static in {part} alone", *(gap_over(gaps(of, part)) for of in columns.values())] for part in parts]


def gap_over(gaps: list[dict]) -> str:
    """The gap of one run with its standard error; of several runs mean ± deviation, or that it is below its noise.

    Args:
        gaps: {"gap", "floor"} of each run, and "error" where it is known.
    """
    values = [of_run["gap"] for of_run in gaps]
    if len(gaps) == 1:
        return gap_cell(gaps[0])
    if None in values or not any(values):
        return "–"
    return over_runs(values, floor=noise_of_mean([of_run["floor"] for of_run in gaps]))


def damage_section(runs: list[Run]) -> list[str]:
    columns = measured_in(columns_of(runs))
    if not columns:
        return []
    measured = [run for run in runs if not run.diverged]
    return [
        "## Quantization damage",
        table(["loss / perplexity / gap", *columns], schemes_table(columns) + parts_table(columns)),
        "*Held-out masked-LM loss (nats per masked token), perplexity exp(loss), and gap: the loss minus that of "
        f"float32; {scored_texts(measured)}. {plus_minus_of_gaps(columns)} W8A8 static: weights symmetric, activations "
        "asymmetric, one range for each tensor, determined beforehand on text that is not scored (running minimum and "
        f"maximum, momentum {MOMENTUM}, {calibration_text(measured)}); the arithmetic is simulated. Percentile, least "
        "squares: other ways to choose the ranges, on the first draw. As published: the setting of Bondarenko et al. "
        f"2023, calibrated on {published_calibration(measured)} tokens of held-out text (65,536 in their paper). "
        "Dynamic: one scale for each token and each row of weights. W4: 4-bit weights, one scale for each "
        f"{GROUP_SIZE} inputs. The last rows quantize one part of the model alone, on a part of the texts.*",
    ]


def plus_minus_of_gaps(columns: dict[str, list[Run]]) -> str:
    if averaged(columns):
        return f"{OF_ARMS} A mean gap that is smaller than its own noise is not shown."
    return (
        "± is the standard error of the gap over texts (and over draws of calibration texts); a gap below twice its "
        "standard error is noise."
    )


# -------------------------------------------------------------------------------------------------- INT8, executed


def executed_section(runs: list[Run]) -> list[str]:
    """The runs as ONNX Runtime executes them in 8 bits; nothing without --onnxruntime."""
    refused = [
        f"**{run.name} was not executed in INT8**: {run.damage['executed']['error']}"
        for run in runs
        if "error" in run.damage.get("executed", {})
    ]
    parts = [*refused]
    if columns := columns_of(executed_runs(runs)):
        parts += [executed_table(columns), executed_caption(columns)]
    return ["## INT8 that is executed", *parts] if parts else []


def executed_runs(runs: list[Run]) -> list[Run]:
    return [run for run in runs if "error" not in run.damage.get("executed", {"error": "not asked for"})]


def executed_table(columns: dict[str, list[Run]]) -> str:
    """A row for each column of the other tables and each format."""
    header = "|loss|gap|minus simulated|correlation|minus rounding alone|MB|milliseconds|speedup".split("|")
    rows = [
        [f"{label}, {heading}", *executed_cells([run.damage["executed"] for run in of_column], scheme)]
        for heading, of_column in columns.items()
        for scheme, label in EXECUTED.items()
    ]
    return table(header, rows)


def executed_cells(results: list[dict], scheme: str) -> list[str]:
    """The cells of a scheme, from what executed.execute returned; of several runs, mean ± deviation."""
    executed = [result["schemes"][scheme] for result in results]
    speeds = [result["latency"]["formats"][scheme] for result in results]
    twins = [result["agreement"].get(scheme) for result in results]
    latency = over_runs([speed["median"] for speed in speeds])
    agreement = ["–"] * 3  # of float32 there is nothing simulated
    if len(results) == 1:
        latency += f" ({ends(speeds[0]['q25'], speeds[0]['q75'])})"
        if twin := twins[0]:
            difference = f"{signed(twin['difference'])} ± {twin['error']:.4f}"
            agreement = [difference, figure(twin["correlation"]), signed(twin["arithmetic"])]
    elif None not in twins:
        agreement = [over_runs([twin[key] for twin in twins]) for key in ("difference", "correlation", "arithmetic")]
    return [
        over_runs([of_run["loss"] for of_run in executed], "{:.4f}".format),
        gap_over(executed),
        *agreement,
        over_runs([of_run["bytes"] / 1e6 for of_run in executed], "{:.1f}".format),
        latency,
        over_runs([speed["speedup"] for speed in speeds]),
    ]


def kernels_caption(result: dict) -> str:
    """The kernels of one model, by number format."""
    counts = {kind: result["operators"]["kernels"][kind] for kind in ("int8", "float32")}
    listed = {kind: ", ".join(f"{count} {name}" for name, count in of_kind.items()) for kind, of_kind in counts.items()}
    return " and ".join(f"{names} in {kind}" for kind, names in listed.items())


def latency_caption(result: dict) -> str:
    latency = result["latency"]
    return (
        f"one text of {latency['tokens']} tokens, {latency['predicted']} of them predicted, one thread, median and "
        f"quartiles of {latency['repetitions']} runs, the formats in turn, {result['hardware']['name']}"
    )


def executed_caption(columns: dict[str, list[Run]]) -> str:
    results = [run.damage["executed"] for of_column in columns.values() for run in of_column]
    latency, kernels = (each_once(map(said, results)) for said in (latency_caption, kernels_caption))
    over = "with its standard error over texts"
    if averaged(columns):
        over = "± of every column is the sample standard deviation over the runs of an arm"
    return (
        "*Executed by ONNX Runtime: static QDQ quantization, one range for each tensor, the texts and masks of the "
        f"table above. Gap: the loss minus that of float32 in ONNX Runtime, {over}. Minus simulated: the gap minus "
        "that of W8A8 static (MinMax) or of W8A8 percentile. Correlation: between the executed and the simulated "
        "changes of the loss, text by text; it says little where the gaps are below their noise. Minus rounding alone: "
        "the gap minus that of the same 8-bit graph computed in float32, which leaves the effect of integer "
        f"arithmetic. Latency: {latency}; speedup: the ratio of times of the same turn. Kernels that run: {kernels}. "
        "DEFINITIONS.md has what each figure covers.*"
    )


# ------------------------------------------------------------------------------------------------- published tables


def watched_in_training(runs: list[Run]) -> str:
    """The batches and steps from which the training-time kurtosis comes."""
    said = []
    for settings in (run.results["settings"] for run in runs if run.results):
        batches = "padding counted" if settings.get("padded", True) else "packed batches, so no padding counted"
        steps = settings.get("statistics_steps", 1)
        said.append(f"{batches}, every step" if steps == 1 else f"{batches}, every {steps}th step")
    return each_once(said) or "no results file"


def kurtosis_caption(runs: list[Run], sequences: int, data_dir) -> str:
    tokens, cut = (
        "/".join(f"{number:,}" for number in sorted({getattr(run, name) for run in runs if not run.diverged}))
        for name in ("tokens", "max_length")
    )
    return (
        "Excess kurtosis of all entries (tokens and channels) of a sequence, then the mean over the sequences. "
        f"Training: train mode (dropout on); published: padding counted, every step; ours: {watched_in_training(runs)} "
        f"({trained_on(runs)}). Held-out: the final model in eval mode, padding left out, n = {sequences:,} sequences "
        f"(evenly spread over the validation split of {data_dir}, cut at {cut} tokens, as in training; {tokens} real "
        "tokens)."
    )


def spread_caption(runs: list[Run], columns: dict[str, list[Run]]) -> str:
    """The meaning of ± in the published tables and in ours beside them."""
    layers = "/".join(sorted({str(len(by_layer(run.held_out, FFN))) for run in runs if not run.diverged}))
    over = f"mean ± population standard deviation over the layers of one run (n = {layers} layers; published: 6); "
    if averaged(columns):
        return f"{over}of an arm both are means over its runs, so ± is no deviation over seeds."
    return f"{over}one seed a column, so ± is no interval over seeds."


def kurtosis_rows(columns: dict[str, list[Run]], of: str, modules: list[tuple], when: str = "") -> list[list[str]]:
    """Rows: label, published softmax0, published softmax1, ours; `of` names the attribute of Run with the kurtoses."""
    return [
        [
            label + when,
            *published,
            *(plus_minus(*(by_layer(getattr(run, of), name) for run in runs)) for runs in columns.values()),
        ]
        for label, name, *published in modules
    ]


def weights_rows(columns: dict[str, list[Run]]) -> list[list[str]]:
    return kurtosis_rows(columns, "weight_kurtosis", WEIGHTS)


def activations_rows(columns: dict[str, list[Run]]) -> list[list[str]]:
    """Activations during training, then on held-out text, for which nothing was published."""
    unpublished = [(label, name, "–", "–") for label, name, *_ in ACTIVATIONS]
    training = kurtosis_rows(columns, "training", ACTIVATIONS, ", training")
    return training + kurtosis_rows(columns, "held_out", unpublished, ", held-out")


def published_sections(runs: list[Run], sequences: int, data_dir) -> list[str]:
    """The published tables, ours beside them."""
    columns = columns_of(runs)
    header = ["excess kurtosis", *PUBLISHED, *columns]
    return [
        "## Weights of attention.output, as published",
        table(header, weights_rows(columns)),
        f"*Excess kurtosis over all entries of one parameter of the saved model ({trained_on(runs)}): "
        f"{spread_caption(runs, columns)}*",
        "## Activations of attention.output, as published",
        table(header, activations_rows(columns)),
        f"*{kurtosis_caption(runs, sequences, data_dir)} Shown: {spread_caption(runs, columns)} The dropout row adds "
        "no information: with dropout 0.1 it is (K + 3) / 0.9 - 3, where K is the dense row, and in eval mode dropout "
        "changes nothing.*",
    ]


def lead_table(columns: dict[str, list[Run]], published: bool = True) -> str:
    """The FFN output by layer: two rows for each column of the other tables, in training and on held-out text."""
    rows = []
    if published:
        rows = [[f"{arm}, training", *layers] for arm, layers in zip(PUBLISHED, PUBLISHED_FFN, strict=True)]
    for heading, of_column in columns.items():
        for when, name in (("training", "training"), ("held-out", "held_out")):
            of_runs = [by_layer(getattr(run, name), FFN) for run in of_column]
            depth = min(map(len, of_runs), default=0)
            layers = [[values[i] for values in of_runs] for i in range(depth)]
            cells = [number(of_layer[0]) if len(of_layer) == 1 else over_runs(of_layer, number) for of_layer in layers]
            rows.append([f"{heading}, {when}", *cells, plus_minus(*of_runs)])
    depth = max(len(row) - 2 for row in rows)
    for row in rows:
        row[-1:-1] = ["–"] * (depth + 2 - len(row))  # models of different depth
    return table(["excess kurtosis", *(f"layer {i}" for i in range(depth)), "mean ± std"], rows)


def lead_section(runs: list[Run], sequences: int, data_dir) -> list[str]:
    columns = columns_of(runs)
    over = " Layers: mean ± sample standard deviation over the runs of an arm." if averaged(columns) else ""
    return [
        "## A lead, not a result: the FFN output (output.dense), layer by layer",
        lead_table(columns),
        f"*{kurtosis_caption(runs, sequences, data_dir)}{over} Last column: {spread_caption(runs, columns)} The "
        "published table leaves this module out, although the hypothesis is about the residual stream and the FFN "
        "output; the published rows above come from its result files.*",
    ]


# -------------------------------------------------------------------------------------------------------- run by run


def run_by_run(runs: list[Run]) -> list[str]:
    """Tables with a row for each run; nothing where the tables above have a column for each run already."""
    if len(columns_of(runs)) == len(runs):
        return []
    columns = {run.title: [run] for run in runs}
    measured = measured_in(columns)
    parts = [
        "## Run by run",
        "*The single runs behind the tables above, which have a column for each arm; the captions there define the "
        "figures. Rows with the same value in all runs are left out.*",
        "### Summary",
        transposed(["run", *columns], [[label, *ours] for label, _, _, *ours in summary(columns) if len({*ours}) > 1]),
        "### Quantization damage: loss / perplexity / gap",
        transposed(["run", *measured], schemes_table(measured)),
        f"*{plus_minus_of_gaps(measured)}*",
    ]
    if parts_rows := parts_table(measured):
        parts += ["### Static W8A8 in one part alone: gap", transposed(["run", *measured], parts_rows)]
    if executed := {run.title: [run] for run in executed_runs(runs)}:
        over = "*± is the standard error over texts; the quartiles of a latency follow it in brackets.*"
        parts += ["### INT8 that is executed", executed_table(executed), over]
    for title, rows in (("Weights", weights_rows(columns)), ("Activations", activations_rows(columns))):
        ours = [[label, *cells] for label, _, _, *cells in rows]
        parts += [f"### {title} of attention.output: excess kurtosis", transposed(["run", *columns], ours)]
    return [
        *parts,
        f"*Shown: {spread_caption(runs, columns)}*",
        "### The FFN output, layer by layer",
        lead_table(columns, published=False),
    ]
