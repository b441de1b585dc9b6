"""A table says the numbers of the rows, to as many digits as are known, and is bold only where intervals part."""

import pytest

from limbeck.exhibits import result_table


def row(arm, metric, mean, half, count=5, **place):
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {
        **place,
        "arm": arm,
        "metric": metric,
        "mean": mean,
        "low": low,
        "high": high,
        "count": count,
        "level": 0.95,
    }


ROWS = [
    row("kd", "test/accuracy", 0.87112, 0.00512),
    row("kd", "train/tokens", 143210.0, 1234.0),
    row("grpo", "test/accuracy", 0.85, 0.01),
    row("grpo", "train/tokens", 143210.0, 56.0),
    row("teacher", "test/accuracy", 0.97, None, 1),
]
COLUMNS = {"test/accuracy": "accuracy ↑", "train/tokens": "tokens ↓"}


def lines(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_are_methods_and_columns_metrics_with_half_widths_to_two_digits():
    heading, _, *body = lines(result_table.markdown(ROWS, COLUMNS))
    assert heading == ["method", "accuracy ↑", "tokens ↓"]
    assert body == [
        ["Distillation (RKL)", "**0.8711 ± 0.0051**", "143,210 ± 1,234"],
        ["GRPO", "0.850 ± 0.010", "143,210 ± 56"],
        ["Teacher", "0.97 (n = 1)", "–"],
    ]


@pytest.mark.parametrize(("heading", "bold"), [("x ↑", ["kd"]), ("x ↓", ["grpo"]), ("x", [])])
def test_the_heading_says_which_way_is_better(heading, bold):
    rows = [row("kd", "x", 2.0, 0.4), row("grpo", "x", 1.0, 0.5)]
    marked = {"Distillation (RKL)": "kd", "GRPO": "grpo"}
    body = lines(result_table.markdown(rows, {"x": heading}))[2:]
    assert [marked[name] for name, text in body if text.startswith("**")] == bold


def test_nothing_is_bold_where_intervals_overlap_or_nothing_is_compared():
    assert "**" not in result_table.markdown([row("kd", "x", 2.0, 0.6), row("grpo", "x", 1.0, 0.5)], {"x": "x ↑"})
    assert "**" not in result_table.markdown([row("kd", "x", 2.0, 0.6)], {"x": "x ↑"})


def test_methods_are_compared_within_their_group_which_stands_before_them():
    rows = [
        row(arm, "x", mean, 0.1, task=task) for task, arm, mean in (("a", "kd", 1), ("a", "grpo", 2), ("b", "kd", 5))
    ]
    rows = [dict(sorted(each.items())) for each in rows]  # as they are read from JSON
    heading, _, *body = lines(result_table.markdown(rows, {"x": "x ↑"}))
    assert heading == ["task", "method", "x ↑"]
    assert [(task, name, text.startswith("**")) for task, name, text in body] == [
        ("a", "Distillation (RKL)", False),
        ("a", "GRPO", True),
        ("b", "Distillation (RKL)", False),
    ]


def test_a_teacher_is_neither_bold_nor_in_the_way_and_stands_in_its_group():
    rows = [
        row("kd", "x", 2.0, 0.1, task="a"),
        row("grpo", "x", 1.0, 0.1, task="a"),
        row("kd", "x", 1.0, 0.1, task="b"),
    ]
    body = lines(result_table.markdown([*rows, row("teacher", "x", 3.0, 0.1, task="a")], {"x": "x ↑"}))[2:]
    assert [(task, name) for task, name, _ in body] == [
        ("a", "Distillation (RKL)"),
        ("a", "GRPO"),
        ("a", "Teacher"),
        ("b", "Distillation (RKL)"),
    ]
    assert [text.startswith("**") for *_, text in body] == [True, False, False, False]


def test_a_notebook_shows_the_same_cells_and_the_same_ones_bold():
    html = result_table.styled(ROWS, COLUMNS)._repr_mimebundle_()["text/html"]
    assert html.count("font-weight: bold") == 1
    assert "0.8711 ± 0.0051" in html and "Distillation (RKL)" in html and "95 % t interval" in html


def test_without_headings_every_metric_is_shown_and_an_unknown_one_is_refused():
    assert lines(result_table.markdown(ROWS))[0] == ["method", "test accuracy ↑", "train tokens"]
    with pytest.raises(ValueError, match=r"metrics among test/accuracy, train/tokens; got test/speed"):
        result_table.markdown(ROWS, {"test/speed": "speed ↑"})
