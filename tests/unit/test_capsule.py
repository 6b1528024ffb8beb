"""Capsules give back every bit, and whatever is wrong with one is said by file and field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_rollout.trajectories.capsule import FORMAT_VERSION, KEYS, CapsuleError, load_capsule, packed, save_capsule, serialized
from omni_rollout.trajectories.media import save_media
from omni_rollout.types import Prompt, SamplingSpec, Trajectory

VALUES = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.lists(st.integers())
METADATA = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)


def trajectory(
    *, stochastic: int = 2, steps: int = 4, columns: int = 3, channels: int = 8, width: int = 5, guided: bool = True,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0, metadata: dict[str, Any] | None = None,
) -> Trajectory:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    negative_width = width + 1

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    spec = SamplingSpec(
        height=16, width=16 * columns, num_inference_steps=steps, true_cfg_scale=4.0 if guided else 1.0,
        negative_prompt=" " if guided else None, noise_level=0.1 + 0.2, sde_type="sde", log_prob_form="gaussian",
        step_indices=tuple(range(stochastic)), prompt_width=width, negative_prompt_width=negative_width,
    )  # fmt: skip
    return Trajectory(
        latents=randn(stochastic + 1, columns, channels),
        log_probs=randn(stochastic),
        step_indices=torch.arange(stochastic),
        sigmas=torch.linspace(1, 0, steps + 1),
        timesteps=1000 * torch.linspace(1, 0, steps + 1)[:-1],
        prompt_embeds=randn(width, 7).to(dtype),
        prompt_embeds_mask=torch.arange(width) < max(1, width - 2),
        negative_prompt_embeds=randn(negative_width, 7).to(dtype) if guided else None,
        negative_prompt_embeds_mask=torch.arange(negative_width) < 1 if guided else None,
        media=np.random.default_rng(seed).integers(0, 256, (16, 16 * columns, 3), np.uint8),
        prompt=Prompt(text='ein Schild "42" ✓', metadata={"text": "42"} if metadata is None else metadata),
        spec=spec,
        seed=seed + 2**40,
        group_id="0a1b",
        member=3,
        policy_version=17,
        fingerprint={"dtype": "bfloat16", "widths": [5, 6], "versions": {"torch": "2.13.0"}, "compiled": False},
    )


def assert_same_bits(one: Trajectory, other: Trajectory) -> None:
    for field in fields(Trajectory):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and np.array_equal(a, b), field.name
        else:
            assert type(a) is type(b) and a == b, field.name


@given(
    stochastic=st.integers(0, 4), steps=st.integers(4, 6), columns=st.integers(1, 5), channels=st.integers(1, 9),
    width=st.integers(1, 6), guided=st.booleans(), dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**20), metadata=METADATA,
)  # fmt: skip
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_gives_every_bit_back(tmp_path: Path, **arguments: Any) -> None:
    before = trajectory(**arguments)
    save_capsule(before, tmp_path / "a.safetensors")
    assert_same_bits(before, load_capsule(str(tmp_path / "a.safetensors")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("steps", [2, 0])
def test_the_bytes_say_what_the_librarys_front_for_torch_writes(steps: int) -> None:
    record = trajectory()
    if not steps:  # a tensor of no elements has no address
        record = replace(
            record,
            latents=record.latents[:1],
            log_probs=torch.empty(0),
            step_indices=torch.empty(0, dtype=torch.int64),
            spec=replace(record.spec, sde_type="ode", noise_level=0.0, step_indices=()),
        )
    tensors, header = packed(record, "here")

    def said(content: bytes) -> tuple[dict[str, Any], bytes]:
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end]), content[end:]

    assert said(serialized(tensors, header)) == said(safetensors.torch.save(tensors, metadata=header))


def test_the_file_has_the_public_names(tmp_path: Path) -> None:
    save_capsule(trajectory(), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            "latents", "log_probs", "step_indices", "sigmas", "timesteps", "prompt_embeds", "prompt_embeds_mask",
            "negative_prompt_embeds", "negative_prompt_embeds_mask", "media",
        }  # fmt: skip
        header = {key: json.loads(value) for key, value in file.metadata().items()}
    assert header == {
        "height": 16, "width": 48, "num_inference_steps": 4, "true_cfg_scale": 4.0, "negative_prompt": " ",
        "noise_level": 0.1 + 0.2, "sde_type": "sde", "log_prob_form": "gaussian", "prompt_width": 5,
        "negative_prompt_width": 6, "seed": 2**40, "group_id": "0a1b", "member": 3, "policy_version": 17,
        "fingerprint": dict(trajectory().fingerprint), "format_version": 2, "prompt": 'ein Schild "42" ✓',
        "prompt_metadata": {"text": "42"}, "prompt_images": [], "family": "qwen_image", "extra": {},
    }  # fmt: skip


def test_rows_of_a_batch_can_be_saved(tmp_path: Path) -> None:
    batch = torch.randn(2, 6, 7)
    own = replace(
        trajectory(dtype=torch.float32), prompt_embeds=batch[0, :5], negative_prompt_embeds=batch[1],
        latents=torch.randn(3, 8, 3).transpose(1, 2),
    )  # fmt: skip
    save_capsule(own, tmp_path / "a.safetensors")
    assert_same_bits(own, load_capsule(tmp_path / "a.safetensors"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_capsule(trajectory(), path)
    write_bytes = Path.write_bytes

    def full_disk(target: Path, content: bytes) -> int:
        write_bytes(target, content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_capsule(trajectory(seed=1), path)
    monkeypatch.undo()
    assert_same_bits(load_capsule(path), trajectory())
    assert list(tmp_path.iterdir()) == [path]


def test_png_holds_the_image(tmp_path: Path) -> None:
    assert save_media(trajectory(), tmp_path / "a") == [tmp_path / "a.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), trajectory().image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def tamper(path: Path, tensors: dict[str, Any], header: dict[str, str | None]) -> None:
    """Writes a sound capsule with some tensors and header values replaced, or taken out where the new one is None."""
    save_capsule(trajectory(), path)
    with safetensors.safe_open(path, framework="pt") as file:
        old = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        new = {name: change(old[name]) if callable(change) else change for name, change in tensors.items()}
        kept = {name: tensor for name, tensor in {**old, **new}.items() if tensor is not None}
        metadata = {key: value for key, value in {**file.metadata(), **header}.items() if value is not None}
    safetensors.torch.save_file(kept, path, metadata=metadata)


def poked(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poke(tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[-1] = value
        return tensor

    return poke


@pytest.mark.parametrize(
    ("field", "tensor", "message"),
    [
        ("latents", None, "missing"),
        ("media", None, "missing"),
        ("step_indices", None, "missing"),
        ("log_probs", None, "missing"),
        ("negative_prompt_embeds", None, "missing, though guidance was on"),
        ("extra", torch.zeros(1), "unexpected"),
        ("latents", lambda t: t.bfloat16(), "torch.bfloat16, expected torch.float32"),
        ("latents", lambda t: t[1:].clone(), r"shape \[2, 3, 8\], expected \[3, 3, any\]"),
        ("latents", lambda t: t[:, 0].clone(), r"shape \[3, 8\]"),
        ("latents", poked(math.nan), "not finite"),
        ("latents", lambda t: t[:, :2].clone(), r"shape \[3, 2, 8\], expected \[3, 3, any\]"),
        ("latents", lambda t: t[:, :, :0].clone(), r"shape \[3, 3, 0\], expected \[3, 3, any\]"),
        ("log_probs", poked(-math.inf), "not finite"),
        ("log_probs", lambda t: t.reshape(2, 1), r"shape \[2, 1\], expected \[2\]"),
        ("step_indices", lambda t: t.float(), "torch.float32, expected torch.int64"),
        ("step_indices", poked(4), r"\[0, 4\], expected rising positions"),
        ("step_indices", poked(-1), r"\[0, -1\], expected rising positions"),
        ("step_indices", poked(0), r"\[0, 0\], expected rising positions"),
        ("sigmas", lambda t: t.flip(0), "expected numbers that fall from at most 1 to 0"),
        ("sigmas", lambda t: 2 * t, "expected numbers that fall from at most 1 to 0"),
        ("sigmas", poked(math.nan), "not finite"),
        ("timesteps", lambda t: t / 1000, "expected 1000 times the sigmas"),
        ("prompt_embeds", poked(math.nan), "not finite"),
        ("prompt_embeds", lambda t: t.double(), "torch.float64, expected a float type of 16 or 32 bits"),
        ("sigmas", lambda t: t[:-1].clone(), r"shape \[4\], expected \[5\]"),
        ("timesteps", poked(math.nan), "not finite"),
        ("prompt_embeds", lambda t: t.int(), "torch.int32, expected a float type"),
        ("prompt_embeds", lambda t: t[:4].clone(), r"shape \[4, 7\], expected \[5, any\]"),
        ("prompt_embeds_mask", lambda t: t.float(), "torch.float32, expected torch.bool"),
        ("prompt_embeds_mask", lambda t: t.flip(0), "not right padded"),
        ("prompt_embeds_mask", lambda t: t & False, "not right padded"),
        ("negative_prompt_embeds_mask", lambda t: t[:5].clone(), r"shape \[5\], expected \[6\]"),
        ("media", lambda t: t.float(), "torch.float32, expected torch.uint8"),
        ("media", lambda t: t[:, :, :1].clone(), r"shape \[16, 48, 1\], expected \[16, 48, 3\]"),
    ],
)
def test_wrong_tensors_are_refused_by_file_and_field(tmp_path: Path, field: str, tensor: Any, message: str) -> None:
    tamper(tmp_path / "a.safetensors", {field: tensor}, {})
    with pytest.raises(CapsuleError, match=rf"a\.safetensors: {field}: .*{message}"):
        load_capsule(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", None, "missing from the header"),
        ("format_version", str(FORMAT_VERSION + 1), f"{FORMAT_VERSION + 1}, expected 1 or {FORMAT_VERSION}"),
        ("fingerprint", "{", "is not JSON"),
        ("fingerprint", "[" * 100_000, "is not JSON"),
        ("fingerprint", '"x"', "is str, expected dict"),
        ("noise_level", "NaN", "is not JSON"),
        ("noise_level", "1e999", r"is not JSON \(1e999 is not a finite number\)"),
        ("noise_level", "0", "0, expected more than 0 with sde_type sde"),
        ("noise_level", "-0.5", "-0.5, expected more than 0 with sde_type sde"),
        ("true_cfg_scale", "1.0", "1.0, with negative_prompt ' ': above 1 exactly with one"),
        ("fingerprint", '{"x": [1e999]}', "is not JSON"),
        ("width", "47", "47, expected a multiple of 16"),
        ("height", "0", "0, expected a multiple of 16"),
        ("seed", "1.5", "is float, expected int"),
        ("member", "true", "is bool, expected int"),
        ("group_id", "7", "is int, expected str"),
        ("negative_prompt", "3", "is int, expected str or NoneType"),
        ("sde_type", '"euler"', "'euler', expected 'sde' or 'cps' or 'dance_sde' or 'ode'"),
        ("log_prob_form", '"mean"', "expected 'gaussian' or 'unnormalised'"),
        ("num_inference_steps", "0", "expected at least 1"),
        ("prompt", None, "missing from the header"),
    ],
)
def test_wrong_headers_are_refused_by_file_and_field(tmp_path: Path, field: str, value: str | None, message: str) -> None:
    tamper(tmp_path / "a.safetensors", {}, {field: value})
    with pytest.raises(CapsuleError, match=rf"a\.safetensors: {field}: .*{message}"):
        load_capsule(tmp_path / "a.safetensors")


def test_tensors_and_header_must_agree_about_the_size(tmp_path: Path) -> None:
    tamper(tmp_path / "a.safetensors", {}, {"height": "32"})
    with pytest.raises(CapsuleError, match=r"a\.safetensors: latents: shape \[3, 3, 8\], expected \[3, 6, any\]"):
        load_capsule(tmp_path / "a.safetensors")


def test_deterministic_and_cps_capsules_keep_their_own_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tamper(path, {}, {"sde_type": '"ode"'})
    with pytest.raises(CapsuleError, match="step_indices: 2 stochastic steps, expected none with sde_type ode"):
        load_capsule(path)
    tamper(path, {}, {"sde_type": '"cps"', "noise_level": "1.1"})
    with pytest.raises(CapsuleError, match=r"noise_level: 1\.1, expected at most 1 with sde_type cps"):
        load_capsule(path)
    still = trajectory(stochastic=0)
    still = replace(still, spec=replace(still.spec, sde_type="ode", noise_level=0.0))
    save_capsule(still, path)
    assert_same_bits(still, load_capsule(path))


def test_tensors_and_header_must_agree_about_guidance(tmp_path: Path) -> None:
    tamper(tmp_path / "a.safetensors", {}, {"negative_prompt": "null", "true_cfg_scale": "1.0"})
    with pytest.raises(CapsuleError, match=r"negative_prompt_embeds.*: unexpected, since guidance was off"):
        load_capsule(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"PK\x03\x04 a pickle in a zip, say", None])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CapsuleError, match=r"a\.safetensors: not a readable safetensors file"):
        load_capsule(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CapsuleError, match=r"a\.safetensors: format_version: missing from the header, which has no metadata"):
        load_capsule(path)


@given(data=st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_gives_a_capsule_error_or_a_sound_record(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    save_capsule(trajectory(), path)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, header_end + 50) | st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        loaded = load_capsule(path)
    except CapsuleError as error:
        assert "a.safetensors" in str(error)
    else:
        save_capsule(loaded, path)
        assert_same_bits(loaded, load_capsule(path))


@given(field=st.sampled_from(sorted(KEYS)), value=VALUES | st.integers() | METADATA)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_header_gives_a_capsule_error_or_a_sound_record(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "a.safetensors"
    tamper(path, {}, {field: json.dumps(value)})
    try:
        loaded = load_capsule(path)
    except CapsuleError as error:
        assert "a.safetensors" in str(error)
    else:
        save_capsule(loaded, path)
        assert_same_bits(loaded, load_capsule(path))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_capsule(trajectory(), path)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(CapsuleError, match=r"a\.safetensors: not a readable"):
            load_capsule(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 3, 8).bfloat16()}, "latents: torch.bfloat16"),
        ({"log_probs": torch.tensor([0.0, math.nan])}, "log_probs: holds numbers that are not finite"),
        ({"step_indices": torch.tensor([1, 2])}, r"step_indices: \[1, 2\], but the spec says \(0, 1\)"),
        ({"prompt_embeds_mask": torch.tensor([False, True, True, True, True])}, "prompt_embeds_mask: not right padded"),
        ({"negative_prompt_embeds": None}, "negative_prompt_embeds: missing, though guidance was on"),
        ({"media": np.zeros((16, 48, 3), np.float32)}, "media: torch.float32"),
        ({"fingerprint": {"widths": (5, 6)}}, "fingerprint: .*would come back from JSON as"),
        ({"fingerprint": {"digest": object()}}, "fingerprint: .*cannot be written as JSON"),
        ({"prompt": Prompt(text="a", metadata={"x": math.nan})}, "prompt_metadata: .*cannot be written as JSON"),
        ({"prompt": Prompt(text="a", metadata={1: "x"})}, "prompt_metadata: .*would come back"),
        ({"prompt": Prompt(text="\ud83d\ude00")}, "prompt: .*would come back from JSON as '\U0001f600'"),
        ({"seed": None}, "seed: None is NoneType, expected int"),
    ],
)
def test_what_would_not_load_is_not_saved(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CapsuleError, match=rf"a\.safetensors: {message}"):
        save_capsule(replace(trajectory(), **change), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
