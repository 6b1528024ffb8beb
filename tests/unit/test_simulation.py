"""The simulator: nothing is lost or made in it, and where a formula is known it gives the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation.cluster import Cluster, Engine, Simulation, UpFront
from benchmarks.simulation.sync import Sync, sync_seconds, transfer_seconds
from benchmarks.simulation.workloads import mixed, uniform
from omni_rollout.rollout.dispatch import Dispatcher, work

ENGINE = Engine(step=0.02, token=5e-5, image=0.3, max_num_seqs=4)
SHAKEN = Cluster(workers=6, engine=ENGINE, slowdown=0.2, failures=200.0, hangs=0.3, timeout=30.0, restart=10.0, store=0.05)


def test_the_simulation_is_driven_by_the_dispatcher_itself():
    assert type(Simulation(SHAKEN, uniform(4), 0).policy) is Dispatcher


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 1000), st.booleans(), st.sampled_from([uniform, mixed]), st.booleans())
def test_every_request_is_finished_once_and_time_adds_up(count, seed, up_front, make, joins):
    requests = make(count)
    cluster = replace(SHAKEN, engine=replace(ENGINE, takes_while_running=joins))
    policy = UpFront(requests, range(cluster.workers)) if up_front else Dispatcher(requests, range(cluster.workers), 4)
    outcome = Simulation(cluster, requests, seed, policy).run()
    given_up = [request.request_id for request in getattr(policy, "given_up", [])]
    assert sorted([*outcome.finished, *given_up]) == [request.request_id for request in requests]
    for share in (outcome.useful, outcome.redone, outcome.down):
        assert 0 <= share <= 1
    assert -1e-9 <= outcome.idle <= 1
    assert outcome.useful + outcome.redone + outcome.down + outcome.idle == pytest.approx(1)


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("rounds", [1, 3])
def test_one_worker_that_never_fails_is_the_closed_form(rounds, joins):
    engine = replace(ENGINE, takes_while_running=joins)
    requests = uniform(4 * rounds)
    outcome = Simulation(Cluster(workers=1, engine=engine), requests, 0).run()
    steps = requests[0].spec.num_inference_steps
    step = engine.step + engine.token * 4 * work(requests[0]) / steps
    assert outcome.seconds == pytest.approx(rounds * (steps * step + 4 * engine.image))
    assert outcome.seconds == pytest.approx(outcome.ideal) and outcome.useful == pytest.approx(1)


def test_a_crash_costs_what_it_interrupts():
    """One worker, one request: it dies once, and starts again from nothing after `restart`."""
    requests = uniform(1)
    calm = Simulation(Cluster(workers=1, engine=ENGINE), requests, 0).run().seconds
    cluster = Cluster(workers=1, engine=ENGINE, failures=3600 / calm, restart=7.0)
    simulations = [Simulation(cluster, requests, seed) for seed in range(50)]
    died_once = [(s, outcome) for s in simulations if (outcome := s.run()).retried == 1 and outcome.finished]
    assert died_once
    for simulation, outcome in died_once:
        died = next(when for when, kind in simulation.history if kind == "fails")
        assert outcome.seconds == pytest.approx(died + 7.0 + calm)
        assert outcome.redone * outcome.seconds == pytest.approx(died)
        assert outcome.down * outcome.seconds == pytest.approx(7.0)


def seconds(cluster: Cluster, make=mixed, count: int = 64) -> float:
    return Simulation(cluster, make(count), 0).run().seconds


def test_more_of_a_burden_takes_longer():
    cluster = Cluster(workers=4, engine=ENGINE)
    slower = [replace(ENGINE, step=0.2), replace(ENGINE, token=1e-4), replace(ENGINE, image=1.0)]
    assert all(seconds(replace(cluster, engine=engine)) > seconds(cluster) for engine in slower)
    assert seconds(replace(cluster, workers=2)) > seconds(cluster)
    assert seconds(cluster, count=128) > seconds(cluster)
    assert seconds(replace(cluster, store=10.0)) == pytest.approx(640, rel=0.05), "the agent loop is all there is"


def test_a_slow_worker_is_given_less():
    """The same workers, of which some are slow: shared out at once, the slowest decides."""
    cluster = Cluster(workers=8, engine=ENGINE, slowdown=0.5)
    requests = uniform(256)
    up_front = Simulation(cluster, requests, 0, UpFront(requests, range(8))).run()
    pulled = Simulation(cluster, requests, 0).run()
    assert pulled.seconds < 0.7 * up_front.seconds and pulled.idle < up_front.idle


def test_weights_reach_all_nodes():
    sync = Sync(weights=10.0, bucket=0.1, link=1.0)
    assert transfer_seconds(sync, 1) == 0
    assert transfer_seconds(sync, 2) == pytest.approx(10)
    assert transfer_seconds(replace(sync, peers=False), 5) == pytest.approx(40)
    assert 10 <= transfer_seconds(sync, 64) <= 15, "one after the other, but for the first bucket's way"


def test_sync_is_faster_with_more_of_everything():
    for better in ({"threads": 8}, {"put": 20.0}, {"link": 5.0}, {"load": 50.0}, {"weights": 20.0}):
        assert sync_seconds(replace(Sync(), **better), 64).total < sync_seconds(Sync(), 64).total
