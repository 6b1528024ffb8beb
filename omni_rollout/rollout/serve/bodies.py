"""Bodies that clients send, each field named, typed and nothing else; what is absent is left to the server's settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError

from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.types import LogProbForm, SDEType

Number = Annotated[FiniteFloat, Field(ge=0, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=2**16)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Body = TypeVar("Body", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Sampling(Strict):
    """Keys of `SamplingSpec`, or the alias `cfg_scale`."""

    height: Pixels | None = None
    width: Pixels | None = None
    num_inference_steps: int | None = None
    true_cfg_scale: Number | None = None
    cfg_scale: Number | None = None
    negative_prompt: str | None = None
    noise_level: Number | None = None
    sde_type: SDEType | None = None
    log_prob_form: LogProbForm | None = None
    step_indices: list[Annotated[int, Field(ge=0, lt=2**16)]] | None = None
    prompt_width: int | None = None
    negative_prompt_width: int | None = None
    extra: dict[str, Any] | None = None


class Asked(Strict):
    """`n` images of one prompt, the members of a group."""

    prompt: str
    images: list[str] = []  # base64, a data: address, or sha256:DIGEST of one that lies beside the requests
    sampling: Sampling = Sampling()
    seed: Seed | None = None
    group_id: Name | None = None
    member: Annotated[int, Field(ge=0, lt=2**31)] = 0  # the first one's
    n: Annotated[int, Field(ge=1, lt=2**16)] = 1


class Rollouts(Strict):
    """Of `POST /v1/rollouts`."""

    requests: Annotated[list[Asked], Field(min_length=1)]
    images: list[str] = []  # that several requests share; base64
    weights: str | None = None  # digest of the policy that they are meant for


class Images(Strict):
    """Of `POST /v1/images/generations`: OpenAI's fields, and those of vllm-omni that mean something here."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = None
    cfg_scale: Number | None = None
    seed: Seed | None = None
    layers: int | None = None
    resolution: int | None = None
    num_frames: int | None = None
    guidance_scale_2: Number | None = None
    extra_params: dict[str, Any] | None = None
    generator_device: Literal["cpu"] | None = None  # the only one here
    vae_use_slicing: bool | None = None  # how memory is used, not what is made
    vae_use_tiling: Literal[False] | None = None
    images: list[str] = []
    num_outputs_per_prompt: Annotated[int, Field(ge=1, le=10)] | None = None
    noise_level: Number | None = None
    sde_type: SDEType | None = None


class ImageAddress(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageAddress


class Message(Strict):
    role: Literal["user", "system", "developer", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class Chat(Images):
    """Of `POST /v1/chat/completions`. `extra_body` inside the body is what clients without the openai package send."""

    prompt: Literal[None] = None  # type: ignore[assignment]  # it is in the messages
    messages: Annotated[list[Message], Field(min_length=1)]
    modalities: list[Literal["image", "text"]] | None = None
    stream: Literal[False] | None = None
    extra_body: dict[str, Any] | None = None


def parse(kind: type[Body], content: bytes | dict[str, Any], prefix: str = "") -> Body:
    """Of JSON, or of what was JSON. Raises BadRequest, naming the first field that is wrong, below `prefix`."""
    try:
        return kind.model_validate_json(content) if isinstance(content, bytes) else kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = prefix + ".".join(str(part) for part in first["loc"]) or None
        given = "" if first["type"] in ("missing", "json_invalid") else f", given {repr(first.get('input'))[:60]}"
        raise BadRequest(f"{param or 'body'}: {first['msg']}{given}", param) from None
