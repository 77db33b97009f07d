"""How numbers are written: figures, spreads, durations, and Markdown tables that also line up in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np


def shortest(n: float | str) -> str:
    """n as the shortest decimal that is read back as the same number: 0, 1, 0.5, 1.0000001. A word stays as it is."""
    return n if isinstance(n, str) else repr(float(n) + 0.0).removesuffix(".0")  # + 0.0, so that -0.0 is 0


def figure(value: float | None) -> str:
    """A number with about three significant digits; a dash for None and NaN."""
    if value is None or np.isnan(value):
        return "–"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.2e}"
    if 0 < size < 5e-4:  # so that the end of an interval never looks like 0
        return f"{value:.1e}"
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 4
    return unsigned_zero(f"{value:,.{decimals}f}")


def spread(mean: float, std: float | None) -> str:
    return figure(mean) if std is None else f"{figure(mean)} ± {figure(std)}"


def ends(low: float | None, high: float | None) -> str:
    """The two ends of an interval; a dash if there is none."""
    return "–" if low is None else f"{figure(low)} to {figure(high)}"


def each_once(texts: Iterable[str]) -> str:
    """The different texts, separated by slashes; a text that occurs several times is printed once."""
    return " / ".join(dict.fromkeys(texts))


def below_noise(mean: float | None, floor: float | None) -> str:
    """That a mean gap is below its noise, in words; empty if it is not, or if one of the two is unknown."""
    if mean is None or floor is None or abs(mean) >= floor:
        return ""
    return f"below its noise of {figure(floor)}"


def over_runs(values: list[float | None], show: Callable = figure, floor: float | None = None) -> str:
    """Mean ± sample standard deviation over runs; of one run its value; if some are not finite, how many.

    Args:
        values: of the runs, None where one was not measured. Without any value, the result is a dash.
        floor: for gaps, the noise of the mean: a mean below it is not shown.
    """
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return "–"
    if lost := int((~np.isfinite(known)).sum()):
        return f"not finite in {lost} of {len(known)}"
    mean = float(known.mean())
    deviation = f" ± {show(float(known.std(ddof=1)))}" if len(known) > 1 else ""
    return below_noise(mean, floor) or show(mean) + deviation


def number(value: float | None, decimals: int = 2) -> str:
    return "–" if value is None or np.isnan(value) else unsigned_zero(f"{value:.{decimals}f}")


def gap_cell(scheme: dict) -> str:
    """The gap of a quantization scheme with its standard error, or that it is below its noise."""
    gap, floor, error = scheme["gap"], scheme["floor"], scheme.get("error", np.nan)
    if not gap:
        return "–"
    if not np.isfinite(gap):
        return "not finite"
    if abs(gap) < floor:
        return f"below its noise of {floor:.4f}"
    return signed(gap) + (f" ± {error:.4f}" if np.isfinite(error) else "")


def signed(value: float) -> str:
    """A difference with its sign and four decimals; without a sign if it rounds to 0."""
    return unsigned_zero(f"{value:+.4f}")


def unsigned_zero(text: str) -> str:
    """A formatted number; if all its digits are 0, without its sign: -0.0000 and +0.0000 become 0.0000."""
    return text if text.strip("+-0.,") else text.lstrip("+-")


def plus_minus(*of_runs: np.ndarray) -> str:
    """`mean ± population standard deviation` over the layers of a run; of several runs, the means of both figures.

    Small figures have a third decimal, as in the published tables.
    """
    if not of_runs or any(not len(values) or np.isnan(values).any() for values in of_runs):
        return "–"
    mean, std = (float(np.mean([reduce(values) for values in of_runs])) for reduce in (np.mean, np.std))
    decimals = 3 if max(abs(mean), std) < 0.1 else 2
    return f"{number(mean, decimals)} ± {number(std, decimals)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest} s" if minutes < 60 else "{} h {} m".format(*divmod(round(seconds / 60), 60))


def machine(hardware: dict) -> str:
    if hardware["device"] == "cpu":
        return f"{hardware['name']} (CPU threads: {hardware['count']})"
    return f"{hardware['count']} × {hardware['name']}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal. A | inside a cell is escaped."""
    header, *rows = ([cell.replace("|", r"\|") for cell in row] for row in (header, *rows))
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def transposed(header: list[str], rows: list[list[str]]) -> str:
    """The same table with a row for each of its columns."""
    header, *rows = map(list, zip(header, *rows, strict=True))
    return table(header, rows)
