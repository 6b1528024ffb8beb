"""Prompts -> requests: fixed widths, and every seed and SDE window decided per group before dispatch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from enum import Enum
from functools import lru_cache
from typing import Any

from omni_rollout.config import CollateConfig, EvaluationConfig, SamplingConfig, Width
from omni_rollout.data.prompts import group_id
from omni_rollout.models import family_module
from omni_rollout.models.base.sampling import check_text, width_problem
from omni_rollout.types import InputImage, Prompt, RequestError, RolloutRequest, SamplingSpec

BUCKET = 16  # text tokens
REMEMBERED = 64  # texts
SPEC_KEYS = (
    "height",
    "width",
    "num_inference_steps",
    "true_cfg_scale",
    "negative_prompt",
    "noise_level",
    "sde_type",
    "log_prob_form",
    "extra",
)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything that can be printed; equal parts give equal seeds on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class WidthError(RequestError):
    """A text of more tokens than its width."""

    def __init__(self, message: str, tokens: int) -> None:
        super().__init__(message)
        self.tokens = tokens


class Remembering:
    """A tokenizer that cuts a text once: the members of a group, and the requests of a body, come with the same few."""

    def __init__(self, tokenizer: Any) -> None:
        self.name_or_path: str = getattr(tokenizer, "name_or_path", "")  # whose processor sizes its input images
        self._cut = lru_cache(REMEMBERED)(lambda text: tuple(tokenizer(text)["input_ids"]))

    def __call__(self, text: str) -> Mapping[str, Sequence[int]]:
        return {"input_ids": self._cut(text)}


class Collator:
    """Makes the requests of a step. A prompt that cannot be served is refused here, before the engine sees it.

    Args:
        window_start: (step, first, last, draw) -> where a group's window of stochastic steps begins; see `Algorithm`.
    """

    def __init__(
        self,
        family: str,
        tokenizer: Any,
        sampling: SamplingConfig,
        collate: CollateConfig,
        window_start: Callable[[int, int, int, random.Random], int] = lambda _, first, last, draw: draw.randint(first, last),
    ) -> None:
        self._window_start = window_start
        self._family = family_module(family, "spec")
        self._tokenizer = Remembering(tokenizer)
        self._sampling = deepcopy(sampling)  # what is changed later is not seen in halves
        self._values = {key: _plain(value) for key, value in asdict(sampling).items() if key in SPEC_KEYS}
        self._collate = collate
        if (problem := width_problem(collate.width.value, self._family.RULES)) is not None:
            raise RequestError(problem)
        if not self._family.RULES.images[0]:  # else a spec hangs on the prompt's images
            self.check(self.spec())

    def spec(
        self,
        overrides: Mapping[str, Any] | None = None,
        window: tuple[int, ...] | None = None,
        images: Sequence[InputImage] = (),
    ) -> SamplingSpec:
        """The run's sampling spec for a prompt with these images, with some parameters overridden."""
        values = self._values
        widths = {"prompt_width": self._collate.prompt_width, "negative_prompt_width": self._collate.negative_prompt_width}
        given = {key: value for key, value in (overrides or {}).items() if value is not None}
        extra = {**values["extra"], **{key: value for key, value in given.get("extra", {}).items() if value is not None}}
        return self._family.resolve({**values, **widths, "step_indices": window, **given, "extra": extra}, images)

    def asked(
        self,
        prompt: Prompt,
        parameters: Mapping[str, Any] | None = None,
        *,
        seed: int | None = None,
        group: str | None = None,
        member: int = 0,
    ) -> RolloutRequest:
        """A request by what was asked, and no more: in process and over HTTP the same, with the run's settings for the rest.

        Args:
            parameters: keys of `SamplingSpec`, or the alias `cfg_scale`; absent or None: the run's, then the family's.
            seed: None: derived from the run's, the group and the member.
            group: None: named by the prompt.

        Raises:
            RequestError: what cannot be served, with what was given and what to do.
        """
        given, group = dict(parameters or {}), group_id(prompt) if group is None else group
        steps = given.get("num_inference_steps")
        placed = self._sampling.sde_window_size is not None or self._sampling.sde_window_range is not None
        window = self.window(group, 1, steps) if placed and (steps is None or steps > 1) else None  # of 1, the resolver says it
        spec = self.spec(given, window, prompt.images)
        self.check(spec, prompt)
        return self.request(prompt, self._fitted(spec, prompt, given), group, member, seed)

    def check(self, spec: SamplingSpec, prompt: Prompt | None = None) -> None:
        """Raises RequestError when a text does not fit its width (WidthError), or is none where the family needs one."""
        if prompt is not None:
            check_text(prompt.text, self._family.RULES)
        texts = [("negative prompt", spec.negative_prompt, spec.negative_prompt_width)]
        if prompt is not None:
            texts.append(("prompt", prompt.text, spec.prompt_width))
        for what, text, width in texts:
            if text is None:
                continue
            tokens = self._family.text_tokens(self._tokenizer, text, spec)
            if tokens > width:
                raise WidthError(
                    f"{what} {text[:60]!r} has {tokens} text tokens, the fixed width is {width}: "
                    f"shorten it, or set collate.{what.replace(' ', '_')}_width={tokens}",
                    tokens,
                )

    def _fitted(self, spec: SamplingSpec, prompt: Prompt, given: Mapping[str, Any] | None = None) -> SamplingSpec:
        """With texts as wide as `collate.width` has them, from the widest that `spec` says; what was `given` stays."""
        kind = self._collate.width
        if kind is Width.fixed or not {"prompt_width", "negative_prompt_width"}.isdisjoint(given or ()):
            return spec
        own, negative = self._tokens(spec, prompt)
        if kind is Width.bucketed:
            own = min(-(-own // BUCKET) * BUCKET, spec.prompt_width)
            negative = min(-(-negative // BUCKET) * BUCKET, spec.negative_prompt_width)
            if self._collate.negative_prompt_width is None:
                own = negative = max(own, negative)  # branches of one width share a pass
        return replace(spec, prompt_width=own, negative_prompt_width=negative if spec.guided else own)

    def _tokens(self, spec: SamplingSpec, prompt: Prompt) -> tuple[int, int]:
        """Of the prompt and of the negative prompt; 0: there is none."""
        texts = prompt.text, spec.negative_prompt
        own, negative = (0 if text is None else self._family.text_tokens(self._tokenizer, text, spec) for text in texts)
        return own, negative

    def padding(self, requests: Sequence[RolloutRequest]) -> float:
        """Share of the text tokens of all branches that are padding."""
        valid = seen = 0
        for request in requests:
            spec = request.spec
            own, negative = self._tokens(spec, request.prompt)
            valid += own + negative
            seen += spec.prompt_width + (spec.negative_prompt_width if spec.guided else 0)
        return 1 - valid / seen

    def groups(self, prompts: Sequence[Prompt], step: int, group_size: int) -> list[RolloutRequest]:
        """`group_size` requests per prompt; members share the prompt and the SDE window, not the seed."""
        requests = []
        for position, prompt in enumerate(prompts):
            group = f"{step:05d}-{position:03d}-{group_id(prompt)}"
            spec = self.spec(size_of(prompt), self.window(group, step), prompt.images)
            self.check(spec, prompt)
            spec = self._fitted(spec, prompt)
            requests += [self.request(prompt, spec, group, member) for member in range(group_size)]
        return requests

    def evaluation(self, prompts: Sequence[Prompt], settings: EvaluationConfig, name: str) -> list[RolloutRequest]:
        """`settings.images` deterministic (ode) requests, the prompts in turn; the same seeds whatever the name."""
        chosen = [prompts[index % len(prompts)] for index in range(settings.images)]
        return [
            self.request(
                prompt,
                self._fitted(self.spec({"sde_type": "ode"}, images=prompt.images), prompt),
                f"evaluation-{name}-{index:05d}",
                0,
                seed=derive_seed(settings.seed, index),
            )
            for index, prompt in enumerate(chosen)
        ]

    def request(self, prompt: Prompt, spec: SamplingSpec, group: str, member: int, seed: int | None = None) -> RolloutRequest:
        return RolloutRequest(
            request_id=f"{group}-{member:02d}",
            prompt=prompt,
            spec=spec,
            seed=derive_seed(self._sampling.seed, group, member) if seed is None else seed,
            group_id=group,
            member=member,
        )

    def window(self, group: str, step: int, steps: int | None = None) -> tuple[int, ...] | None:
        """The stochastic steps of one group in step 1, 2, ... of the run: `sde_window_size` in a row, within the range."""
        given = self._sampling.num_inference_steps if steps is None else steps
        number: int = self._family.DEFAULTS["num_inference_steps"] if given is None else given
        placed = self._sampling.sde_window_range
        first, end = (0, number - 1) if placed is None else placed
        if not 0 <= first < end <= number - 1:
            raise RequestError(
                f"sde_window_range=[{first}, {end}]: expected 0 <= first < end <= {number - 1} "
                f"for {number} steps (the last step is deterministic)"
            )
        size = end - first if self._sampling.sde_window_size is None else self._sampling.sde_window_size
        if not 1 <= size <= end - first:
            raise RequestError(f"sde_window_size={size}: expected 1 to {end - first}, the size of sde_window_range")
        draw = random.Random(derive_seed(self._sampling.seed, group, "window"))
        start = self._window_start(step, first, end - size, draw)
        return tuple(range(start, start + size))


def size_of(prompt: Prompt) -> dict[str, int]:
    """Of the images that are learned from, where the prompt brings them."""
    return {"height": prompt.targets[0].height, "width": prompt.targets[0].width} if prompt.targets else {}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
