"""The same request in process and over HTTP is the same trajectory; OpenAI's clients, curl and vllm-omni's are understood."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save

from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.launch.paths import recipe_dir
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.policy.lora import attach_lora, save_lora
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.choice import make_engine
from omni_rollout.rollout.remote import RemoteEngine
from omni_rollout.rollout.serve.wire import frames
from omni_rollout.trajectories.capsule import decode_capsule
from omni_rollout.trajectories.digest import combined_digest, tensor_digests
from omni_rollout.types import Prompt, RequestError, RolloutRequest, Trajectory
from tests.e2e.serving import Serving, assert_same, collator_of, config_of

MODEL = ["model=nano", "collate.prompt_width=32", "sampling.num_inference_steps=4", "sampling.sde_window_size=2"]
LIMITS = ["serve.max_body_mb=1", "serve.max_steps=30", "serve.max_requests=40", "serve.max_waiting=200"]
GIVEN: list[dict[str, Any]] = [  # parameters; what is absent is the server's own
    {},
    {"num_inference_steps": 5},
    {"true_cfg_scale": 3.0, "negative_prompt": "blue"},
    {"cfg_scale": 2.0},
    {"true_cfg_scale": 0.0},
    {"noise_level": 0.0},
    {"height": 32, "width": 96, "sde_type": "cps", "noise_level": 0.5},
    {"prompt_width": 40, "step_indices": [1]},
]


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


PNG = base64.b64encode(encoded(Image.new("RGB", (32, 32)))).decode()


def prompts() -> list[Prompt]:
    """The last with metadata, which is part of a prompt's name, and does not travel."""
    texts = [f"a red {number}" for number in range(len(GIVEN))]
    return [*(Prompt(text=text) for text in texts[:-1]), Prompt(text=texts[-1], metadata={"text": "7"})]


@pytest.fixture(scope="module")
def here() -> tuple[list[RolloutRequest], list[Trajectory], dict[str, torch.Tensor]]:
    """What an engine in this process makes, by the same resolver; and the weights that it has."""
    config = config_of(MODEL)
    collator = collator_of(config)
    requests = [collator.asked(prompt, given) for prompt, given in zip(prompts(), GIVEN, strict=True)]
    torch.set_num_threads(1)
    with make_engine(config) as engine:
        made = {trajectory.group_id: trajectory for trajectory in engine.generate(requests)}
    weights = load_file(recipe_dir("nano") / "checkpoint/transformer/diffusion_pytorch_model.safetensors")
    return requests, [made[request.group_id] for request in requests], weights


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving([*MODEL, *LIMITS], tmp_path_factory.mktemp("serve") / "log") as serving:
        yield serving
        left = Path(httpx.get(f"{serving.url}/v1/models").json()["data"][0]["omni_rollout"]["shared_memory"])
        assert sorted(path.name for path in left.iterdir()) == ["lock", "token"], "a capsule stayed in shared memory"
    assert not left.exists()


