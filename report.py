"""The report as Markdown: question, answers, comparisons, and tables with the published figures beside ours.

It is made of measured runs (runs.py) and of comparisons of their pairs (answer.py). run_tables.py has the tables with a
column for each run, arm_tables.py those with a row for each arm.
"""

from __future__ import annotations

from answer import FLOAT32, GAPS, GLANCE, METRICS, PRIMARY, Finding, answer, metrics, noise
from arm_tables import arm_sections
from controls import CHECKS
from experiment import BASELINE, PRIMARY_ARM
from outliers import SHORT, SINK
from pairs import CONFIDENCE, TEST, Comparison, no_interval, own_means, percent
from quantization import SCHEMES
from questions import EXPLAINING, LABELS, SECONDARY, Answered, questions
from run_tables import (
    damage_section,
    executed_section,
    lead_section,
    published_sections,
    run_by_run,
    scored_texts,
    summary_section,
)
from runs import Run, arms, ranges
from sets import NOT_RECORDED, headline, in_a_pair, recorded
from tables import ends, figure, gap_cell, over_runs, table

NO_RECORD = {True: [], False: ["**This analysis, or a run in it, comes from uncommitted code: not a record.**"]}


def comparison_table(compared: dict[str, Comparison], arm: str, keys) -> str:
    """A row for each metric: both arms, the difference, its interval over seeds and, for gaps, that over texts."""

    def ratio(text: str) -> str:
        """The text of a ratio of geometric means, or of its interval, in brackets; empty where there is none."""
        return "" if text == "–" else f" (× {text})"

    rows = []
    for key in (key for key in keys if key in compared):
        label, comparison = METRICS[key], compared[key]
        rows.append(
            [
                f"**{label}**" if key == PRIMARY and arm == PRIMARY_ARM else label,
                *own_means(comparison),
                figure(comparison.difference) + ratio(figure(comparison.ratio)),
                no_interval(comparison)
                or ends(comparison.low, comparison.high) + ratio(ends(comparison.ratio_low, comparison.ratio_high)),
                ends(comparison.texts_low, comparison.texts_high),
            ]
        )
    level = percent(next(iter(compared.values())).confidence)
    return table(["", BASELINE, arm, "difference", f"{level} interval over seeds", "95% interval over texts"], rows)


VERDICTS = {True: "pass", False: "FAIL", None: "undecided"}


def self_check_table(runs: list[Run]) -> str:
    """The results of the instrument's self-check: a row for each checked run, a column for each check."""
    checked = {run.name: run.damage["self_check"] for run in runs if "self_check" in run.damage}
    rows = [
        [name, *(f"{VERDICTS[check[key]['passed']]}: {check[key]['said']}" for key in CHECKS)]
        for name, check in checked.items()
    ]
    return table(["", *CHECKS.values()], rows)


def self_check_notes(runs: list[Run]) -> list[str]:
    """A note for each model on which the instrument failed its self-check."""
    return [
        f"THE INSTRUMENT FAILED ITS OWN CHECK on {run.name} "
        f"({', '.join(CHECKS[key] for key in CHECKS if run.damage['self_check'][key]['passed'] is False)}): "
        "no quantization figure of this report may be used."
        for run in runs
        if run.damage.get("self_check", {}).get("passed", True) is False
    ]


# ----------------------------------------------------------------------------------------------- sections of the report


def set_tables(finding: Finding, keys, only: str | None = None) -> list[str]:
    """A table for each arm of a set, with a caption about its intervals; of the arm `only` alone, if the set has it."""
    shown = {only} if only in finding.compared else finding.compared.keys()
    parts = []
    for arm, comparisons in finding.compared.items():
        if arm not in shown:
            continue
        first = next(iter(comparisons.values()))
        caption = (
            "One pair of runs: no interval over seeds."
            if first.pairs == 1
            else f"Mean ± sample standard deviation over {first.pairs} seeds; interval: {TEST}."
        )
        if arm != PRIMARY_ARM:
            caption = f"Exploratory. {caption}"
            if finding.exploratory > 1:
                caption += f" Corrected for {finding.exploratory} exploratory arms (Bonferroni)."
        heading = [f"### {arm} and {BASELINE}"] if len(shown) > 1 else []
        parts += [*heading, comparison_table(comparisons, arm, keys), f"*{caption}*"]
    return parts


