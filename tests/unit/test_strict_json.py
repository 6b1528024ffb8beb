"""What is JSON is read as Python reads it; what only Python takes for JSON is not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_rollout.trajectories import strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SPACES = st.text(" \t\n\r", max_size=3)


@given(value=VALUES, before=SPACES, after=SPACES, ascii_only=st.booleans())
def test_any_value_comes_back_whatever_is_around_it(value, before, after, ascii_only):
    assert strict_json.loads(before + json.dumps(value, ensure_ascii=ascii_only) + after) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "NaN", " -Infinity", "1e999", "[1e999]", "1 2", "1,", "{", "\u00a01", "1\u00a0", "\x0b1", "\ufeff1", "'1'"],
)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        strict_json.loads(text)


@pytest.mark.parametrize("around", ["", " "])
def test_what_is_nested_too_deep_is_refused(around):
    with pytest.raises(ValueError, match="nested too deep"):
        strict_json.loads(around + "[" * 100_000 + "]" * 100_000)
