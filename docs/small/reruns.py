"""The same run on two CPUs: what rounding alone does to a result. Prints a table.

    PYTHONPATH=. python docs/small/reruns.py

first_runs/ holds runs of the same text, recipe, seeds and initial weights as those here, trained on a CPU with AVX-512;
those here had AVX2 alone, which adds in another order. Both as training recorded its last step, on 64 held-out texts.
"""

from pathlib import Path

import numpy as np

from record import by_layer
from runs import read_results
from tables import figure, number, table

STATISTICS = {  # of the emergence: (statistic, over the layers, factor)
    "residual stream: infinity norm": ("ffn_residual.inf_norm", np.max, 1),
    "FFN output: excess kurtosis": ("ffn_output.kurtosis_sequence", np.mean, 1),
    "sink rate of any token, %": ("attention.sink_rate_any", np.mean, 100),
    "null mass, %": ("attention.null_mass", np.mean, 100),
}


def cells(results: dict) -> list[str]:
    last = results["emergence"][-1]
    values = [factor * float(pick(by_layer(last, key))) for key, pick, factor in STATISTICS.values()]
    return [*map(figure, values), number(results["validation"]["loss"], 4)]


def main() -> None:
    folder = Path(__file__).parent
    rows = []
    for first in sorted(folder.glob("first_runs/*.json")):
        before, after = read_results(first), read_results(folder / first.name)
        for same in ("initial_weights", "parameters"):
            assert before["model"][same] == after["model"][same], first
        both = zip(cells(before), cells(after), strict=True)
        rows.append([first.stem, *(f"{one} / {other}" for one, other in both)])
    print(table(["first run / second run", *STATISTICS, "held-out loss, nats"], rows))


if __name__ == "__main__":
    main()