def answers(runs: list[Run], findings: list[Finding], asked: dict[str, Answered]) -> list[str]:
    """A sentence for each question, or the reason why there is none."""
    if not asked:
        return [f"**Answer.** {' '.join(answer(runs, findings))}"]
    level, explaining = (percent(1 - (1 - CONFIDENCE) / tests) for tests in (SECONDARY, EXPLAINING))
    return [
        f"**Answer.** The effects of {PRIMARY_ARM}, from pairs of runs with the same seed:",
        "\n".join(f"- **{LABELS[key]}.** {answered.said}" for key, answered in asked.items()),
        f"*{trained_with(findings[0])} Sinks, outliers and held-out loss are secondary questions: their {SECONDARY} "
        f"intervals share an error of 5% (Bonferroni, {level} each). INT8 is the primary question, named beforehand: "
        f"its interval has an error of 5% of its own. The last sentence explores a cause ({EXPLAINING} intervals of "
        f"{explaining}). ± is the sample standard deviation over seeds; a ratio is one of geometric means, and the "
        "means beside it are geometric too. DEFINITIONS.md has the rules.*",
    ]


def trained_with(finding: Finding) -> str:
    """A sentence about the conditions of the runs: batch, length, optimizer, number format."""
    run = finding.group.runs[0]
    conditions = {
        "effective_batch_size": "batches of {}",
        "settings.max_length": "at most {} tokens a text",
        "settings.learning_rate": "learning rate {}",
        "settings.weight_decay": "weight decay {}",
        "settings.optim": "{}",
        "dtype": "{}",
    }
    values = {key: recorded(run, key) for key in conditions}
    told = [conditions[key].format(value) for key, value in values.items() if value != NOT_RECORDED]
    return f"All these runs: {', '.join(told)}."


def opening(
    runs: list[Run], findings: list[Finding], asked: dict[str, Answered], sequences: int, record: bool
) -> list[str]:
    """The question, the answers, and a short table that compares the primary arm with softmax0."""
    glance = set_tables(findings[0], GLANCE, only=PRIMARY_ARM) if findings else []
    measured = [run for run in runs if not run.diverged]
    if glance:
        glance.append(
            "*Bold: the one metric that was named beforehand. The other metrics help to explain it; their intervals "
            "are not corrected for their number here. (× ...): the ratio of geometric means, for kurtosis the ratio of "
            f"full kurtosis (excess + 3). n = {sequences:,} held-out texts; losses: {scored_texts(measured)}. The "
            "interval over texts is a bootstrap interval: how much the difference depends on the choice of the scored "
            "texts. Renormalised: the attention weights of each query are divided by their sum. Null mass: the share "
            "of the attention that goes to no token (for softmax it is rounding error).*"
        )
    return [
        "# Does softmax_n remove outliers and rescue quantization?",
        *NO_RECORD[record],
        '**Question.** "Attention Is Off By One" (Miller, 2023) says that softmax makes attention heads push '
        "activations to extreme values, and that softmax1, with which a head may attend to nothing, does not. Static "
        "8-bit quantization suffers from extreme activations: does it cost less with softmax1?",
        *answers(runs, findings, asked),
        *glance,
    ]


def primary_section(runs: list[Run], findings: list[Finding], asked: dict[str, Answered]) -> list[str]:
    """All conclusions about the primary metric: other arms, other sets, losses, divergences."""
    return ["## INT8, the primary question: all that is concluded", *answer(runs, findings)] if asked else []


