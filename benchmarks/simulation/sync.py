"""How long the weights of a step take from the trainer's first rank to every engine.

digest, copy into the store of the first rank's node ─► node to node, bucket by bucket ─► every engine: digest, load, digest

The three follow each other, as in the code; only within the second do transfers overlap.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Sizes in GB, rates in GB/s."""

    weights: float = 41.0  # 20.4e9 parameters in bf16
    bucket: float = 0.268  # 256 MiB
    link: float = 0.8  # of a node, in each direction: what Ray moved here, with no wire between
    workers_per_node: int = 8
    sha256: float = 1.7  # of one thread
    threads: int = 1  # that digest, in each process
    put: float = 6.3  # into Ray's store
    get: float = float("inf")  # out of it: a node's engines map one copy
    load: float = 25.0  # into an accelerator and back out, each
    peers: bool = True  # a node that has a bucket passes it on


@dataclass(frozen=True, kw_only=True)
class SyncSeconds:
    publish: float
    transfer: float
    adopt: float

    @property
    def total(self) -> float:
        return self.publish + self.transfer + self.adopt


def sync_seconds(sync: Sync, workers: int, seed: int = 0) -> SyncSeconds:
    """The first rank's node holds engines too, so it needs no transfer."""
    nodes = -(-workers // sync.workers_per_node)
    digest = sync.weights / (sync.sha256 * sync.threads)
    return SyncSeconds(
        publish=sync.weights / sync.load + digest + sync.weights / sync.put,
        transfer=transfer_seconds(sync, nodes, seed),
        adopt=sync.weights / sync.get + 2 * digest + 2 * sync.weights / sync.load,
    )


def transfer_seconds(sync: Sync, nodes: int, seed: int = 0) -> float:
    """In rounds of one bucket: in each, a node sends one and receives one at most, from a random holder, as Ray does it."""
    buckets = max(1, round(sync.weights / sync.bucket))
    chance = random.Random(seed)
    holds: list[set[int]] = [set(range(buckets)), *(set() for _ in range(nodes - 1))]
    rounds = 0
    while any(len(held) < buckets for held in holds):
        senders = [node for node, held in enumerate(holds) if held and (sync.peers or node == 0)]
        chance.shuffle(senders)
        receiving: dict[int, int] = {}
        for sender in senders:
            wanting = [n for n in range(nodes) if n not in receiving and len(holds[n]) < buckets and holds[sender] - holds[n]]
            if wanting:
                receiver = chance.choice(wanting)
                receiving[receiver] = chance.choice(sorted(holds[sender] - holds[receiver]))
        for receiver, bucket in receiving.items():
            holds[receiver].add(bucket)
        rounds += 1
    return rounds * sync.weights / buckets / sync.link
