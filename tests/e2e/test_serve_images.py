"""Families with input images: in process, as a Ray worker and over HTTP the same; pictures that are none, or too much."""

from __future__ import annotations

import base64
import io
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import torch
from PIL import Image

from omni_rollout.integrations.verl.records import Weights
from omni_rollout.integrations.verl.server import RolloutServer
from omni_rollout.models import families, family_module
from omni_rollout.models.base.images import made_image
from omni_rollout.nano.random_weights import build_random
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.remote import RemoteEngine
from omni_rollout.rollout.serve.wire import frames, to_body
from omni_rollout.trajectories.capsule import decode_capsule
from omni_rollout.types import InputImage, Prompt, RolloutRequest, Trajectory
from tests.e2e.serving import Serving, assert_same, collator_of, config_of

EDIT = {"image_sizes": [[64, 64]], "vision_sizes": [[56, 56]]}
SMALL = {"height": 64, "width": 64}
GIVEN: dict[str, list[dict[str, Any]]] = {
    "qwen_image": [SMALL, {**SMALL, "true_cfg_scale": 3.0}],
    "qwen_image_edit": [{"extra": EDIT}, {**SMALL, "extra": EDIT, "true_cfg_scale": 3.0}],
    "qwen_image_edit_plus": [{"extra": {name: 2 * sizes for name, sizes in EDIT.items()}, "true_cfg_scale": 2.0}],
    "qwen_image_layered": [{**SMALL, "extra": {"layers": 2}}, {"extra": {"layers": 1, "resolution": 64}, "cfg_scale": 2.0}],
    "wan2_2": [{**SMALL, "extra": {"frames": 5}, "true_cfg_scale": 2.0}],
    "wan2_2_i2v": [{**SMALL, "extra": {"frames": 5}}],
}
NUMBER = {"qwen_image_edit": 1, "qwen_image_edit_plus": 2, "qwen_image_layered": 1, "wan2_2_i2v": 1}


def settings(family: str, folder: Path) -> list[str]:
    if not (folder / "model_index.json").exists():
        build_random(folder, family=family, seed=3)
    steps = ["sampling.num_inference_steps=4", "sampling.true_cfg_scale=1.0"]
    return [f"model.path={folder}", f"model.family={family}", "collate.prompt_width=64", *steps]


def worker_settings(family: str, folder: Path) -> list[str]:
    """What a Ray worker is given: all of a run."""
    (folder.parent / "prompts.txt").write_text("a cat\n")
    run = [f"prompts={folder.parent / 'prompts.txt'}", f"run_dir={folder.parent / 'run'}", "reward=jpeg_compressibility"]
    return [*settings(family, folder), *run, "threads=1"]


def asked(family: str, overrides: Sequence[str]) -> list[RolloutRequest]:
    collator = collator_of(config_of(overrides))
    images = tuple(made_image(number, 64, 80) for number in range(NUMBER.get(family, 0)))
    return [collator.asked(Prompt(text=f"a cat {place}", images=images), given) for place, given in enumerate(GIVEN[family])]


