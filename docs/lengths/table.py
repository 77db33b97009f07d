"""Sample length: softmax0 and softmax1 on the same text, joined and cut at 36 to 256 tokens. Prints a table.

    PYTHONPATH=. python docs/lengths/table.py

As training recorded its last step, on 64 held-out texts: the largest layer, and means of the layers for sinks and null
mass.
"""

from pathlib import Path

import numpy as np

from record import by_layer
from runs import read_results
from tables import figure, number, table

STATISTICS = {  # (statistic of the emergence, over the layers, factor)
    "FFN output: excess kurtosis": ("ffn_output.kurtosis_sequence", np.max, 1),
    "residual stream: infinity norm": ("ffn_residual.inf_norm", np.max, 1),
    "sink rate of any token, %": ("attention.sink_rate_any", np.mean, 100),
    "null mass, %": ("attention.null_mass", np.mean, 100),
}


def main() -> None:
    rows = []
    for length in (36, 64, 128, 256):
        for arm in ("softmax0", "softmax1"):
            results = read_results(Path(__file__).parent / f"length{length}-{arm}.json")
            last, losses = results["emergence"][-1], results["validation"]
            values = [factor * float(pick(by_layer(last, key))) for key, pick, factor in STATISTICS.values()]
            shown = [number(losses[key], 2) for key in ("unigram_loss", "context_free_loss", "loss")]
            rows.append([str(length), arm, *shown, *map(figure, values)])
    print(table(["tokens", "arm", "unigram", "context-free", "held-out loss", *STATISTICS], rows))


if __name__ == "__main__":
    main()