def dose_section(findings: list[Finding]) -> list[str]:
    """All arms of the headline's set side by side, ordered by n; nothing for a set of two arms."""
    by_arm = arms(in_a_pair(findings[0].group)) if findings else {}
    if len(by_arm) < 3:
        return []
    shown = {BASELINE: by_arm.pop(BASELINE)}
    for pairs in findings[0].group.pairs.values():  # an arm that lacks some seeds: softmax0 of those that it has
        if len(pairs) < len(shown[BASELINE]):
            shown[f"{BASELINE}, seeds {ranges(pairs)}"] = [pair[0] for pair in pairs.values()]
    shown |= dict(sorted(by_arm.items(), key=lambda item: item[1][0].arm_order))
    columns = {"": ["seeds", *(METRICS[key] for key in GLANCE)]}
    for heading, of_column in shown.items():
        measured = [run for run in of_column if not run.diverged]
        values = [metrics(run) for run in measured]
        lost = len(of_column) - len(measured)
        seeds = ranges(run.results["seed"] for run in of_column)
        columns[heading] = [f"{seeds} ({lost} diverged)" if lost else seeds]
        for key in GLANCE:
            floor = noise(measured, GAPS[key]) if key in GAPS and measured else None
            columns[heading].append(over_runs([of_run[key] for of_run in values], floor=floor))
    return [
        "## Dose response: all arms",
        table([*columns], [list(row) for row in zip(*columns.values(), strict=True)]),
        "*Mean ± sample standard deviation over the seeds of an arm that are in a pair; an arm that lacks some seeds "
        f"is to be read beside {BASELINE} of the seeds that it has. No test: comparisons with {BASELINE} by pairs, "
        'corrected for the number of arms, follow under "All comparisons".*',
    ]


def comparisons_section(findings: list[Finding]) -> list[str]:
    if not findings:
        return []
    parts = ["## All comparisons"]
    for i, finding in enumerate(findings):
        if i:
            parts.append(f"### Another set of {len(finding.group.runs)} runs, {finding.group.steps:,} steps")
        parts += set_tables(finding, METRICS)
    return [
        *parts,
        "*Only the bold row tests a hypothesis named beforehand; the rest is exploratory: one in twenty intervals of "
        "95% misses the true difference by chance. Lower is better, except for sink rates, null mass and idle heads, "
        "which are neither good nor bad in themselves: they differ between arms by construction, and a table below "
        "shows them beside step 0 and uniform attention.*",
    ]


def self_check_section(runs: list[Run]) -> list[str]:
    unchecked = [arm for arm, of_arm in arms(runs).items() if not any("self_check" in run.damage for run in of_arm)]
    return [
        "## Self-check of the instrument",
        self_check_table(runs),
        "*Checked on a few of the texts, with the first run of every arm that an analysis measured. The first two "
        "checks add an outlier to a layer and compensate it in the next weights: the function of the model stays the "
        "same, but static quantization has to fail in that layer. The third check computes the same function in "
        "another class. DEFINITIONS.md says when a check passes. A check is undecided where a model has learnt so "
        "little that quantization can hardly damage it."
        + (f" No run of these arms was checked: {', '.join(unchecked)}.*" if unchecked else "*"),
    ]


# The first picture follows the answer; the others stand between the heading and the table of their section.
LEAD_PICTURE = "emergence_seeds.png"
PICTURED = {
    "## Summary of the runs": ["loss.png"],
    "## Quantization damage": ["damage.png"],
    "## Activations by place": ["kurtosis.png", "norms.png", "histograms.png"],
    "## Attention": ["attention_map.png"],
    "## Sinks and null mass": ["emergence.png"],
}


def report(
    runs: list[Run],
    warned: list[str],
    findings: list[Finding],
    sequences: int,
    data_dir,
    pictures: dict[str, tuple[str, str]],
    record: bool,
) -> str:
    """The whole report as Markdown; `pictures` is {file name: (title, caption)}.

    `findings` comes from answer.findings; `record` says whether all code behind the figures is committed. Tables with a
    column for each run show all runs, tables by arm those of the headline's set.
    """
    measured = [run for run in runs if not run.diverged]
    asked = questions(findings)
    parts = [
        *opening(runs, findings, asked, sequences, record),
        *shown([LEAD_PICTURE], pictures),
        *(f"**Note.** {line}" for line in warned),
        *primary_section(runs, findings, asked),
        *dose_section(findings),
        *summary_section(runs),
        *comparisons_section(findings),
        *damage_section(runs),
        *(self_check_section(measured) if measured else []),
        *executed_section(runs),
        *arm_sections(headline(runs), sequences),
        *published_sections(runs, sequences, data_dir),
        *lead_section(runs, sequences, data_dir),
        *run_by_run(runs),
    ]
    return "\n\n".join(illustrated(parts, pictures)) + "\n"


def illustrated(parts: list[str], pictures: dict[str, tuple[str, str]]) -> list[str]:
    """The parts of a report, with the pictures of each section after its heading."""
    whole = []
    for part in parts:
        whole.append(part)
        for section, names in PICTURED.items():
            if part.startswith(section):
                whole += shown(names, pictures)
    return whole


