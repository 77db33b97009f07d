"""How the report is shown: numbers, tables, the pictures in their sections, and the page."""

import base64
import math
import re

import numpy as np
import pytest
from made_runs import diverged, made, pairs

from answer import findings
from page import html_page
from quantization import EXECUTED
from report import LEAD_PICTURE, PICTURED, report
from tables import figure, gap_cell, number, over_runs, plus_minus, signed, table

INT8 = [scheme for scheme in EXECUTED if scheme != "float32"]
NAMES = [LEAD_PICTURE, *(name for names in PICTURED.values() for name in names)]


def whole(runs, pictures=None):
    pictures = {name: (f"title of {name}", f"Caption of {name}.") for name in NAMES} if pictures is None else pictures
    return report(runs, [], findings(runs), 4, "data", pictures, True)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [0.0, -0.0, -4e-5, 4e-5])
def test_zero_has_no_sign(value):
    assert signed(value) == "0.0000" and number(value) == "0.00"
    assert plus_minus(np.array([value, value])) == "0.000 ± 0.000"
    gap = {"gap": value, "error": 1e-5, "floor": 0.0}
    assert gap_cell(gap) == ("0.0000 ± 0.0000" if value else "–")


def test_other_numbers_keep_theirs():
    assert (signed(-0.00006), signed(1.5), number(-0.01)) == ("-0.0001", "+1.5000", "-0.01")
    assert figure(-0.0) == "0.00" and figure(-4e-5) == "-4.0e-05" and figure(-1200.4) == "-1,200"
    assert figure(-math.inf) == "-inf" and signed(-math.inf) == "-inf"


def test_a_border_in_a_name_does_not_end_the_cell():
    assert table(["", "a|b"], [["x", "1"]]).splitlines()[0] == r"|     | a\|b |"
    assert ">a|b</th>" in html_page(table(["", "a|b"], [["x", "1"]]), {})


# ------------------------------------------------------------------------------------------------------------ pictures


def test_every_picture_stands_above_the_table_of_its_section_and_has_its_caption_below():
    text = whole(pairs([2.0, 2.1], [1.0, 1.2]))
    assert re.findall(r"\]\((.*?)\)", text.partition("\n## ")[0]) == [LEAD_PICTURE]
    for section, names in PICTURED.items():
        inside = text.partition(f"\n{section}")[2].partition("\n## ")[0]
        places = [inside.index(f"![title of {name}]({name})\n\n*Caption of {name}.*\n") for name in names]
        assert places == sorted(places) and places[-1] < inside.index("\n|"), section
    assert "](" not in whole(pairs([2.0, 2.1], [1.0, 1.2]), {})


# ----------------------------------------------------------------------------------------------------------- many runs


