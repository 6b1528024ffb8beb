"""The global generators of this process as tensors: torch's, the accelerator's, Python's and NumPy's.

Nothing of a run draws from them, every seed is derived; they are kept so that a reward or a plug-in that does goes on as well.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_state() -> dict[str, torch.Tensor]:
    """`torch`, `cuda.N` uint8; `python` [625], `numpy` [626] int64; `gauss` [2, 2] int64: is one left, and its bits."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(Any, np.random.get_state())
    assert (version, name) == (3, "MT19937")  # pinned by the interpreter and the package
    return {
        "torch": torch.get_rng_state(),
        **{f"cuda.{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())},
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([[gauss is not None, _bits(gauss or 0.0)], [has_gauss, _bits(cached)]], dtype=torch.int64),
    }


def restore_rng(state: Mapping[str, torch.Tensor]) -> None:
    """A device that is not here any more is left out."""
    torch.set_rng_state(state["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)
    (has_gauss, gauss), (_, cached) = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), _number(gauss) if has_gauss else None))
    *keys, position, has_cached = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_cached, _number(cached)))


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