def shown(names: list[str], pictures: dict[str, tuple[str, str]]) -> list[str]:
    """Those of these pictures that exist, each followed by its caption."""
    there = {name: pictures[name] for name in names if name in pictures}
    return [part for name, (title, caption) in there.items() for part in (f"![{title}]({name})", f"*{caption}*")]


# ------------------------------------------------------------------------------------ models outside the experiment

# Rows of the first table: metrics of answer.py, then quantization schemes.
OF_A_MODEL = (
    "residual_inf_norm",
    "residual_ratio",
    "residual_outliers",
    "ffn_output_inf_norm",
    "ffn_output_kurtosis",
    "attention_output_inf_norm",
    "sink_rate_first",
    "sink_rate_any",
    "idle_heads",
    "null_mass",
)
DAMAGE_OF_A_MODEL = ("bfloat16", "w8a8_static", "w8a8_percentile", "w8a8_dynamic", "w4_weight_only")


def absent_notes(runs: list[Run]) -> list[str]:
    """A note for each model whose attention cannot be measured."""
    return [
        f"{run.name} does not use transformers' attention interface: attention, static quantization and what needs "
        "them are absent."
        for run in runs
        if not run.diverged and not run.attention
    ]


def headline_of_models(runs: list[Run]) -> str:
    """The first table, with a column for each model: outliers, sinks, quantization damage."""
    values = [metrics(run) for run in runs]
    some_null = any((of_model["null_mass"] or 0) > 0.01 for of_model in values)  # %
    shown = [key for key in OF_A_MODEL if key != "null_mass" or some_null]
    rows = [[METRICS[key], *(figure(of_model[key]) for of_model in values)] for key in shown]
    rows.append([METRICS[FLOAT32], *(f"{of_model[FLOAT32]:.4f}" for of_model in values)])
    for scheme in DAMAGE_OF_A_MODEL:
        damages = [run.damage["schemes"].get(scheme) for run in runs]
        rows.append(
            [f"{SCHEMES[scheme]}: loss over that", *(gap_cell(damage) if damage else "–" for damage in damages)]
        )
    return table(["", *(run.name for run in runs)], rows)


def models_report(
    runs: list[Run], warned: list[str], sequences: int, source, pictures: dict[str, tuple[str, str]], record: bool
) -> str:
    """The report on models that are not a pair of the experiment; `source` is the dataset folder or the text file.

    The other arguments are those of `report`; no run has diverged.
    """
    names = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} models"
    text = f"every other line of {source}" if source.is_file() else f"the validation split of {source}"
    calibration = "the lines between" if source.is_file() else "the training split"
    tokens = "/".join(f"{run.tokens:,}" for run in runs)
    cut = "/".join(sorted({str(run.max_length) for run in runs}))
    one_each = len(arms(runs)) == len(runs)
    rows = "Further down, " + ("every model is an arm by itself." if one_each else "the runs that share n are an arm.")
    parts = [
        f"# Outliers, attention sinks and quantization damage: {names}",
        *NO_RECORD[record],
        headline_of_models(runs),
        f"*{sequences:,} texts, evenly spread over {text}, cut at {cut} tokens ({tokens} real tokens), in eval mode; "
        "padding is left out. Infinity norm: the largest magnitude in a text, averaged over the texts. Excess kurtosis "
        f"is 0 for a Gaussian. A sink is a token that gets more than {SINK:.0%} of the attention of a text's mean "
        f"query; its rate is the % of heads and texts, of texts of at least {SHORT} tokens. Losses are in nats per "
        f"masked token, of {scored_texts(runs)}; the ± of a loss over float32 is its standard error. Static "
        f"quantization is calibrated on {calibration}. A dash: the model has no such part, or it cannot be reached. "
        f"DEFINITIONS.md defines every row. {rows}*",
        *(f"**Note.** {line}" for line in warned),
        *shown([LEAD_PICTURE], pictures),
        *(summary_section(runs) if any(run.results for run in runs) else []),
        *damage_section(runs),
        *self_check_section(runs),
        *executed_section(runs),
        *arm_sections(runs, sequences),
        *run_by_run(runs),
    ]
    return "\n\n".join(illustrated(parts, pictures)) + "\n"
