"""A model of `transformers` for a reward, loaded whole or not at all."""

from __future__ import annotations

from typing import Any


def whole(kind: Any, model: str) -> Any:
    """`kind.from_pretrained(model)`, in which no weight is random.

    transformers fills what a checkpoint lacks, be it all of it, with random numbers: of another model's folder too.

    Args:
        kind: a class of `transformers`.
        model: a folder or a hub id.

    Raises:
        OSError, ValueError: nothing can be loaded from there, or not every weight.
    """
    network, found = kind.from_pretrained(model, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of the weights of a {kind.__name__}, such as {missing[0]}")
    return network
