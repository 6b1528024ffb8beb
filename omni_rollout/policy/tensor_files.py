"""safetensors files whose tensors are made one at a time, as they are written, and gone before the next.

What `safetensors.torch.save_file` writes, byte for byte; it wants all tensors at once, which of full weights and their moments
is twelve bytes a parameter on one rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

NAMES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as it names and orders them
ALIGNMENT = 8  # bytes, of where the first tensor begins


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is wanted: by all ranks at once, where each holds a part of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]  # whole, on any device

    @property
    def nbytes(self) -> int:
        return self.like().nbytes

    def like(self) -> torch.Tensor:
        """Without a byte."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Part:
    """Of what is written: `write` takes the tensors in this order, each made as it is taken. The first rank alone calls it."""

    tensors: Sequence[Pending]
    write: Callable[[Iterator[torch.Tensor]], None]


def first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def pending(tensors: Mapping[str, torch.Tensor]) -> dict[str, Pending]:
    """Of tensors that this process holds whole."""
    return {name: Pending(tuple(one.shape), one.dtype, one.detach) for name, one in tensors.items()}


def collected(tensors: Mapping[str, Pending]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; none on the other ranks, which take part in making each. Collective."""
    keep = first_rank()
    made = ((name, one.make()) for name, one in tensors.items())
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in made if keep}


def write_parts(parts: Iterable[Part]) -> None:
    """Collective: every rank with the same parts. Raises, on the first rank alone, what a part's `write` raises."""
    parts = list(parts)
    made = (one.make() for part in parts for one in part.tensors)
    try:
        if first_rank():
            for part in parts:
                part.write(islice(made, len(part.tensors)))
    finally:
        while next(made, None) is not None:  # the other ranks wait for this one in each, whatever has become of the file
            pass


def file_part(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str] | None = None) -> Part:
    """A file, in whose folder it is the first where there is none yet."""
    names = sorted(tensors, key=lambda name: ([*NAMES].index(tensors[name].dtype), name))
    return Part([tensors[name] for name in names], partial(_write, path, {name: tensors[name] for name in names}, metadata))


def _write(
    path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str] | None, made: Iterator[torch.Tensor]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(_header(tensors, metadata))
        for tensor in made:
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor


def _header(tensors: Mapping[str, Pending], metadata: Mapping[str, str] | None) -> bytes:
    fields: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, one in tensors.items():
        start, end = end, end + one.nbytes
        fields[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