def ask(server: Serving, body: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Trajectory]]:
    """What was understood, and the trajectories in the order of the requests."""
    answer = httpx.post(f"{server.url}/v1/rollouts", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    found = list(frames([answer.content]))
    assert found[0][0]["type"] == "accepted"
    made = {head["index"]: decode_capsule(content) for head, content in found[1:] if head["type"] == "trajectory"}
    return found[0][0]["requests"], [made[index] for index in sorted(made)]


def test_parameters_given_and_omitted_are_the_same_over_http(server, here):
    requests, expected, _ = here
    asked = [{"prompt": prompt.text, "sampling": given} for prompt, given in zip(prompts(), GIVEN, strict=True)]
    asked[-1]["group_id"] = requests[-1].group_id
    understood, made = ask(server, {"requests": asked})
    for request, echo, one, other in zip(requests, understood, made, expected, strict=True):
        assert echo["spec"] == json.loads(json.dumps(request.spec.to_json())) and echo["seed"] == request.seed
        assert_same(one, other)
    assert len(expected[0].log_probs) == 2 and expected[4].spec.true_cfg_scale == 0.0 and not len(expected[5].log_probs)


@pytest.mark.parametrize("shared", [0, None], ids=["shared memory", "socket"])
def test_a_remote_engine_is_an_engine(server, here, shared):
    requests, expected, _ = here
    with RemoteEngine(server.url, shared=shared) as engine:
        assert engine.shares_memory is (shared is not None)
        made = {trajectory.group_id: trajectory for trajectory in engine.generate(requests)}
        assert engine.weights_digest == expected[0].fingerprint["weights"]
        assert engine.machine.items() <= expected[0].fingerprint["machine"].items() | engine.machine.items()
    for request, other in zip(requests, expected, strict=True):
        assert_same(made[request.group_id], other)
        assert made[request.group_id].prompt == request.prompt, "its metadata with it"
    policy = load_policy(str(recipe_dir("nano") / "checkpoint"), torch.float32)
    trajectories = [made[request.group_id] for request in requests if request.spec.step_indices]
    scored = recompute(policy, trajectories, family="qwen_image", dtype=torch.float32, micro_batch_size=3)
    assert all(torch.equal(ours, one.log_probs) for ours, one in zip(scored, trajectories, strict=True)), "KL 0.0"


def test_a_client_says_from_what_size_on_it_reads_shared_memory(server, here):
    body = {"requests": [{"prompt": "a red 1", "n": 1}]}
    folder = Path(httpx.get(f"{server.url}/v1/models").json()["data"][0]["omni_rollout"]["shared_memory"])
    headers = {"x-shared-memory": (folder / "token").read_text()}
    answer = httpx.post(f"{server.url}/v1/rollouts", json=body, headers={**headers, "x-shared-memory-from": "5 MB"})
    assert answer.status_code == 400 and "x-shared-memory-from" in answer.text
    answer = httpx.post(f"{server.url}/v1/rollouts", json=body, headers={**headers, "x-shared-memory-from": str(4 << 20)})
    assert [head["type"] for head, content in frames([answer.content])] == ["accepted", "trajectory"]
    assert list(frames([answer.content]))[1][1], "it is small, so it came over the socket"


def test_one_request_that_is_refused_does_not_touch_the_others(server, here):
    requests, expected, _ = here
    spec = requests[0].spec
    wrong = RolloutRequest(
        request_id="wrong", prompt=Prompt(text="x"), spec=type(spec)(**{**spec.to_json(), "num_inference_steps": 31,
        "step_indices": spec.step_indices}), seed=1, group_id="wrong", member=0,
    )  # fmt: skip
    told: list[tuple[str, Exception]] = []
    with RemoteEngine(server.url) as engine:
        made = list(
            engine.generate([wrong, requests[1]], on_error=lambda request, error: told.append((request.request_id, error)))
        )
        assert_same(made[0], expected[1])
        ((name, error),) = told
        assert name == "wrong" and isinstance(error, RequestError) and "serve.max_steps" in str(error)
        with pytest.raises(ExceptionGroup, match="1 of 1 rollout requests failed"):
            list(engine.generate([wrong]))


def test_weights_change_what_is_sampled_and_are_compared(server, here):
    requests, expected, weights = here
    disturbed = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for name, tensor in weights.items()
    }
    for shared in (0, None):
        with RemoteEngine(server.url, shared=shared) as engine:
            digest = engine.update_weights(disturbed.items(), version=3)
            (one,) = engine.generate(requests[:1])
            assert one.policy_version == 3 and one.fingerprint["weights"] == digest
            assert not torch.equal(one.latents[-1], expected[0].latents[-1])
            assert engine.update_weights(weights.items(), version=0) == expected[0].fingerprint["weights"]
            (one,) = engine.generate(requests[:1])
            assert_same(one, expected[0])


def test_openais_package_and_its_echo(server, here):
    requests, expected, _ = here
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.images.generate(
        model="any", prompt="a red 1", n=2, size="64x64", extra_body={"num_inference_steps": 5, "seed": requests[1].seed}
    )
    assert len(answer.data) == 2
    assert np.array_equal(picture(answer.data[0].b64_json), expected[1].image)
    assert not np.array_equal(picture(answer.data[1].b64_json), expected[1].image), "members have seeds of their own"
    echo = answer.data[0].model_extra["omni_rollout"]
    assert echo["seed"] == requests[1].seed and echo["spec"]["num_inference_steps"] == 5
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(model="any", prompt="x", size="63x64")
    assert refused.value.param == "width" and "multiple of 16" in refused.value.message
    chat = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "a red 2"}],
        extra_body={"true_cfg_scale": 3.0, "negative_prompt": "blue", "seed": requests[2].seed},
    )
    url: Any = chat.choices[0].message.content
    assert np.array_equal(picture(url[0]["image_url"]["url"].partition(",")[2]), expected[2].image)


