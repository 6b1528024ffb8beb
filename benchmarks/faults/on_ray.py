"""Faults of a run of many processes: one run with all of them, each in a step of its own."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Collection

import psutil

from benchmarks.faults.scene import PER_STEP, RANKS_TIMEOUT, REWARD_TIMEOUT, STEPS, TIMEOUT, Scene, Strike, title_of
from benchmarks.faults.witness import metrics

SERVER, REWARD, RANK, AGENT_LOOP = "ray::RolloutServer", "ray::RewardLoopWorker", "ray::TrainerRank", "ray::AgentLoopWorker"
COLOCATED = "ray::ColocatedRank"


def undisturbed(scene: Scene) -> None:
    scene.start()
    scene.finish()


def many(scene: Scene, wanted: Collection[str]) -> None:
    """The faults of its back end that are wanted, in one run; after the last, the run ends by itself."""
    scene.start()
    for step, (name, fault) in enumerate(FAULTS[scene.backend].items(), start=2):
        if name in wanted:
            fault(scene, name, step)
            scene.after_step(step)
    scene.finish()


def engine_hangs(scene: Scene, name: str, step: int) -> None:
    victim = find(scene, SERVER)
    scene.in_rollout(step, images=2)
    victim.send_signal(signal.SIGSTOP)
    scene.strike(name, f"SIGSTOP of one of 2 engines in a rollout (rollout.timeout={TIMEOUT['verl']})", step)
    retried(scene, step)


def engine_dies(scene: Scene, name: str, step: int) -> None:
    victim = find(scene, SERVER)
    scene.in_rollout(step, images=2)
    victim.kill()
    scene.strike(name, "kill -9 of one of 2 engines in a rollout", step)
    retried(scene, step)


def retried(scene: Scene, step: int) -> None:
    """The run says itself how many requests went to another engine: more than none, or the fault came too late."""
    strike = scene.strikes[-1]
    scene.after_step(step)
    counts = {line["step"]: line["rollout/retried"] for line in metrics(scene.run_dir)}
    strike.unfinished = round(counts[step] - counts[step - 1])
    if strike.unfinished <= 0:
        strike.broken.append("rollout/retried did not count")


def reward_worker_dies(scene: Scene, name: str, step: int) -> None:
    victim = find(scene, REWARD)
    scene.in_rollout(step, images=2)
    victim.kill()
    scene.strike(name, "kill -9 of the reward worker in a rollout", step, unfinished=0)


def reward_worker_hangs(scene: Scene, name: str, step: int) -> None:
    victim = find(scene, REWARD)
    scene.in_rollout(step, images=2)
    victim.send_signal(signal.SIGSTOP)
    limit = TIMEOUT["verl"] + REWARD_TIMEOUT
    what = f"SIGSTOP of the reward worker in a rollout (rollout.timeout={TIMEOUT['verl']}, reward.timeout={REWARD_TIMEOUT})"
    strike = scene.strike(name, what, step, unfinished=0)
    scene.after_step(step)
    scene.must_say(strike, f"(process {victim.pid}) is stopped: it gave no score for {limit} s")


def rank_dies(scene: Scene, name: str, step: int) -> None:
    what = "kill -9 of the trainer rank, the rollout done, its step not"
    dies_and_the_run_starts_again(scene, RANK, name, what, step, images=PER_STEP)


def agent_loop_dies(scene: Scene, name: str, step: int) -> None:
    dies_and_the_run_starts_again(scene, AGENT_LOOP, name, "kill -9 of the agent loop in a rollout", step, images=3)


def agent_loop_hangs(scene: Scene, name: str, step: int) -> None:
    what = f"SIGSTOP of the agent loop in a rollout (rollout.timeout={TIMEOUT['verl']})"
    strike = dies_and_the_run_starts_again(scene, AGENT_LOOP, name, what, step, images=3, number=signal.SIGSTOP)
    scene.must_say(strike, f"the agent loop (process {strike.victim}) is stopped")


def colocated_dies_sampling(scene: Scene, name: str, step: int) -> None:
    colocated_fails(scene, name, step, signal.SIGKILL, learning=False)


def colocated_dies_learning(scene: Scene, name: str, step: int) -> None:
    colocated_fails(scene, name, step, signal.SIGKILL, learning=True)


def colocated_hangs_sampling(scene: Scene, name: str, step: int) -> None:
    strike = colocated_fails(scene, name, step, signal.SIGSTOP, learning=False)
    scene.must_say(strike, f"finished no image for {TIMEOUT['colocated']} s (rollout.timeout): it hangs")


def colocated_hangs_learning(scene: Scene, name: str, step: int) -> None:
    strike = colocated_fails(scene, name, step, signal.SIGSTOP, learning=True)
    scene.must_say(strike, f"no answer for {RANKS_TIMEOUT} s (launch.timeout)", f"(process {strike.victim}) is stopped")


def colocated_fails(scene: Scene, name: str, step: int, number: signal.Signals, *, learning: bool) -> Strike:
    """One of 2 processes with an engine and a rank gets a signal, in the rollout or in the update."""
    before, victim = restarts(scene), find(scene, COLOCATED)

    def moment() -> bool:
        finished = len(scene.witness.of_step(step))
        title = f"{COLOCATED}.update_policy"  # what Ray calls the process meanwhile
        return finished == PER_STEP and title_of(victim).startswith(title) if learning else finished >= 3

    when = "in the update" if learning else "in a rollout"
    scene.until(moment, f"{COLOCATED} {when} of step {step}")
    victim.send_signal(number)
    what = f"{number.name} of one of 2 processes with an engine and a rank, {when}; the driver starts all again"
    strike = scene.strike(name, what, step)
    strike.victim = victim.pid
    scene.until(lambda: restarts(scene) > before, "a line in restarts.jsonl")
    if "did not come back" in scene.said():
        strike.broken.append("the run waited for a process that never comes back")
    strike.unfinished = PER_STEP - len(scene.witness.of_step(step))  # the other may have finished some meanwhile
    scene.after_step(step)
    resumed(scene, strike)
    return strike


def dies_and_the_run_starts_again(
    scene: Scene, title: str, name: str, what: str, step: int, images: int, number: signal.Signals = signal.SIGKILL
) -> Strike:
    before, victim = restarts(scene), find(scene, title)
    scene.in_rollout(step, images)
    victim.send_signal(number)
    strike = scene.strike(name, f"{what}; the driver starts all again", step)
    strike.victim = victim.pid
    scene.after_step(step)
    if restarts(scene) != before + 1:
        strike.broken.append("restarts.jsonl has not one line more")
    resumed(scene, strike)
    return strike


def driver_dies(scene: Scene, name: str, step: int) -> None:
    scene.in_rollout(step)
    scene.processes()
    scene.send(signal.SIGKILL)
    strike = scene.strike(name, "kill -9 of the driver in a rollout; resume=auto", step)
    scene.wait()
    strike.unfinished = PER_STEP - len(scene.witness.of_step(step))  # engines may go on until they notice
    scene.start("trainer.resume=auto")
    scene.after_step(step)
    resumed(scene, strike)


def resumed(scene: Scene, strike: Strike) -> None:
    """Whoever outlives the one that died may finish more than was there at the fault, until all is started again."""

    def words(kept: int) -> str:
        return f"step {strike.logged}: {kept} finished trajectories kept, 0 steps to repeat"

    counted = PER_STEP - strike.unfinished
    kept = next((number for number in range(PER_STEP, counted, -1) if words(number) in scene.said()), counted)
    scene.must_say(strike, words(kept))


def restarts(scene: Scene) -> int:
    path = scene.run_dir / "restarts.jsonl"
    return len([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else 0


def find(scene: Scene, title: str) -> psutil.Process:
    """A process of the run with that title: looked for before the moment, for that takes longer than the moment lasts."""
    scene.until(lambda: scene.processes(title), title)
    return scene.processes(title)[0]


FAULTS: dict[str, dict[str, Callable[[Scene, str, int], None]]] = {  # by back end
    "verl": {
        "engine hangs": engine_hangs,
        "reward worker": reward_worker_dies,
        "reward worker hangs": reward_worker_hangs,
        "trainer rank": rank_dies,
        "engine": engine_dies,
        "agent loop": agent_loop_dies,
        "agent loop hangs": agent_loop_hangs,
        "driver": driver_dies,
    },
    "colocated": {
        "colocated, sampling": colocated_dies_sampling,
        "colocated, learning": colocated_dies_learning,
        "colocated hangs, sampling": colocated_hangs_sampling,
        "colocated hangs, learning": colocated_hangs_learning,
    },
}
assert all(len(faults) < STEPS[backend] for backend, faults in FAULTS.items())
