"""The parts of `make bench` that need no engine; `--quick` runs the whole road in tests/e2e."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import __main__ as speed
from benchmarks.speed import costs, shapes, tables
from benchmarks.speed.contenders import BATCHED, BY_REQUEST, EXACT, FLOOR, NAMES, SERIAL, STEPWISE
from benchmarks.speed.turns import Process, TurnError, ratios, rounds, together


def test_a_process_keeps_its_object_and_says_how_it_failed_or_died() -> None:
    with together({"one": (one := Process("one", io.StringIO, threads=1, fresh=True))}) as started:
        assert started["one"] > 0
        assert one.ask("write", "ab")[0] == 2
        value, seconds = one.ask("getvalue")
        assert value == "ab" and seconds >= 0
        with pytest.raises(TurnError, match=r"(?s)one failed:.*AttributeError"):
            one.ask("shout")
    dies = Process("two", os._exit, 3, threads=1, fresh=True)
    with pytest.raises(TurnError, match="two: its process ended with status 3"), together({"two": dies}):
        pass


def test_everyone_works_once_a_round_and_begins_in_turn() -> None:
    orders = [order for _, order in rounds(("a", "b", "c"), 6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}


def test_a_ratio_is_of_the_same_round() -> None:
    # A slow third round, for both: it must not show.
    assert ratios([1.0, 2.0, 10.0], [2.0, 2.0, 30.0]) == {"median": 2.0, "least": 1.0, "greatest": 3.0}


def test_a_line_is_found_and_a_curve_is_not_taken_for_one() -> None:
    line = costs.fit({x: 0.5 + 0.25 * x for x in (1, 2, 4, 8)})
    assert line == pytest.approx({"intercept": 0.5, "slope": 0.25, "r2": 1.0})
    assert costs.fit({1: 1.0, 2: 4.0, 4: 16.0, 8: 64.0})["r2"] < 0.97


def test_prompts_of_a_round_are_a_group_each_and_not_those_of_the_next() -> None:
    shape = shapes.SHAPES["nano-32"]
    first, second, unseen = (shapes.prompts(shape, number) for number in (1, 2, costs.UNSEEN))
    assert len(first) == 32 and len(set(first)) == 4 and not set(first) & set(second)
    earlier = {text for number in range(100) for text in shapes.prompts(shape, number)}
    assert not set(unseen) & earlier


def result() -> dict[str, Any]:
    speeds = {SERIAL: 1.0, BATCHED: 2.0, STEPWISE: 1.5, BY_REQUEST: 1.25, FLOOR: 4.0, EXACT: 3.0}
    seconds = {name: [1 / speeds.get(name, 1.0)] * 3 for name in NAMES}
    return {
        "shape": vars(shapes.QUICK),
        "load": 1.5,
        "as_fast_as": {other: {name: ratios(seconds[name], seconds[other]) for name in NAMES} for other in NAMES},
    }


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write_docs({"rollout": [result()], "starts": [9.0]}, page)
    text = page.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\n") and text.endswith(f"\n{tables.END}\nafter\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| tiny |"))
    cells = [cell.strip().split(" ")[0] for cell in row.strip("|").split("|")]
    assert cells == ["tiny", "2", "2.00", "1.50", "1.25", "4.00", "3.00", "1.00", "1.50", "0.75", "2.00"]
    assert (tmp_path / "performance-rollout.svg").read_text().count("<polyline") == 6


def test_memory_that_grows_shows() -> None:
    assert "+1000 KB a batch" in tables._memory([100.0 + number for number in range(20)])
    assert "+0 KB a batch" in tables._memory([float(number) for number in range(10)] + [100.0] * 10)


@pytest.mark.parametrize("wrong", [["--shapes", "nano-9"], ["--parts", "rollouts"], ["--rounds", "0"]])
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        speed.parse(wrong)
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err