def test_curl_with_the_body_of_vllm_omnis_own_example(server):
    body = {
        "messages": [{"role": "user", "content": "A beautiful landscape painting"}],
        "extra_body": {"height": 64, "width": 64, "num_inference_steps": 5, "true_cfg_scale": 4.0, "seed": 42},
    }
    command = [
        "curl",
        "-s",
        f"{server.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        json.dumps(body),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (part,) = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert picture(part["image_url"]["url"].partition(",")[2]).shape == (64, 64, 3)
    assert part["omni_rollout"]["seed"] == 42 and part["omni_rollout"]["spec"]["true_cfg_scale"] == 4.0


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_the_phases_of_a_trainer_that_leads(server, here):
    weights = here[2]
    with httpx.Client(base_url=server.url, timeout=300) as client:
        assert client.post("/pause?mode=keep").status_code == 400
        assert client.post("/pause?mode=wait").json() == {"status": "paused"}
        assert client.get("/is_paused").json() == {"is_paused": True}
        with RemoteEngine(server.url) as engine, RemoteEngine(server.url) as other:
            waiting = other._http.build_request(
                "POST", "/v1/rollouts", json={"requests": [{"prompt": "a red 0", "group_id": "g"}]}
            )
            stream = other._http.send(waiting, stream=True)
            parts = frames(stream.iter_raw())
            assert next(parts)[0]["type"] == "accepted"
            engine.update_weights(weights.items(), version=7)
            assert next(parts)[0]["type"] == "alive", "held, under any weights"
            assert client.post("/resume").json() == {"status": "resumed"}
            head, content = next(part for part in parts if part[0]["type"] != "alive")
            assert head["type"] == "trajectory" and decode_capsule(content).policy_version == 7
            stream.close()
            engine.update_weights(weights.items(), version=0)
    assert server.idle()["policy_version"] == 0


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "dtype", "bits", "no safetensors", "pickle"])
def test_weights_that_are_wrong_change_nothing(server, here, damage):
    expected, weights = here[1:]
    sent = dict(weights)
    name = next(iter(sent))
    if damage == "missing":
        del sent[name]
    elif damage == "unknown":
        sent["more"] = torch.zeros(1)
    elif damage == "shape":
        sent[name] = torch.zeros(3)
    elif damage == "dtype":
        sent[name] = sent[name].bfloat16()
    content = save(sent)
    if damage == "no safetensors":
        content = content[:-1]
    elif damage == "pickle":
        content = pickle.dumps(sent)
    digest = f"&digest={'0' * 64}" if damage == "bits" else ""
    answer = httpx.post(f"{server.url}/v1/weights?version=9{digest}", content=content, timeout=300)
    assert answer.status_code == 400, answer.text
    named = {"bits": "digest", "unknown": "more", "no safetensors": "body", "pickle": "body"}.get(damage, name)
    assert answer.json()["error"]["param"] == named
    with RemoteEngine(server.url) as engine:
        assert engine.policy_version == 0 and engine.weights_digest == expected[0].fingerprint["weights"]


def sampling(**given: Any) -> dict[str, Any]:
    return {"requests": [{"prompt": "x", "sampling": given}]}


def rollout(**given: Any) -> dict[str, Any]:
    return {"requests": [{"prompt": "x", **given}]}


