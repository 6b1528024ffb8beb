"""Whether the prompts of a run fit the widths that they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator, WidthError, size_of
from omni_rollout.errors import UserError
from omni_rollout.types import Prompt, RequestError

SHOWN = 5  # prompts that an error names


class QuickTokenizer:
    """A checkpoint's tokenizer by its tokenizer.json alone, without the seconds that transformers takes to be imported.

    It cuts as transformers' class does where that takes the file as it is. Some of them set parts of it anew, and take tokens
    from other files too; so what is too wide here is for transformers to say.
    """

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        self.name_or_path = path
        self._tokenizer = Tokenizer.from_file(str(Path(path, "tokenizer", "tokenizer.json")))
        self._tokenizer.no_truncation()  # what somebody has cut or filled up last may be kept in the file
        self._tokenizer.no_padding()

    def __call__(self, text: str) -> Mapping[str, Sequence[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}


def quick_tokenizer(path: str) -> QuickTokenizer | None:
    """None: the checkpoint is no folder, or its tokenizer lies there in other files, or in one of another version."""
    try:
        return QuickTokenizer(path) if Path(path, "tokenizer", "tokenizer.json").is_file() else None
    except Exception:  # `tokenizers` raises nothing narrower; the run's own tokenizer will say what is wrong
        return None


def collator_of(config: TrainConfig, tokenizer: Any) -> Collator:
    window = get_algorithm(config.algorithm).window_start
    return Collator(config.model.family, tokenizer, config.sampling, config.collate, window)


def check_widths(collator: Collator, training: Sequence[Prompt], evaluation: Sequence[Prompt]) -> None:
    """All prompts now, not one of them in an hour.

    Raises:
        UserError: names those that cannot be served, the widest first: its width is enough for all.
    """
    wrong: list[tuple[int, str]] = []
    others = () if list(evaluation) == list(training) else evaluation
    for of, prompts in (("number", training), ("evaluation, number", others)):
        for number, prompt in enumerate(prompts, 1):
            try:
                collator.check(collator.spec(size_of(prompt), images=prompt.images), prompt)
            except RequestError as error:
                wrong.append((error.tokens if isinstance(error, WidthError) else 0, f"{of} {number}: {error}"))
    if not wrong:
        return
    wrong.sort(key=lambda one: -one[0])
    lines = [text for _, text in wrong[:SHOWN]]
    if len(wrong) > SHOWN:
        lines.append(f"and {len(wrong) - SHOWN} more of {len(training) + len(others)} prompts")
    raise UserError("\n".join(lines))