def section(text: str, title: str) -> dict[str, list[str]]:
    """{first cell: other cells} of the first table behind a heading."""
    table = re.search(r"(^\|.*\n)+", text.partition(f"# {title}")[2], re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {first: rest for first, *rest in rows}


def many() -> list:
    """Four pairs of seeds 42 to 45, and one that diverged."""
    runs = pairs([0.2, 0.4, 0.6, 0.8], [0.1, 0.1, 0.1, 0.5])
    for i, run in enumerate(runs):
        run.damage |= {"parts": {"head": i / 10}, "part_floors": {"head": 0.05}}
        run.results["training"]["wall_seconds"] = 60 + i
    return [*runs, diverged(1, 46), made(0, 46, 1.0, training__wall_seconds=70.0)]


def test_many_runs_are_shown_by_arm_and_one_a_row_behind():
    text = whole(many())
    summary = section(text, "Summary of the runs")
    assert summary[""][2:] == ["softmax0 (mean of 5 runs)", "softmax1 (mean of 4 runs, 1 diverged)"]
    assert summary["seed"] == ["42", "42", "42 to 46", "42 to 45"]
    assert summary["runtime"][2:] == ["1 m 4 s ± 0 m 4 s", "1 m 4 s ± 0 m 3 s"] and summary["steps"][2] == "3,000"
    damage = section(text, "Quantization damage")
    assert damage["W8A8, static per tensor"] == [
        "3.6000 ± 0.3162 / 30.0 ± 0.00 / 0.60 ± 0.32",
        "3.2000 ± 0.2000 / 30.0 ± 0.00 / 0.20 ± 0.20",
    ]
    assert damage["W8A8 static in head alone"][1] == "0.40 ± 0.26"
    behind = text.partition("## Run by run")[2]
    alone = section(behind, "Summary")
    assert alone["run"][:3] == ["training", "softmax_n", "seed"] and "hardware" not in alone["run"]
    assert alone["esperberto-softmax1-seed46-1200 (diverged)"][0] == "diverged at step 1,200"
    assert len(alone) == 2 + 10 and len(section(behind, "Quantization damage: loss")) == 2 + 9
    assert section(behind, "Static W8A8 in one part alone")["esperberto-softmax1-seed43"] == ["+0.3000"]


def test_runs_of_other_sets_are_in_the_last_section_alone():
    other = pairs([0.2], [0.1], training__steps=2000, training__samples=32_000)
    text = whole([*pairs([0.2, 0.4, 0.6], [0.1, 0.1, 0.1]), *other])
    assert section(text, "Summary of the runs")["steps"][2:] == ["3,000", "3,000"]
    assert "the last section has the runs of other sets too" in text
    alone = section(text.partition("## Run by run")[2], "Summary")
    assert alone["esperberto-softmax0-seed42"][:1] == ["1 (headline)"]
    assert alone["esperberto-softmax0-seed42-2000"][:1] == ["2"] and len(alone) == 2 + 8


def test_no_run_is_lost_where_every_arm_of_the_headline_has_one():
    runs = [
        made(n, 42, training__steps=steps, training__samples=16 * steps) for steps in (3000, 2000) for n in (0, 1, 2)
    ]
    text = whole([*runs, diverged(4, 42)])
    assert section(text, "Summary of the runs")[""][2:] == [
        *("softmax0", "softmax1", "softmax2", "softmax4 (no run, 1 diverged)")
    ]
    assert len(section(text.partition("## Run by run")[2], "Summary")) == 2 + 7


def test_many_executed_runs_are_shown_by_arm():
    def executed(gap: float) -> dict:
        speed = {"median": 10 * gap, "q25": 1.0, "q75": 2.0, "speedup": 2.0}
        scheme = {"loss": 3.0 + gap, "gap": gap, "error": 0.001, "floor": 0.002, "bytes": 4_500_000}
        twin = {"difference": gap, "error": 0.1, "correlation": 0.5, "arithmetic": 0.0}
        return {
            "schemes": {"float32": {**scheme, "loss": 3.0, "gap": 0.0}, **dict.fromkeys(INT8, scheme)},
            "agreement": dict.fromkeys(INT8, twin),
            "latency": {"tokens": 64, "predicted": 10, "repetitions": 9}
            | {"formats": dict.fromkeys(("float32", *INT8), speed)},
            "operators": {"kernels": {"int8": {"Gemm": 3}, "float32": {"Gemm": 4}}},
            "hardware": {"name": "a CPU"},
        }

    runs = pairs([0.2, 0.4, 0.6, 0.8], [0.1, 0.1, 0.1, 0.5])
    for i, run in enumerate(runs):
        run.damage["executed"] = executed(i / 10)
    table = section(whole(runs), "INT8 that is executed")
    cells = ["3.3000 ± 0.2582", "0.30 ± 0.26", "0.30 ± 0.26", "0.50 ± 0.00", "0.00 ± 0.00", "4.5 ± 0.0", "3.00 ± 2.58"]
    assert table["INT8, executed, MinMax ranges, softmax0 (mean of 4 runs)"] == [*cells, "2.00 ± 0.00"]
    assert table["float32, executed, softmax0 (mean of 4 runs)"][:5] == ["3.0000 ± 0.0000", "–", "–", "–", "–"]
    runs[1].damage["executed"] = {"error": "no memory"}
    text = whole(runs)
    assert "**esperberto-softmax1-seed42 was not executed in INT8**: no memory" in text
    assert "float32, executed, softmax1 (mean of 3 runs)" in section(text, "INT8 that is executed")


def test_few_runs_have_a_column_each():
    text = whole(pairs([0.2, 0.4, 0.6], [0.1, 0.1, 0.1]))
    assert len(section(text, "Summary of the runs")[""]) == 2 + 6 and "Run by run" not in text


def test_published_tables_show_means_over_the_runs_of_an_arm():
    layers = [np.array([1.0, 3.0]), np.array([2.0, 6.0])]
    assert plus_minus(layers[0]) == "2.00 ± 1.00" and plus_minus(*layers) == "3.00 ± 1.50"
    assert plus_minus() == plus_minus(layers[0], np.array([])) == "–"
    assert over_runs([1.0, 2.0, 3.0]) == "2.00 ± 1.00" and over_runs([1.0, math.inf]) == "not finite in 1 of 2"


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_holds_its_pictures():
    page = html_page("# T < U\n\n![a](a.png)\n\n*b ± c*\n\n| x |\n| - |\n| 1 ± 2 |\n", {"a.png": b"picture"})
    source = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    assert f'<figure><img alt="a" src="{source}"><figcaption>b&nbsp;±&nbsp;c</figcaption></figure>' in page
    assert "<title>T &lt; U</title>" in page and '<div class="wide" tabindex="0"><table>' in page
    assert "<td>1e-&#8288;05</td>" in html_page("| x |\n| - |\n| 1e-05 |\n", {})
    assert "1&nbsp;±&nbsp;2</td>" in page and page.count("</table></div>") == 1 and "<nav" not in page


def test_the_contents_of_the_page_lead_to_every_section():
    text = whole(pairs([2.0, 2.1], [1.0, 1.2]))
    page = html_page(text, {})
    contents = page.partition("<nav")[2].partition("</nav>")[0]
    assert len(re.findall("^## ", text, re.MULTILINE)) == contents.count("<li>") > 10
    assert all(f'<h2 id="{target}">' in page for target in re.findall('href="#(.*?)"', contents))
    assert page.index("</h1>") < page.index("<nav") < page.index("Question.")


def test_what_learned_sinks_became():
    runs = pairs([2.0, 2.1], [1.0, 1.2], n="learned")
    for run, (low, high) in zip(runs[1::2], ((-1.0, 0.0), (0.0, 2.0)), strict=True):
        run.attention = {layer: {**one, "log_n": [low, high]} for layer, one in run.attention.items()}
    text = whole(runs)
    assert "| layer 1, softmax_learned |     0.37 |   1.00 |    7.39 |" in text and "Runs of an arm: 2." in text
    assert "| softmax_n " in text and "learned" in text.partition("## Summary of the runs")[2].partition("##")[0]
    assert "Learned sinks" not in whole(pairs([2.0, 2.1], [1.0, 1.2]))


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "![x](https://example.org/x.png)",
        "<https://example.org>",
        "a & b",
    ],
)
def test_the_name_of_a_model_is_text_on_the_page(name):
    run = made(0, 42)
    run.name, run.results = name, None
    text = report([run], [f"{name}: a note."], findings([run]), 4, "data", {"a.png": (name, f"Of {name}.")}, True)
    text += f"\n{name}\n\n![{name}](a.png)\n\n*Of {name}.*\n"
    page = html_page(text, {"a.png": b"picture"})
    body = page.partition("<body>")[2]
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert body.count(shown) > 10
    tags = set(re.findall(r"<(\w+)", body))
    assert tags <= set(
        "h1 h2 nav div ul li a p strong em table thead tbody tr th td code figure img figcaption".split()
    )
    assert all(link.startswith("#") for link in re.findall('href="(.*?)"', body))
    assert all(source.startswith("data:") for source in re.findall('src="(.*?)"', body))
