"""Which runs may be compared: sets of runs that agree in everything that shapes the weights, and the pairs in a set.

A pair is a run of softmax0 and a run of another arm that belong to the same set and have the same seed. Tables by arm
show one set only, the headline's. DEFINITIONS.md ("Pairs of runs") explains the rules.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiment import BASELINE
from record import look_up, read_json
from runs import FEW_RUNS, Run, arms, named, ranges

# Everything besides the arm and the seed that determines the trained weights, as dotted keys of a results file.
SHAPING = """
dataset.sha256 dataset.train_samples tokenizer.sha256 training.steps training.samples effective_batch_size dtype
settings.gradient_accumulation_steps settings.num_train_epochs settings.max_steps settings.max_length
settings.mlm_probability settings.vocab_size settings.learning_rate settings.lr_scheduler_type
settings.lr_scheduler_kwargs settings.warmup_steps settings.warmup_ratio settings.weight_decay settings.adam_beta1
settings.adam_beta2 settings.adam_epsilon settings.optim settings.optim_args settings.max_grad_norm
settings.label_smoothing_factor settings.neftune_noise_alpha settings.dataloader_drop_last settings.bf16 settings.fp16
settings.tf32 settings.padded settings.attention settings.torch_compile settings.config_overrides model.parameters
test_pipeline
""".split()
PROCESSES = "number of processes"  # it follows from the batch sizes, because results files do not record it
REACHED = ("training.steps", "training.samples")  # a run that diverged stopped before it reached those of its set
# Must agree within a pair, but may differ between the pairs of a set.
OF_A_PAIR = ("settings.data_seed", "model.initial_weights")
# Should not change a result, but may: a note names the difference, and the runs are compared nevertheless.
CIRCUMSTANCES = ("git.commit", "hardware.device", "hardware.name")
NOT_RECORDED = "not recorded"


@dataclass
class ComparisonSet:
    """Runs that agree in everything that determines the weights, except the arm and the seed.

    `pairs` is {arm: {seed: (run of softmax0, run of the arm)}}; `refused` has a sentence for each refused pair.
    """

    runs: list[Run]
    pairs: dict[str, dict[int, tuple[Run, Run]]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return max(run.results["training"]["steps"] for run in self.runs)

    @property
    def samples(self) -> int:
        """The number of sequences that a run is trained on: steps x effective batch size."""
        return self.steps * self.runs[0].results["effective_batch_size"]

    @property
    def test_pipeline(self) -> bool:
        return self.runs[0].results["test_pipeline"]


def recorded(run: Run, key: str) -> str:
    """The value at a dotted key as text; texts are equal exactly if the values are. A missing key is a value too."""
    value = look_up(run.results, key, NOT_RECORDED)
    if key == "settings.data_seed" and value is None:
        value = run.results["seed"]  # without --data_seed, the seed determines the batches
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value).removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def shaping(run: Run) -> dict[str, str]:
    """{key: value as text} of everything in SHAPING and the number of processes."""
    values = {key: recorded(run, key) for key in SHAPING}
    # Gates and sinks belong to the arm: models are compared without them.
    if own := sum(look_up(run.results, f"model.{part}_parameters", None) or 0 for part in ("gate", "sink")):
        values["model.parameters"] = str(run.results["model"]["parameters"] - own)
    settings = run.results["settings"]
    shares = settings.get("per_device_train_batch_size"), settings.get("gradient_accumulation_steps")
    known = all(isinstance(share, int) and share > 0 for share in shares)
    values[PROCESSES] = f"{run.results['effective_batch_size'] / (shares[0] * shares[1]):g}" if known else NOT_RECORDED
    return {key: value for key, value in values.items() if not (run.diverged and key in REACHED)}


def comparison_sets(runs: list[Run]) -> list[ComparisonSet]:
    """The sets of the runs that have results, the headline's first.

    Sets of real runs come before sets of test runs (--test_pipeline), then sets with a pair before sets without, then
    sets trained on more sequences before others. A run that diverged joins the set with which it agrees in everything
    but steps and samples; if there are several, the one trained on most sequences.
    """
    trained = [run for run in runs if run.results]
    members_of: dict[tuple, list[Run]] = {}
    for run in sorted(trained, key=lambda run: run.diverged):  # those that diverged last; the order is kept otherwise
        own = shaping(run)
        key = tuple(own.items())
        if run.diverged:
            like = [other for other in members_of if {**dict(other), **own} == dict(other)]
            key = max(like, key=lambda other: ComparisonSet(members_of[other]).samples, default=key)
        members_of.setdefault(key, []).append(run)
    sets = [paired(ComparisonSet([run for run in trained if run in members])) for members in members_of.values()]

    def rank(group: ComparisonSet) -> tuple:
        return not group.test_pipeline, bool(group.pairs), group.samples, len(group.runs)

    return sorted(sets, key=rank, reverse=True)


def paired(group: ComparisonSet) -> ComparisonSet:
    """Fill in the pairs of a set. `refuse_duplicates` excludes two runs with the same arm and seed."""
    by_arm = {arm: {run.results["seed"]: run for run in runs} for arm, runs in arms(group.runs).items()}
    baseline = by_arm.pop(BASELINE, {})
    for arm, runs in by_arm.items():
        for seed in sorted(baseline.keys() & runs.keys()):
            pair = baseline[seed], runs[seed]
            differ = [key for key in OF_A_PAIR if len({recorded(run, key) for run in pair}) > 1]
            if differ:
                group.refused.append(
                    f"{pair[0].name} and {pair[1].name} are no pair: they differ in {' and '.join(differ)}."
                )
            else:
                group.pairs.setdefault(arm, {})[seed] = pair
    return group


def headline(runs: list[Run]) -> list[Run]:
    """The runs in tables by arm: those of the first set, and models without results, each of which is an arm by itself.

    Of a set with pairs, only the runs that are in a pair.
    """
    first = [run for group in comparison_sets(runs)[:1] for run in in_a_pair(group) or group.runs]
    return [run for run in runs if run in first or not run.results]


def in_a_pair(group: ComparisonSet) -> list[Run]:
    runs = [run for pairs in group.pairs.values() for pair in pairs.values() for run in pair]
    return list(dict.fromkeys(runs))


# --------------------------------------------------------------------------------------------------- what is refused


def refuse_duplicates(runs: list[Run]) -> None:
    """Exit with one line if two runs of a set have the same arm and seed: the pair could be made with either."""
    for group in comparison_sets(runs):
        seen: dict[tuple, Run] = {}
        for run in group.runs:
            arm, seed = run.arm, run.results["seed"]
            twin = seen.setdefault((arm, seed), run)
            if twin is not run:
                files = " and ".join(f"{of.file or of.name} (model {of.model})" for of in (twin, run))
                sys.exit(f"error: {files} are both {arm} with seed {seed}, trained alike: move one of them away")


def refuse_copies(runs: list[Run]) -> None:
    """Exit with one line if runs of different seeds have the same weights: copies of a model are no replicates."""
    for what, digest in (
        ("weights", lambda run: run.digest),
        ("initial weights", lambda run: recorded(run, "model.initial_weights")),
    ):
        seen: dict[str, Run] = {}
        for run in (run for run in runs if run.results):
            sha256 = digest(run)
            if sha256 in (None, "null", NOT_RECORDED):
                continue
            other = seen.setdefault(sha256, run)
            if other.results["seed"] != run.results["seed"]:
                sys.exit(
                    f"error: {other.name} (seed {other.results['seed']}) and {run.name} (seed {run.results['seed']}) "
                    f"have the same {what}: copies of one model are not pairs of runs, move one of them away"
                )


# -------------------------------------------------------------------------------------------------------------- notes


def notes(runs: list[Run], data_dir: Path) -> list[str]:
    """Sentences that a reader has to know before comparing runs."""
    return [*_notes_on_sets(runs), *_notes_on_circumstances(runs), *_notes_on_models(runs, data_dir)]


def _difference(what: str, values: dict[Run, str], then: str) -> list[str]:
    """A sentence if the runs differ in `what`: a few runs with their values, or, if there are more, runs by value."""
    if len(set(values.values())) < 2:
        return []
    if len(values) <= FEW_RUNS:
        listed = ", ".join(f"{run.name}: {shortened(value)}" for run, value in values.items())
    else:
        listed = "; ".join(f"{shortened(value)}: {named(alike)}" for value, alike in _by_value(values).items())
    return [f"The runs differ in {what} ({listed}): {then}."]


def _by_value(values: dict[Run, str]) -> dict[str, list[Run]]:
    """{value: the runs that have it}"""
    return {value: [run for run in values if values[run] == value] for value in dict.fromkeys(values.values())}


def _notes_on_sets(runs: list[Run]) -> list[str]:
    lines = []
    trained = [run for run in runs if run.results]
    sets = comparison_sets(runs)
    if smoke := [run for run in trained if run.results["test_pipeline"]]:
        lines.append(
            f"--test_pipeline made {named(smoke)}: left out of every comparison."
            if len(smoke) < len(trained)
            else f"These tables show only that the pipeline works: --test_pipeline made {named(smoke)}."
        )
    shaped = {run: shaping(run) for run in trained}
    for key in (*SHAPING, PROCESSES):
        values = {run: of_run[key] for run, of_run in shaped.items() if key in of_run}
        lines += _difference(key, values, "only those that agree are compared")
    lines += [line for group in sets for line in group.refused]
    lines += [f"{run.name} {run.ending}: it left no model." for run in trained if run.diverged]
    pairs = sets[0].pairs if sets else {}
    by_arm = arms(sets[0].runs) if sets else {}
    seeds = [{run.results["seed"] for run in of_arm} for of_arm in by_arm.values()]
    if len(seeds) > 1 and (alone := set.union(*seeds) - set.intersection(*seeds)):
        lines.append(
            f"Not every arm has seed {ranges(alone)}: an arm is compared with the {BASELINE} runs of its own seeds, "
            "while tables of arms and pictures show all runs that are in a pair."
        )
    in_pair = [run for group in sets for run in in_a_pair(group)]
    lonely = [run for run in trained if run not in in_pair and not run.results["test_pipeline"]]
    if pairs and lonely:
        lines.append(f"Without a pair, so in no comparison and in no table of arms: {named(lonely)}.")
    return lines


def shortened(value: str) -> str:
    """The first 12 digits of a commit or SHA-256; any other value as it is, because only its end may differ."""
    return value[:12] if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", value) else value


def _notes_on_circumstances(runs: list[Run]) -> list[str]:
    """Notes on differences within a set that should not change a result."""
    lines = []
    for group in comparison_sets(runs):
        packages = {package for run in group.runs for package in look_up(run.results, "versions", None) or {}}
        for key in (*CIRCUMSTANCES, *(f"versions.{package}" for package in sorted(packages))):
            lines += _difference(key, {run: recorded(run, key) for run in group.runs}, "compared nevertheless")
    for key, label in {"code": "code", "packages": "package versions", "cuda": "devices (GPU and CPU)"}.items():
        alike = _by_value({run: json.dumps(run.made_with[key], sort_keys=True) for run in runs if run.made_with})
        if len(alike) > 1:
            groups = " | ".join(map(named, alike.values()))
            lines.append(f"Measured with different {label} ({groups}): compared nevertheless.")
    modified = {
        "Trained": [run for run in runs if from_modified_tree(run)],
        "Measured": [run for run in runs if run.measured_at.get("dirty")],
    }
    return lines + [f"{done} from a modified tree, so no record: {named(of)}." for done, of in modified.items() if of]


def from_modified_tree(run: Run) -> bool:
    return look_up(run.results, "git.dirty", None) is True


def _notes_on_models(runs: list[Run], data_dir: Path) -> list[str]:
    lines = []
    train_sha = train_text(data_dir)
    for run in (run for run in runs if run.results and not run.diverged):
        if train_sha and train_sha != run.results["dataset"]["sha256"]:
            lines.append(
                f"{run.name} was not trained on {data_dir}: it may have seen the held-out text there in training."
            )
        theirs = run.results["weight_excess_kurtosis"]
        pairs = np.array([(value["kurtosis"], theirs.get(name)) for name, value in run.weights.items()], dtype=float)
        # Both are float64 sums over the same float32 numbers: rounding differs by far less than 1e-6, another model by
        # far more.
        if theirs.keys() != run.weights.keys() or not np.allclose(*pairs.T, rtol=1e-6, atol=1e-6, equal_nan=True):
            lines.append(
                f"{run.name}: its results file and {run.model} do not belong together: their weight kurtosis differs."
            )
    return lines


def train_text(data_dir: Path) -> str | None:
    """SHA-256 of the training split as recorded by build_dataset.py; None if there is no readable manifest."""
    try:
        return read_json(data_dir / "manifest.json")["splits"]["train"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