def over_http(server: Serving, family: str, images: Sequence[InputImage]) -> list[Trajectory]:
    """By a client that gives what is given, and pictures as base64."""
    pictures = [base64.b64encode(Path(image.path).read_bytes()).decode() for image in images]
    body = {
        "requests": [
            {"prompt": f"a cat {place}", "images": pictures, "sampling": given} for place, given in enumerate(GIVEN[family])
        ]
    }
    answer = httpx.post(f"{server.url}/v1/rollouts", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    made = {h["index"]: decode_capsule(content) for h, content in frames([answer.content]) if h["type"] == "trajectory"}
    return [made[place] for place in range(len(GIVEN[family]))]


def same_everywhere(family: str, server: Serving, requests: Sequence[RolloutRequest], worker: Sequence[Trajectory]) -> None:
    own = {trajectory.request_id: trajectory for trajectory in worker}
    for shared in (0, None):
        with RemoteEngine(server.url, shared=shared) as engine:
            for trajectory in engine.generate(requests):
                assert_same(trajectory, own[trajectory.request_id])
                assert trajectory.prompt == own[trajectory.request_id].prompt
    for request, trajectory in zip(requests, over_http(server, family, requests[0].prompt.images), strict=True):
        assert_same(trajectory, own[request.request_id])
        assert all(image.path.startswith("sha256:") for image in trajectory.prompt.images), "no path of the server"
    end = time.monotonic() + 30  # a picture goes after the last byte of the answer it was for
    while (left := list(server.images.rglob("omni_rollout-images-*/*"))) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left, "a picture stayed"


def test_the_edit_family_in_process_as_a_ray_worker_and_over_http(tmp_path):
    family, folder = "qwen_image_edit", tmp_path / "model"
    worker = RolloutServer(worker_settings(family, folder))
    requests = asked(family, settings(family, folder))
    digest = worker.engine.weights_digest
    made = list(worker.generate(requests, Weights(version=0, digest=digest, buckets=())))
    worker.engine.close()
    with Serving([*settings(family, folder), "serve.max_pixels=20000"], tmp_path / "log") as server:
        same_everywhere(family, server, requests, made)
        chat_with_a_picture(server, requests[1], made)
        pictures_that_are_refused(server, requests[0])


def chat_with_a_picture(server: Serving, request: RolloutRequest, made: Sequence[Trajectory]) -> None:
    """As vllm-omni's example of editing sends it."""
    data = base64.b64encode(Path(request.prompt.images[0].path).read_bytes()).decode()
    content = [
        {"type": "text", "text": request.prompt.text},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    extra = {**SMALL, "guidance_scale": 3.0, "seed": request.seed, "extra_params": EDIT}
    body = {"messages": [{"role": "user", "content": content}], "extra_body": extra}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    url = answer.json()["choices"][0]["message"]["content"][0]["image_url"]["url"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    (expected,) = [trajectory for trajectory in made if trajectory.request_id == request.request_id]
    assert np.array_equal(pixels, expected.image)


def pictures_that_are_refused(server: Serving, request: RolloutRequest) -> None:
    for what, content, said in (
        ("a large one", bomb(9_000), "serve.max_pixels"),
        ("a bomb", bomb(30_000), "decompression bomb"),
        ("cut off", Path(request.prompt.images[0].path).read_bytes()[:-200], "not readable"),
        ("a GIF", saved("GIF"), "not readable as PNG, JPEG, WEBP"),
        ("an animation", saved("WEBP", animated=True), "an animation of 2 frames"),
        ("text", b"<svg/>", "not readable"),
        ("empty", b"", "not readable"),
    ):
        body = to_body([request])
        body["requests"][0]["images"] = [base64.b64encode(content).decode()]
        answer = httpx.post(f"{server.url}/v1/rollouts", json=body, timeout=300)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "requests.0.images.0", (what, answer.text)
        assert said in answer.json()["error"]["message"], (what, answer.text)
    body = to_body([request])
    body["images"] = []
    answer = httpx.post(f"{server.url}/v1/rollouts", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "is not among the body's images" in answer.text


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it is `side` pixels wide and high."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, format="PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def saved(kind: str, animated: bool = False) -> bytes:
    buffer = io.BytesIO()
    first = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))
    more = {"save_all": True, "append_images": [Image.fromarray(np.zeros((32, 32, 3), np.uint8))]} if animated else {}
    first.save(buffer, format=kind, **more)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_in_process_through_ray_and_over_http(cluster, tmp_path, family):
    folder = tmp_path / "model"
    requests = asked(family, settings(family, folder))
    with Serving(settings(family, folder), tmp_path / "log") as server:
        with RemoteEngine(server.url) as engine:
            digest = engine.weights_digest
        actor: Any = ray.remote(RolloutServer).remote(worker_settings(family, folder))
        weights = Weights(version=0, digest=digest, buckets=())
        stream = actor.generate.options(num_returns="streaming").remote(requests, weights)
        made = [ray.get(next(stream)) for _ in requests]
        ray.kill(actor)
        same_everywhere(family, server, requests, made)
    torch.set_num_threads(1)
    policy = family_module(family, "policy").load_policy(str(folder), torch.float32)
    scored = recompute(policy, made, family=family, dtype=torch.float32, micro_batch_size=2)
    assert all(torch.equal(ours, one.log_probs) and len(ours) for ours, one in zip(scored, made, strict=True)), "KL 0.0"
