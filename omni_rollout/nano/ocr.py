"""Reading the text in nano images: RapidOCR, recognition only, on one thread."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np


@functools.cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    # onnxruntime otherwise takes every core, also those a training run beside it is using.
    threads = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    params = {f"EngineConfig.onnxruntime.{name}": value for name, value in threads.items()}
    return RapidOCR(params={**params, "Global.log_level": "error"})


def read_text(image: np.ndarray) -> str:
    """The text of one uint8 RGB image of shape (height, width, 3), without spaces; empty if nothing was recognised."""
    # RapidOCR takes BGR arrays, as OpenCV does.
    result = _engine()(np.ascontiguousarray(image[..., ::-1]), use_det=False, use_cls=False, use_rec=True)
    return "".join(result.txts or ()).replace(" ", "")


def exact_matches(images: Iterable[np.ndarray], texts: Iterable[str]) -> list[bool]:
    return [read_text(image) == text for image, text in zip(images, texts, strict=True)]
