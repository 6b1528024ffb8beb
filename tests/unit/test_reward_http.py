"""Rewards over real HTTP: a server that fails, delays, drops and lies in turn, and one in a process of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from omni_rollout.config import RewardConfig
from omni_rollout.errors import UserError
from omni_rollout.rewards import WeightedSum
from omni_rollout.rewards.base.http import IMAGES_A_REQUEST, from_wire, to_wire
from omni_rollout.rewards.base.server import application
from omni_rollout.types import Prompt

SCORINGS = 500
RANDOM = np.random.default_rng(0)
IMAGES = [RANDOM.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(SCORINGS)]
PROMPTS = [Prompt(text=f"prompt {number}", metadata={"number": number}) for number in range(SCORINGS)]


@contextmanager
def serving(app: Any) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


class Brightness:
    """Remembers which images it scored, by their numbers."""

    kinds = frozenset({"image"})

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()

    def check(self, prompts: Sequence[str], metadata: Sequence[Any]) -> None:
        if "forbidden" in prompts:
            raise UserError("a forbidden prompt")

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        self.seen.update(row["number"] for row in metadata)
        return [float(image.mean()) for image in images]


LIES = [
    lambda told: {"rewards": told["rewards"][:-1]},
    lambda told: {"rewards": [*told["rewards"], 1.0]},
    lambda told: {"rewards": [float("nan")] * len(told["rewards"])},
    lambda told: {"rewards": ["9.5"] * len(told["rewards"])},
    lambda told: {"rewards": [True] * len(told["rewards"])},
    lambda told: told["rewards"],
]
FAULTS = ("fail", "fail late", "delay", "drop", *range(len(LIES)), "garbage")


class Unreliable:
    """An ASGI application in front of the real one: every request of a body's first tries meets another fault."""

    def __init__(self, app: Any, delay: float) -> None:
        self._app, self._delay = app, delay
        self.met: Counter[Any] = Counter()
        self._posts = 0
        self._tries: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != "/":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        key = json.loads(body)["id"]
        self._tries[key] += 1
        self._posts += 1
        fault = FAULTS[self._posts % len(FAULTS)] if self._tries[key] <= 2 else None
        if fault is not None:
            self.met[fault] += 1
        if fault == "fail":
            await answer(send, 503, b"busy")
            return
        sent: list[Any] = []

        async def replay() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Any) -> None:
            sent.append(message)

        await self._app(scope, replay, keep)
        told = b"".join(message.get("body", b"") for message in sent)
        if fault == "drop":  # scored, and half of it told: uvicorn closes the connection then
            size = str(len(told)).encode()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", size)]})
            await send({"type": "http.response.body", "body": told[: len(told) // 2], "more_body": True})
            raise ConnectionResetError
        if fault == "delay":
            import asyncio

            await asyncio.sleep(self._delay)
        if fault == "fail late":
            await answer(send, 500, told)
        elif fault == "garbage":
            await answer(send, 200, told[: len(told) // 2])
        elif isinstance(fault, int):
            await answer(send, 200, json.dumps(LIES[fault](json.loads(told))).encode())
        else:
            await answer(send, 200, told)


async def answer(send: Any, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


def remote(address: str, **settings: Any) -> WeightedSum:
    return WeightedSum({"bright": 1.0}, settings=RewardConfig(weights={}, source={"bright": address}, **settings))


def test_500_scorings_with_a_server_that_fails_delays_drops_and_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout = 200.0  # never reached; a try is given up after a hundredth of it
    monkeypatch.setattr("omni_rollout.rewards.base.http.SHARE_A_TRY", 0.01)
    behaved, reward = Brightness(), Brightness()
    expected = behaved(IMAGES, [prompt.text for prompt in PROMPTS], [prompt.metadata for prompt in PROMPTS])
    unreliable = Unreliable(application("bright", reward, timeout), delay=0.01 * timeout + 1)
    with serving(unreliable) as address:
        batch = remote(address, timeout=timeout)(IMAGES, PROMPTS)
    assert batch.failures == [] and batch.total == expected, "none lost, and the numbers of a server that behaves"
    assert reward.seen == behaved.seen and set(reward.seen.values()) == {1}, "none scored twice"
    assert set(unreliable.met) == set(FAULTS), "every fault was met"
    assert sum(unreliable.met.values()) >= SCORINGS / IMAGES_A_REQUEST


def test_a_server_that_stays_down_costs_its_images_alone_and_says_why() -> None:
    async def down(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 200 if scope["method"] == "GET" else 503, b"{}")

    with serving(down) as address:
        rewards = remote(address, timeout=5.0)
        batch = rewards(IMAGES[:3], PROMPTS[:3])
    assert batch.total == [None] * 3 and "no answer that makes sense within 4.5 s" in batch.failures[0]
    assert "503" in batch.failures[0]


def test_one_image_that_the_reward_cannot_score_is_lost_alone_with_its_reason() -> None:
    def reward(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        return [1 / (row["number"] - 2) for row in metadata]

    with serving(application("r", reward, 10)) as address:
        batch = remote(address)(IMAGES[:4], PROMPTS[:4])
    assert batch.total == [-0.5, -1.0, None, 1.0]
    assert "division by zero" in batch.failures[0] and "prompt 2" in batch.failures[0]


def test_kinds_and_checks_come_from_the_server() -> None:
    with serving(application("bright", Brightness(), 10)) as address:
        rewards = remote(address)
        rewards.check([Prompt(text="a")], "image")
        with pytest.raises(UserError, match=r"reward\.source\.bright: a forbidden prompt"):
            rewards.check([Prompt(text="forbidden")], "image")
        with pytest.raises(UserError, match="reward bright scores image, this model makes video"):
            rewards.check([], "video")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "Expecting"),
        (b"[]", "expected an object"),
        (b'{"images": [], "prompts": []}', "no list `metadata`"),
        (b'{"images": [], "prompts": ["a"], "metadata": [{}]}', "0 images, 1 prompts"),
        (b'{"images": ["!"], "prompts": ["a"], "metadata": [{}]}', "not the base64 of a PNG"),
        (b'{"images": ["gASVAAAA"], "prompts": ["a"], "metadata": [{}]}', "not the base64 of a PNG"),
        (b'{"images": ["A"], "prompts": [1], "metadata": [{}]}', "every prompt as text"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_next_is_served(body: bytes, message: str) -> None:
    with serving(application("bright", Brightness(), 10)) as address:
        refused = httpx.post(address, content=body)
        assert refused.status_code == 400 and message in refused.json()["error"]
        assert remote(address)(IMAGES[:1], PROMPTS[:1]).total == [float(IMAGES[0].mean())]


@pytest.mark.parametrize("shape", [(8, 6, 3), (3, 8, 6, 3), (2, 8, 6, 4)])
def test_media_arrive_with_the_same_bits(shape: tuple[int, ...]) -> None:
    media = RANDOM.integers(0, 256, shape, np.uint8)
    assert np.array_equal(from_wire(json.loads(json.dumps(to_wire(media)))), media)


def test_the_command_serves_a_reward_from_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def bright(images, prompts, metadata):\n    return [i.mean() for i in images]\n")
    command = [sys.executable, "-m", "omni_rollout.cli", "reward", "serve", f"{tmp_path / 'mine.py'}:bright", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, _, address = process.stdout.readline().strip().partition(": ")
        assert name == "reward bright"
        try:
            batch = remote(address)(IMAGES[:20], PROMPTS[:20])
        finally:
            process.terminate()
    assert batch.total == [float(image.mean()) for image in IMAGES[:20]] and not batch.failures


class ChatServer:
    """Speaks chat completions: its first answers are what it is given, then one that makes sense."""

    def __init__(self, *first: Any) -> None:
        self._first, self.asked = list(first), list[Any]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.asked.append((scope["path"], dict(scope["headers"]), json.loads(body)))
        if self._first:
            status, told = self._first.pop(0)
        else:
            status, told = 200, '{"reason": "there it is", "score": 7}'
        content = json.dumps({"choices": [{"message": {"content": told}}]}) if status == 200 else told
        await answer(send, status, content.encode())


def judge(address: str, cache: Path) -> Any:
    from omni_rollout.rewards.vlm_judge import Judge

    return Judge(f"{address}/v1#a-model", cache)


def test_a_judge_is_asked_again_until_its_answer_makes_sense_and_never_twice(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("omni_rollout.rewards.vlm_judge.PAUSE", 0.01)
    chat = ChatServer((500, "busy"), (200, "no JSON"), (200, '{"score": 11}'), (200, '{"score": true}'))
    with serving(chat) as address:
        assert judge(address, tmp_path)(IMAGES[:1], ["a cat"], [{}]) == [0.7]
        assert len(chat.asked) == 5
        assert judge(address, tmp_path)(IMAGES[:1], ["a cat"], [{}]) == [0.7] and len(chat.asked) == 5, "kept on disk"
        assert judge(address, tmp_path)(IMAGES[:2], ["a cat"] * 2, [{"question": "Is it red?"}] * 2) == [0.7, 0.7]
        assert len(chat.asked) == 7, "another question, another image"
    path, headers, body = chat.asked[0]
    assert path == "/v1/chat/completions" and headers[b"authorization"] == b"Bearer secret" and body["model"] == "a-model"
    picture, text = body["messages"][0]["content"]
    assert np.array_equal(from_wire(picture["image_url"]["url"].partition("base64,")[2]), IMAGES[0])
    assert "Prompt: a cat" in text["text"] and body["response_format"]["json_schema"]["strict"] is True
    assert "Is it red?" in chat.asked[-1][2]["messages"][0]["content"][1]["text"]
    assert not list(tmp_path.glob("*.part"))


def test_a_judge_that_gives_no_score_loses_that_image_and_a_damaged_cache_is_asked_anew(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("omni_rollout.rewards.vlm_judge.PAUSE", 0.01)
    with serving(ChatServer(*[(200, "{}")] * 5)) as address:
        (lost,) = judge(address, tmp_path)(IMAGES[:1], ["a cat"], [{}])
        assert "no score in 5 tries" in str(lost) and not list(tmp_path.iterdir())
        assert judge(address, tmp_path)(IMAGES[:1], ["a cat"], [{}]) == [0.7]
        (kept,) = tmp_path.iterdir()
        kept.write_text('{"score"')
        assert judge(address, tmp_path)(IMAGES[:1], ["a cat"], [{}]) == [0.7] and "reason" in kept.read_text()
    with pytest.raises(UserError, match="expected ADDRESS#NAME"):
        from omni_rollout.rewards.vlm_judge import Judge

        Judge("http://somewhere/v1", tmp_path)
