"""What training itself recorded at its last step, of every pair of softmax0 and softmax1 whose results are here.

    PYTHONPATH=. python docs/small/in_training.py        prints the table of the README, and draws its picture

Reads results files alone, so it needs no models: activations and attention on 64 held-out texts (emergence), and the
held-out loss. Writes in_training.png.
"""

from pathlib import Path

import numpy as np

import pictures
import plots
from answer import PRIMARY_ARM
from pairs import compare, compare_ratio, percent
from questions import SECONDARY
from record import by_layer
from runs import Run, read_results
from sets import BASELINE, comparison_sets
from tables import figure, number, spread, table

STATISTICS = {  # of the emergence: (what it is, over the layers, factor, what makes it a number above 0 for a ratio)
    "ffn_residual.inf_norm": ("residual stream: infinity norm, largest layer", np.max, 1, 0.0),
    "ffn_output.kurtosis_sequence": (
        "FFN output: excess kurtosis, mean of layers (× of full kurtosis)",
        np.mean,
        1,
        3.0,
    ),
    "attention.sink_rate_any": ("sink rate of any token, %", np.mean, 100, None),
    "attention.null_mass": ("null mass, mean of heads, %", np.mean, 100, None),
}
LOSS = "held-out loss in float32, nats"


def at(run: Run, entry: int) -> dict[str, float]:
    """{what: value} at one entry of the emergence: 0 is before the first update, -1 the last step."""
    emergence = run.results["emergence"][entry]
    return {what: factor * float(pick(by_layer(emergence, key))) for key, (what, pick, factor, _) in STATISTICS.items()}


def main() -> None:
    folder = Path(__file__).parent
    files = sorted([*folder.glob("esperberto-*.json"), *folder.glob("trained/esperberto-*.json")])
    group = comparison_sets([Run(file.stem, "", read_results(file), file=file) for file in files])[0]
    pairs = group.pairs[PRIMARY_ARM]
    ends = [{seed: at(pair[i], -1) for seed, pair in pairs.items()} for i in (0, 1)]
    starts = [at(run, 0) for pair in pairs.values() for run in pair]
    rows = []
    for what, *_, shift in STATISTICS.values():
        both = [{seed: values[what] for seed, values in arm.items()} for arm in ends]
        one, logs = compare(*both, tests=SECONDARY), None
        cells = f"{figure(one.difference)} ({figure(one.low)} to {figure(one.high)})"
        if shift is not None:
            logs = compare_ratio(*both, shift=shift, tests=SECONDARY)
            cells = "× " + " to ".join(figure(float(np.exp(end))) for end in (logs.low, logs.high))
            cells = f"× {figure(float(np.exp(logs.difference)))} ({cells})"
        start = figure(float(np.mean([values[what] for values in starts])))
        before, after = spread(one.baseline_mean, one.baseline_std), spread(one.mean, one.std)
        rows.append([what, start, before, after, cells])
    losses = [{seed: pair[i].results["validation"]["loss"] for seed, pair in pairs.items()} for i in (0, 1)]
    one = compare(*losses, tests=SECONDARY)
    mean = [f"{number(m, 4)} ± {number(s, 4)}" for m, s in ((one.baseline_mean, one.baseline_std), (one.mean, one.std))]
    rows.append([LOSS, "–", *mean, f"{number(one.difference, 4)} ({number(one.low, 4)} to {number(one.high, 4)})"])
    level = percent(one.confidence)
    header = [f"{len(pairs)} pairs, seeds {min(pairs)} to {max(pairs)}", "before training", BASELINE, PRIMARY_ARM]
    print(table([*header, f"difference or ratio ({level} interval)"], rows))
    for refused in group.refused:
        print(refused)
    runs = [run for pair in pairs.values() for run in pair]
    picture = pictures.emergence_seeds(runs, plots.looks([BASELINE, PRIMARY_ARM], pictures.LEADING))
    (folder / "in_training.png").write_bytes(picture.png)


if __name__ == "__main__":
    main()
