"""Bodies -> requests: every road ends in `Collator.asked`, with the parameters that were given and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from omni_rollout.config import ServeConfig
from omni_rollout.data.collate import Collator, derive_seed
from omni_rollout.data.prompts import printable
from omni_rollout.errors import UserError
from omni_rollout.rollout.serve.bodies import Asked, Chat, ImagePart, Images, Rollouts, Sampling, TextPart, parse
from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.rollout.serve.images import ImageFolder, image_bytes
from omni_rollout.rollout.serve.limits import check_given, check_spec, check_text
from omni_rollout.types import InputImage, Prompt, RequestError, RolloutRequest

SHARED = "sha256:"
SCALES = ("true_cfg_scale", "cfg_scale", "guidance_scale")  # one parameter under the names that clients have for it
SAME_NAME = ("negative_prompt", "num_inference_steps", "noise_level", "sde_type")
EXTRA = {"layers": "layers", "resolution": "resolution", "num_frames": "frames", "guidance_scale_2": "true_cfg_scale_2"}
OUTER = ("messages", "model", "modalities", "stream", "user")  # of a chat's body; all else may lie in its `extra_body`


@dataclass
class Batch:
    """The requests of one body, and the input images that are kept until they are done."""

    requests: list[RolloutRequest] = field(default_factory=list)
    images: list[InputImage] = field(default_factory=list)


class Reader:
    """Of one server. Each method raises BadRequest: what is wrong with the first that cannot be served, by its field."""

    def __init__(self, collator: Collator, limits: ServeConfig, images: ImageFolder) -> None:
        self._collator, self._limits, self._images = collator, limits, images

    def rollouts(self, body: Rollouts) -> Batch:
        """In their order, the members of a group beside one another."""
        number = sum(asked.n for asked in body.requests)
        if number > self._limits.max_requests:
            most = self._limits.max_requests
            raise BadRequest(f"requests: {number} images, this server takes {most} at a time (serve.max_requests)", "requests")
        shared = [image_bytes(text, f"images.{place}") for place, text in enumerate(body.images)]
        table = {hashlib.sha256(content).hexdigest(): content for content in shared}
        with self._batch() as batch:
            for place, asked in enumerate(body.requests):
                self._add(batch, asked, f"requests.{place}.", f"requests.{place}.sampling.", table)
        return batch

    def generation(self, body: Images) -> Batch:
        with self._batch() as batch:
            self._add(batch, to_asked(body), "", "", {})
        return batch

    def release(self, batch: Batch) -> None:
        self._images.release(batch.images)

    @contextmanager
    def _batch(self) -> Iterator[Batch]:
        batch = Batch()
        try:
            yield batch
        except BaseException:
            self.release(batch)
            raise

    def _add(self, batch: Batch, asked: Asked, where: str, inside: str, table: Mapping[str, bytes]) -> None:
        """`where` and `inside`: before the names of fields, and of sampling parameters."""
        check_text(asked.prompt, self._limits, f"{where}prompt")
        given = asked.sampling.model_dump(exclude_none=True)
        if "true_cfg_scale" in given and "cfg_scale" in given:
            raise BadRequest(f"{inside}cfg_scale: the same as true_cfg_scale; give one of the two", f"{inside}cfg_scale")
        check_given(given, self._limits, inside)
        images = [self._image(batch, text, f"{where}images.{place}", table) for place, text in enumerate(asked.images)]
        with _named(given, images, where, inside):
            prompt = Prompt(text=printable(asked.prompt, f"{where}prompt"), images=tuple(images))
            for place in range(asked.n):
                seed = asked.seed if asked.seed is None or place == 0 else derive_seed(asked.seed, place)
                member = asked.member + place
                request = self._collator.asked(prompt, given, seed=seed, group=asked.group_id, member=member)
                if not place:
                    check_spec(request.spec, self._limits, inside)
                batch.requests.append(request)

    def _image(self, batch: Batch, text: str, param: str, table: Mapping[str, bytes]) -> InputImage:
        content = table.get(text.removeprefix(SHARED)) if text.startswith(SHARED) else image_bytes(text, param)
        if content is None:
            raise BadRequest(f"{param}: {text[:80]!r} is not among the body's images", param)
        image = self._images.keep(content, param)
        batch.images.append(image)
        return image


@contextmanager
def _named(given: Mapping[str, Any], images: Sequence[InputImage], where: str, inside: str) -> Iterator[None]:
    """Turns what the resolver refuses into a BadRequest that says which field it is about."""
    try:
        yield
    except (RequestError, UserError, TypeError, OverflowError) as error:
        message = str(error)
        for image in images:
            message = message.replace(image.path, "input image")
        parameter = next((key for key in (*given, *given.get("extra", {})) if key in message), None)
        field = inside + parameter if parameter else where + ("images" if "image" in message else "prompt")
        raise BadRequest(message if field in message else f"{field}: {message}", field) from None


def to_asked(body: Images) -> Asked:
    """OpenAI's and vllm-omni's words for what is asked. Nothing that was given is left out in silence."""
    given = body.model_dump(exclude_none=True)
    sampling: dict[str, Any] = {name: given[name] for name in SAME_NAME if name in given}
    scales = [name for name in SCALES if name in given]
    if len({given[name] for name in scales}) > 1:
        raise BadRequest(f"{scales[0]}: {' and '.join(scales)} differ, and are one parameter here; give one", scales[0])
    if scales:
        sampling["true_cfg_scale"] = given[scales[0]]
    sampling |= _size(given)
    extra = {own: given[name] for name, own in EXTRA.items() if name in given} | given.get("extra_params", {})
    n = given["n"] if given["n"] != 1 else given.get("num_outputs_per_prompt", 1)
    if given.get("num_outputs_per_prompt", n) != n:
        raise BadRequest("num_outputs_per_prompt: n is given too, and differs; give one of the two", "num_outputs_per_prompt")
    return Asked(
        prompt=body.prompt,
        images=body.images,
        sampling=Sampling(**sampling, extra=extra or None),
        seed=body.seed,
        n=n,
    )


def _size(given: Mapping[str, Any]) -> dict[str, int]:
    sides = {side: given[side] for side in ("height", "width") if side in given}
    size = given.get("size")
    if size is None or size == "auto":
        return sides
    width, cross, height = size.partition("x")
    if not cross or not (width + height).isascii() or not (width.isdigit() and height.isdigit()) or len(size) > 11:
        raise BadRequest(f"size: {size[:20]!r}, expected WIDTHxHEIGHT, such as 1024x1024", "size")
    if sides and sides != {"height": int(height), "width": int(width)}:
        raise BadRequest("size: height and width are given too, and differ; give one of the two", "size")
    return {"height": int(height), "width": int(width)}


def from_chat(body: Chat) -> Images:
    """The last message's text and pictures; the parameters may lie in the body, or in an `extra_body` inside it."""
    nested = body.extra_body or {}
    outer = body.model_dump(exclude_unset=True, exclude=set(OUTER) | {"extra_body", "prompt"})
    if twice := sorted(outer.keys() & nested.keys()):
        raise BadRequest(f"extra_body.{twice[0]}: given outside as well; give it once", f"extra_body.{twice[0]}")
    if own := sorted((nested.keys() | body.model_fields_set) & {"prompt", "images"}):
        raise BadRequest(f"{own[0]}: the prompt and its pictures are in the messages", own[0])
    message = body.messages[-1]
    if message.role != "user":
        raise BadRequest(f"messages: the last is {message.role}'s, expected the user's", "messages")
    if others := [one.role for one in body.messages[:-1]]:
        raise BadRequest(f"messages: {len(others)} before the last; an image model takes one prompt: send one", "messages")
    parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    pictures = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    return parse(Images, {**outer, **nested, "prompt": text, "images": pictures}, "extra_body." if nested else "")
