"""`launch=slurm`: a job script that starts Ray on every node and then the same run on it, and its submission."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from omni_rollout.config import Backend, LaunchConfig, Placement, TrainConfig
from omni_rollout.errors import UserError

SCRIPT = "job.sbatch"
SECONDS_TO_SAVE = 120  # between Slurm's signal and the end of the job: to finish a step and save

_BODY = r"""
# The nodes' shared secret: without it, whoever reaches the port could run code in this job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$run_dir/ray_token"
(umask 077; python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))"
cpus="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"  # srun does not take it over from sbatch
ray_on() {  # NODE RAY_OPTION...
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" --cpus-per-task="$cpus" \
        ray start --block --disable-usage-stats --num-cpus="$cpus" --num-gpus="$gpus" "${@:2}" &
}
trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT

ray_on "${nodes[0]}" --head --port="${address##*:}" --include-dashboard=false
for node in "${nodes[@]:1}"; do ray_on "$node" --address="$address"; done
python - "$address" "${#nodes[@]}" << 'END' &
import sys, time, ray
address, wanted = sys.argv[1], int(sys.argv[2])
end, found = time.monotonic() + 300, 0
while found != wanted:
    if time.monotonic() > end:
        sys.exit(f"{found} of {wanted} nodes joined Ray within 5 minutes; their messages are above")
    time.sleep(2)
    try:
        ray.init(address, log_to_driver=False, ignore_reinit_error=True)
        found = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError as error:
        print(error)
END
wait -n  # for that, or for a Ray that ends before: then the job fails here

# Slurm signals this shell alone; the run finishes its step, saves, and ends with status 0.
stopped=
"${train[@]}" launch=ray launch.address="$address" trainer.resume=auto run_dir="$run_dir" &
run=$!
trap 'stopped=1; kill -TERM $run 2> /dev/null' TERM
status=0
wait $run || status=$?
if [[ $stopped ]]; then
    status=0
    wait $run || status=$?  # the signal ended the first wait, not the run
    left=$((${SLURM_JOB_END_TIME:-0} - $(date +%s)))
    if ((status == 0 && left < seconds_to_save)); then scontrol requeue "$SLURM_JOB_ID"; fi  # time is up; the run is not over
fi
exit $status
"""


def write_script(config: TrainConfig, overrides: Sequence[str]) -> Path:
    """Writes `run_dir/job.sbatch`.

    Args:
        overrides: what `config` was composed from.

    Raises:
        UserError: what Slurm or the job cannot work with.
    """
    _check(config)
    run_dir = Path(config.run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    script = run_dir / SCRIPT
    script.write_text(job_script(config.launch, overrides, run_dir), encoding="utf-8")
    print(f"written        {script}")
    return script


def submit(script: Path) -> None:
    """Gives what `write_script` wrote to sbatch.

    Raises:
        UserError: sbatch is missing, or refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on PATH: run this on a login node of the cluster, or there: sbatch {script}")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses {script}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    job, run_dir = done.stdout.strip().partition(";")[0], script.parent
    print(f"submitted      job {job}; its output: {run_dir}/slurm-{job}.log; to end it after its step: touch {run_dir}/stop")


def _check(config: TrainConfig) -> None:
    launch, trainer = config.launch, config.trainer
    engines = 0 if config.rollout.placement is Placement.colocated else config.engines  # a GPU for each
    if config.backend is not Backend.verl:
        raise UserError(f"launch=slurm with backend={config.backend.value}: one process needs no Ray; give backend=verl")
    if trainer.resume not in ("none", "auto"):
        raise UserError(
            f"trainer.resume={trainer.resume} with launch=slurm: a job always goes on from its run_dir; leave it out"
        )
    gpus = launch.nodes * launch.gpus_per_node
    if 0 < gpus < trainer.ranks + engines:
        raise UserError(
            f"trainer.ranks={trainer.ranks} and {engines} engines (rollout.workers) need a GPU each, "
            f"launch.nodes and launch.gpus_per_node ask for {gpus}; see omni-rollout plan"
        )


def job_script(launch: LaunchConfig, overrides: Sequence[str], run_dir: Path) -> str:
    own = ("launch=", "launch.", "run_dir=", "trainer.resume=")
    kept = ("launch.max_restarts=",)
    words = [shlex.quote(word) for word in overrides if not word.startswith(own) or word.startswith(kept)]
    head = [
        "#!/bin/bash",
        *(f"#SBATCH --{directive}" for directive in _directives(launch, run_dir)),
        "# Written by `omni-rollout train launch=slurm`. When the job is requeued, the run goes on from its newest checkpoint.",
        "set -euo pipefail",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        *launch.setup,
        f"run_dir={shlex.quote(str(run_dir))}",
        f"seconds_to_save={SECONDS_TO_SAVE}",
        f"gpus={launch.gpus_per_node}",
        "train=(omni-rollout train",
        *(f"    {word}" for word in words),
        ")",
    ]
    return "\n".join(head) + "\n" + _BODY


def _directives(launch: LaunchConfig, run_dir: Path) -> Iterator[str]:
    yield from (f"nodes={launch.nodes}", "ntasks-per-node=1")
    optional = {
        "gpus-per-node": launch.gpus_per_node or None,
        "job-name": launch.job_name,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "cpus-per-task": launch.cpus_per_task,
        "mem": launch.mem,
    }
    yield from (f"{name}={value}" for name, value in optional.items() if value is not None)
    log = str(run_dir / "slurm-%j.log").replace(" ", "\\ ")
    yield from (f"output={log}", "open-mode=append", "requeue", f"signal=B:TERM@{SECONDS_TO_SAVE}")
    yield from (directive.removeprefix("--") for directive in launch.directives)
