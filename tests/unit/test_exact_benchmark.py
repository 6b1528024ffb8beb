"""The table of `make exact`, and the settings it is made of; `--quick` runs the whole road in tests/e2e."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import exact


def result(dtype: str, **changes: Any) -> dict[str, Any]:
    found = {"instruction_set": "torch AVX2, oneDNN AVX512_CORE", "threads": 2, "model": "nano", "job": "cells", "dtype": dtype}
    return {**found, "cells": 4, "exact": 4, "log_probs": 12, "equal": 12, "kl": 0.0, **changes}


def test_both_dtypes_share_a_row_and_a_difference_shows() -> None:
    lines = exact.table([result("bfloat16", exact=3, equal=10, kl=2e-5), result("float32"), {"failed": "x"}])
    assert len(lines) == 3
    assert lines[2] == "| AVX512_CORE | AVX2 | 2 | nano | the matrix | 4 / 4 | 3 / 4 | 22 / 24 | 2e-05 |"


def test_only_what_lies_between_the_markers_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{exact.BEGIN}\nold\n{exact.END}\nafter\n")
    exact.write_docs(["| new |"], page)
    text = page.read_text()
    assert text.startswith(f"before\n{exact.BEGIN}\n") and text.endswith(f"| new |\n{exact.END}\nafter\n")
    assert "old" not in text and f" {exact.cpu_name()}, " in f" {text}".replace("\n", " ")


def test_another_machines_table_stays_and_ones_own_is_replaced(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", "Some CPU, 8 cores, flags avx2; 2026-01-01:\n\n| head |\n|---|\n| theirs |"
    page.write_text(f"before\n{exact.BEGIN}\n{other}\n{exact.END}\nafter\n")
    for mine in ("| first |", "| second |"):
        exact.write_docs(["| head |", "|---|", mine], page)
    between = page.read_text().partition(exact.BEGIN)[2].partition(exact.END)[0]
    assert between.startswith(f"\n{other}\n\n{exact.cpu_name()}, ") and between.endswith("|---|\n| second |\n")
    assert "first" not in between and between.count(", flags ") == 2


def test_a_process_sees_its_own_caps_and_no_other(monkeypatch: Any) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert "ONEDNN_MAX_CPU_ISA" not in exact.Setting("", "", ()).environment()
    environment = exact.Setting("AVX2", "avx2", ()).environment()
    assert (environment["ONEDNN_MAX_CPU_ISA"], environment["ATEN_CPU_CAPABILITY"]) == ("AVX2", "avx2")


def test_every_cap_and_number_of_threads_has_its_row() -> None:
    found = list(exact.settings(quick=False))
    assert len(set(found)) == len(found)
    assert {setting.onednn for setting in found} == {
        cap for cap, flag in exact.ONEDNN.items() if not flag or flag in exact.cpu_flags()
    }
    assert {threads for setting in found for threads, *_ in setting.work} == {1, 2, 3, 5, 7}
    assert {(setting.onednn, setting.aten) for setting in exact.settings(quick=True)} == {("", ""), ("AVX2", "avx2")}
