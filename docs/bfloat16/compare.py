"""What training in bfloat16 changes: each run of this folder beside the float32 run of the same arm and seed.

    PYTHONPATH=. python docs/bfloat16/compare.py

The float32 runs are those of docs/replication. Prints a table for each arm: means, the mean of the paired differences,
and its 95 % interval (Student's t over seeds); then the two arms in bfloat16; then one float32 run and its repetition
(rerun/).
"""

from pathlib import Path

from answer import GLANCE, METRICS, metrics
from measurement import take_measured
from pairs import compare
from runs import find_runs
from tables import figure, spread, table

FOLDER = Path(__file__).parent
REPLICATION = FOLDER.parent / "replication"


def measured(folder: Path) -> dict[str, dict[int, dict[str, float | None]]]:
    """The metrics of every run in a folder, by arm and seed."""
    runs = find_runs([], folder, folder / "models")
    take_measured(runs, folder / "measured")
    by_arm = {}
    for run in runs:
        by_arm.setdefault(run.arm, {})[run.results["seed"]] = metrics(run)
    return by_arm


def beside(title: str, first: str, second: str, before: dict[int, dict], after: dict[int, dict]) -> str:
    """A table of two sets of runs, paired by seed."""
    rows = []
    for key in GLANCE:
        values = ({seed: metrics_of[key] for seed, metrics_of in runs.items()} for runs in (before, after))
        paired = compare(*values)
        means = spread(paired.baseline_mean, paired.baseline_std), spread(paired.mean, paired.std)
        rows.append(
            [METRICS[key][0], *means, figure(paired.difference), f"{figure(paired.low)} to {figure(paired.high)}"]
        )
    return table([title, first, second, "difference", "95% interval"], rows) + "\n"


def main() -> None:
    float32, bfloat16, again = (measured(folder) for folder in (REPLICATION, FOLDER, FOLDER / "rerun"))
    for arm, runs in bfloat16.items():
        print(beside(arm, "float32", "bfloat16", float32[arm], runs))
    print(beside("bfloat16", *bfloat16, *bfloat16.values()))
    first, second = float32["softmax0"][48], again["softmax0"][48]
    rows = [[METRICS[key][0], figure(first[key]), figure(second[key])] for key in GLANCE]
    print(table(["softmax0, seed 48, float32", "first time", "second time"], rows))


if __name__ == "__main__":
    main()