CHAT = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/secret"}}
KINDS: list[tuple[str, str, Any, int, str]] = [  # what, where, its body, status, and the field or limit that is named
    ("no JSON", "rollouts", b"{not json", 400, "body"),
    ("not an object", "rollouts", [1], 400, "body"),
    ("no requests", "rollouts", {"requests": []}, 400, "requests"),
    ("no prompt", "rollouts", {"requests": [{"seed": 1}]}, 400, "requests.0.prompt"),
    ("a prompt that is a number", "rollouts", {"requests": [{"prompt": 3}]}, 400, "requests.0.prompt"),
    ("an unknown field", "rollouts", rollout(sampler="y"), 400, "requests.0.sampler"),
    ("an unknown parameter", "rollouts", sampling(steps=3), 400, "requests.0.sampling.steps"),
    ("a number as text", "rollouts", sampling(height="64"), 400, "requests.0.sampling.height"),
    ("NaN", "rollouts", b'{"requests": [{"prompt": "x", "sampling": {"noise_level": NaN}}]}', 400, "noise_level"),
    ("no steps", "rollouts", sampling(num_inference_steps=0), 400, "requests.0.sampling.num_inference_steps"),
    ("too many steps", "rollouts", sampling(num_inference_steps=10**9), 400, "max_steps"),
    ("an odd size", "images/generations", {"prompt": "x", "size": "63x64"}, 400, "width"),
    ("a size without numbers", "images/generations", {"prompt": "x", "size": "large"}, 400, "size"),
    ("too many pixels", "images/generations", {"prompt": "x", "size": "65536x65536"}, 400, "max_pixels"),
    ("too many images", "rollouts", rollout(n=41), 400, "max_requests"),
    ("a long prompt", "rollouts", {"requests": [{"prompt": "x" * 10_001}]}, 400, "max_prompt_chars"),
    ("more tokens than fit", "rollouts", {"requests": [{"prompt": "a red cat " * 30}]}, 400, "requests.0.prompt"),
    ("a picture for a family without", "rollouts", rollout(images=["@png"]), 400, "images"),
    ("a path as a picture", "rollouts", rollout(images=["file:///etc/passwd"]), 400, "requests.0.images.0"),
    ("an address as a picture", "chat/completions", {"messages": [{"role": "user", "content": [CHAT]}]}, 400, "images.0"),
    ("nobody asks", "chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
    ("a body too large", "rollouts", b" " * ((1 << 20) + 1), 413, "max_body_mb"),
    ("weights without a version", "weights", b"", 400, "version"),
    ("an address that is not there", "nothing", {}, 404, "Not Found"),
    ("steps apart", "rollouts", sampling(step_indices=[0, 2]), 400, "sampling.step_indices"),
]


def test_malformed_requests_are_named_and_good_ones_beside_them_are_exact(server, here):
    expected, before = here[1], server.idle()
    body = {"requests": [{"prompt": "a red 1", "sampling": GIVEN[1]}]}

    async def bad(client: httpx.AsyncClient, number: int) -> None:
        what, where, content, status, named = KINDS[number % len(KINDS)]
        content = content if isinstance(content, bytes) else json.dumps(content).replace("@png", PNG).encode()
        answer = await client.post(f"/v1/{where}", content=content, headers={"content-type": "application/json"})
        error = answer.json()["error"]
        assert answer.status_code == status, (what, answer.text)
        assert named in f"{error['param']} {error['message']}", (what, error)

    async def good(client: httpx.AsyncClient) -> Trajectory:
        answer = await client.post("/v1/rollouts", json=body)
        return next(decode_capsule(content) for head, content in frames([answer.content]) if head["type"] == "trajectory")

    async def all_at_once() -> list[Trajectory]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            done = asyncio.gather(*[bad(client, number) for number in range(200)])
            made = await asyncio.gather(*[good(client) for _ in range(20)])
            await done
            return list(made)

    for trajectory in asyncio.run(all_at_once()):
        assert_same(trajectory, expected[1])
    after = server.idle()
    assert after["request_success_total"] - before["request_success_total"] == 20
    assert not list(server.images.rglob("omni_rollout-images-*/*")), "a picture stayed"


def test_places_of_clients_that_leave_are_freed(server, here):
    leave(server, 60)
    requests, expected, _ = here
    with RemoteEngine(server.url) as engine:
        (one,) = engine.generate(requests[1:2])
    assert_same(one, expected[1])


@pytest.mark.slow
def test_a_thousand_clients_that_leave_at_random_moments_leak_nothing(server, here):
    leave(server, 200)
    size = psutil.Process(server.process.pid).memory_info().rss
    leave(server, 800)
    assert psutil.Process(server.process.pid).memory_info().rss - size < 64 << 20
    test_places_of_clients_that_leave_are_freed(server, here)


def leave(server: Serving, number: int) -> None:
    """Clients that hang up at random moments, a fifth before their request is whole; afterwards nothing of them is there."""
    rng, before = random.Random(0), server.idle()
    folder = Path(httpx.get(f"{server.url}/v1/models").json()["data"][0]["omni_rollout"]["shared_memory"])
    token = (folder / "token").read_text()
    bodies = {
        "/v1/rollouts": {"requests": [{"prompt": "a red 1", "n": 2}]},
        "/v1/images/generations": {"prompt": "a red 1", "n": 2},
    }

    async def client(delay: float, where: str, cut: bool) -> None:
        content = json.dumps(bodies[where]).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        head = f"POST {where} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nx-shared-memory: {token}\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + (content[:-5] if cut else content))
        await writer.drain()
        await asyncio.sleep(delay)
        writer.close()

    async def all_of_them() -> None:
        for start in range(0, number, 20):
            chosen = rng.choices(list(bodies), k=min(20, number - start))
            await asyncio.gather(*[client(rng.uniform(0, 1), where, rng.random() < 0.2) for where in chosen])

    asyncio.run(all_of_them())
    after = server.idle()
    assert after["request_aborted_total"] > before["request_aborted_total"]
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "token"]


def test_lora_factors_are_merged_as_the_trainer_merges_them(server, here, tmp_path):
    weights = here[2]
    policy = load_policy(str(recipe_dir("nano") / "checkpoint"), torch.float32)
    attach_lora(policy, rank=4, alpha=6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_lora(policy, tmp_path, policy.state_dict())
    content = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    expected = combined_digest(tensor_digests(effective_weights(policy, torch.float32)))
    answer = httpx.post(f"{server.url}/v1/weights?version=4&digest={expected}", content=content, timeout=300)
    assert answer.json() == {"policy_version": 4, "weights": expected}
    lone = {name: tensor for name, tensor in load(content).items() if "lora_A" in name}
    answer = httpx.post(f"{server.url}/v1/weights?version=5", content=save(lone), timeout=300)
    assert answer.status_code == 400 and "lora_adapter_metadata" in answer.text
    with RemoteEngine(server.url) as engine:
        assert engine.policy_version == 4
        engine.update_weights(weights.items(), version=0)
