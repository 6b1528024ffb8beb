"""A vision-language model as the judge, behind any endpoint that speaks OpenAI's chat completions.

That is vLLM's, SGLang's, or a hosted one. The answer is structured (a JSON schema), asked for again when it is none, and kept
on disk: an image and a question that were judged once cost nothing again. A key is taken from OPENAI_API_KEY.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Columns, Reward, RewardError, check_media
from omni_rollout.rewards.base.http import to_wire
from omni_rollout.trajectories import strict_json
from omni_rollout.types import Kind

QUESTION = "How well does this image show what the prompt asks for? 0: not at all, {best}: in every detail."
BEST = 10
TRIES, PAUSE = 5, 0.5  # seconds before the second, doubled from one to the next
AT_ONCE = 8
SECONDS = 60.0  # for one answer
SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "integer", "minimum": 0, "maximum": BEST}},
    "required": ["reason", "score"],
    "additionalProperties": False,
}


class Judge:
    """0 to 1, the judge's score divided by its best. A prompt's metadata `question` replaces the question.

    Args:
        model: ADDRESS#NAME, such as `http://127.0.0.1:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct`.
    """

    name = "vlm_judge"
    kinds: frozenset[Kind] = frozenset({"image"})

    def __init__(self, model: str, cache: Path) -> None:
        self._address, mark, self._model = model.partition("#")
        if not mark or not self._address.startswith(("http://", "https://")):
            raise UserError(f"reward.model.vlm_judge={model}: expected ADDRESS#NAME, such as http://127.0.0.1:8000/v1#NAME")
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(timeout=SECONDS, headers={"Authorization": f"Bearer {key}"} if key else {}, trust_env=False)
        self._cache = cache

    def __call__(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]
    ) -> list[float | Exception | None]:
        check_media(self.name, images, prompts)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._judged, images, prompts, metadata))

    def _judged(self, image: np.ndarray, prompt: str, columns: Columns) -> float | Exception:
        question = str(columns.get("question") or QUESTION.format(best=BEST))
        body = self._body(str(to_wire(image)), f"Prompt: {prompt}\n{question}")
        kept = self._cache / f"{hashlib.sha256(json.dumps([self._address, body]).encode()).hexdigest()}.json"
        try:
            return _score(kept.read_text(encoding="utf-8")) / BEST
        except (OSError, ValueError):
            pass  # not kept yet, or cut off: asked (again)
        last = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                answer = self._client.post(f"{self._address.rstrip('/')}/chat/completions", json=body).raise_for_status()
                text = strict_json.loads(answer.text)["choices"][0]["message"]["content"]
                score = _score(text)
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                last = f"{type(error).__name__}: {error}"
                continue
            _keep(kept, text)
            return score / BEST
        return RewardError(f"{self._address}: no score in {TRIES} tries; the last: {last}")

    def _body(self, png: str, text: str) -> dict[str, Any]:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
        schema = {"type": "json_schema", "json_schema": {"name": "judgement", "schema": SCHEMA, "strict": True}}
        content = [picture, {"type": "text", "text": text}]
        return {
            "model": self._model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
            "response_format": schema,
        }


def _score(text: str) -> int:
    """Raises ValueError for what does not follow the schema."""
    answer = strict_json.loads(text)
    score = answer.get("score") if isinstance(answer, dict) else None
    if type(score) is not int or not 0 <= score <= BEST:
        raise ValueError(f"expected a score of 0 to {BEST}, got {text[:100]!r}")
    return score


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def make(threads: int, model: str | None = None) -> Reward:
    if model is None:
        raise UserError("""reward vlm_judge: give reward.model.vlm_judge='"ADDRESS#NAME"', with both pairs of quotes""")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Judge(model, Path(home) / "omni_rollout" / "vlm_judge")
