"""Who samples what: in whatever order servers finish, die, return and answer late, a request is finished or given up once."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.rollout.dispatch import ATTEMPTS, Dispatcher, work
from omni_rollout.types import Prompt, RolloutRequest, SamplingSpec

SPEC = SamplingSpec(
    height=64,
    width=64,
    num_inference_steps=4,
    true_cfg_scale=1.0,
    negative_prompt=None,
    noise_level=0.7,
    sde_type="sde",
    log_prob_form="gaussian",
    step_indices=(0, 1),
    prompt_width=16,
    negative_prompt_width=16,
)


def request(member: int, **spec: object) -> RolloutRequest:
    group = "00001-000-a"
    return RolloutRequest(
        request_id=f"{group}-{member:02d}",
        prompt=Prompt(text="a cat"),
        spec=replace(SPEC, **spec),  # type: ignore[arg-type]
        seed=member,
        group_id=group,
        member=member,
    )


class Cluster:
    """Servers that work off what a Dispatcher sends them, in an order that `chance` decides; checks its promises on the way."""

    def __init__(self, steps: list[int], servers: int, max_num_seqs: int, chance: random.Random) -> None:
        self.requests = {r.request_id: r for r in (request(i, num_inference_steps=n) for i, n in enumerate(steps))}
        self.dispatcher = Dispatcher(self.requests.values(), range(servers), max_num_seqs)
        self.max_num_seqs, self.chance = max_num_seqs, chance
        self.chunks: dict[int, list[list[str]]] = {server: [] for server in range(servers)}
        self.down: set[int] = set()
        self.lost: list[tuple[int, str]] = []  # what servers that were taken for dead may still answer
        self.finished: list[str] = []
        self.starts: dict[str, int] = dict.fromkeys(self.requests, 0)  # how often a server died while at its chunk
        self.send()

    def send(self) -> None:
        for server, chunk in self.dispatcher.assign():
            assert server not in self.down
            assert 0 < len(chunk) <= self.max_num_seqs
            held = {name for chunks in self.chunks.values() for sent in chunks for name in sent}
            assert not held & {r.request_id for r in chunk}, "on two servers at once"
            assert not set(self.finished) & {r.request_id for r in chunk}, "finished before"
            self.chunks[server].append([r.request_id for r in chunk])
            assert sum(map(len, self.chunks[server])) < 2 * self.max_num_seqs

    def answer(self, server: int, name: str) -> None:
        if self.dispatcher.finished(server, name):
            self.finished.append(name)
        self.send()

    def finish(self) -> None:
        busy = [server for server, chunks in self.chunks.items() if chunks]
        server = self.chance.choice(busy)
        name = self.chance.choice(self.chunks[server][0])
        self.chunks[server][0].remove(name)
        self.chunks[server] = [chunk for chunk in self.chunks[server] if chunk]
        self.answer(server, name)

    def die(self, server: int) -> None:
        self.down.add(server)
        for number, chunk in enumerate(self.chunks[server]):
            self.lost += [(server, name) for name in chunk]
            for name in chunk:
                self.starts[name] += number == 0
        self.chunks[server] = []
        before = set(self.dispatcher.left)
        again = {r.request_id for r in self.dispatcher.died(server)}
        given_up = before - set(self.dispatcher.left)
        assert again <= before and not again & given_up
        assert all(self.starts[name] == ATTEMPTS for name in given_up)
        self.send()

    def back(self, server: int) -> None:
        self.down.remove(server)
        self.lost = [(other, name) for other, name in self.lost if other != server]  # started again: it knows of nothing
        self.dispatcher.back(server)
        self.send()

    def late(self) -> None:
        self.answer(*self.lost.pop(self.chance.randrange(len(self.lost))))

    def happen(self) -> None:
        up = [server for server in self.chunks if server not in self.down]
        events = ["finish"] * 6 if any(self.chunks.values()) else []
        events += ["die"] * bool(up) + ["back"] * 2 * bool(self.down) + ["late"] * bool(self.lost)
        event = self.chance.choice(events)
        if event == "finish":
            self.finish()
        elif event == "die":
            self.die(self.chance.choice(up))
        elif event == "back":
            self.back(self.chance.choice(sorted(self.down)))
        else:
            self.late()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(2, 60), max_size=60), st.integers(1, 6), st.integers(1, 9), st.randoms(use_true_random=False))
def test_every_request_is_finished_once_or_given_up_by_name(steps, servers, max_num_seqs, chance):
    cluster = Cluster(steps, servers, max_num_seqs, chance)
    while not cluster.dispatcher.done:
        cluster.happen()
    given_up = [r.request_id for r in cluster.dispatcher.given_up]
    assert sorted(cluster.finished + given_up) == sorted(cluster.requests)
    finished = len(cluster.finished)
    while cluster.lost:  # answers that come when all is over count no more
        cluster.late()
    assert len(cluster.finished) == finished and not cluster.dispatcher.assign()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=60), st.integers(1, 6), st.integers(1, 9))
def test_no_server_is_given_more_than_its_share(steps, servers, max_num_seqs):
    requests = [request(member, num_inference_steps=count) for member, count in enumerate(steps)]
    sent = dict(Dispatcher(requests, range(servers), max_num_seqs).assign())
    loads = [sum(map(work, sent.get(server, []))) for server in range(servers)]
    costliest = max(map(work, requests))
    assert max(loads) <= sum(map(work, requests)) / servers + costliest
    if len(requests) <= max_num_seqs:  # room for all on any of them
        assert max(loads) - min(loads) <= costliest


def test_the_costly_come_first_and_the_rest_follows_as_there_is_room():
    dispatcher = Dispatcher([request(member, num_inference_steps=2 + member) for member in range(6)], [0], max_num_seqs=2)
    assert [r.member for r in dispatcher.assign()[0][1]] == [5, 4]
    assert not dispatcher.assign()
    assert dispatcher.finished(0, request(5).request_id)
    assert [r.member for r in dispatcher.assign()[0][1]] == [3, 2]


def test_what_a_dead_server_leaves_goes_to_another_before_all_else():
    dispatcher = Dispatcher([request(member) for member in range(12)], [0, 1], max_num_seqs=2)
    chunks = dict(dispatcher.assign())
    assert [r.member for r in dispatcher.died(1)] == [r.member for r in chunks[1]]
    for done in chunks[0]:
        dispatcher.finished(0, done.request_id)
    assert [r.member for r in dispatcher.assign()[0][1]] == [chunks[1][0].member], "tried before: alone"


@pytest.mark.parametrize("max_num_seqs", [1, 2, 8, 32])
def test_a_request_that_kills_its_server_is_given_up_and_no_other(max_num_seqs):
    killer = request(7).request_id
    dispatcher = Dispatcher([request(member) for member in range(100)], range(3), max_num_seqs)
    queues: dict[int, list[list[RolloutRequest]]] = {server: [] for server in range(3)}
    deaths = 0
    while not dispatcher.done:
        for server, chunk in dispatcher.assign():
            queues[server].append(chunk)
        server = next(server for server, chunks in queues.items() if chunks)
        if killer in {r.request_id for r in queues[server][0]}:
            dispatcher.died(server)
            dispatcher.back(server)
            queues[server] = []
            deaths += 1
        else:
            for done in queues[server].pop(0):
                assert dispatcher.finished(server, done.request_id)
    assert [r.request_id for r in dispatcher.given_up] == [killer]
    assert deaths == ATTEMPTS


def test_only_the_chunk_that_a_server_was_at_counts_as_tried():
    dispatcher = Dispatcher([request(member) for member in range(16)], [0], max_num_seqs=8)
    first = dispatcher.assign()[0][1]
    dispatcher.finished(0, first[0].request_id)
    second = dispatcher.assign()[0][1]
    dispatcher.died(0)
    dispatcher.back(0)
    assert [len(chunk) for _, chunk in dispatcher.assign()] == [2], "tried once: a quarter of 8"
    for done in first[1:]:
        dispatcher.finished(0, done.request_id)
    assert [chunk for _, chunk in dispatcher.assign()] == [second], "never tried, and all together"


def test_at_the_end_a_server_that_is_ahead_leaves_the_others_their_share():
    dispatcher = Dispatcher([request(member) for member in range(24)], [0, 1], max_num_seqs=8)
    chunks = dict(dispatcher.assign())
    dispatcher.finished(0, chunks[0][0].request_id)
    assert [len(chunk) for _, chunk in dispatcher.assign()] == [5], "7 + 5 of the 23 that are left"


def test_with_no_server_up_nothing_is_sent_until_one_is_back():
    dispatcher = Dispatcher([request(0)], [0], max_num_seqs=1)
    dispatcher.assign()
    dispatcher.died(0)
    assert not dispatcher.assign() and dispatcher.left == [request(0).request_id]
    dispatcher.back(0)
    assert [server for server, _ in dispatcher.assign()] == [0]


def test_guidance_and_size_cost():
    assert work(request(0, negative_prompt=" ")) == 2 * work(request(0))
    assert work(request(0, height=128)) > work(request(0))
