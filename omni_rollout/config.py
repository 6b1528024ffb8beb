"""Every knob, once, with its one default. Imports no torch: `--help` and a typo must cost nothing.

`experiment=NAME` files under `configs/experiment` state only what differs from these defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

AUTO = "auto"  # of a number: to be measured


class Backend(Enum):
    embedded = "embedded"  # engine, trainer and loop in one process
    verl = "verl"  # verl's trainer on Ray: rollout.workers engines, trainer.ranks ranks, each a process


class Placement(Enum):
    """Of backend=verl."""

    apart = "apart"  # engines and trainer ranks in processes of their own
    colocated = "colocated"  # in each of trainer.ranks processes an engine and a rank, on one GPU


class DType(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Parity(Enum):
    exact = "exact"  # engine and trainer round in the same places: KL exactly 0
    fast = "fast"  # the engine's own kernels (packed GEMMs on a CPU, compiled on a GPU): what it costs shows in parity/*
    reference = "reference"  # diffusers' class inside the engine: the published model's roundings, to debug against


class SDETypeName(Enum):
    sde = "sde"
    cps = "cps"
    dance_sde = "dance_sde"
    ode = "ode"


class LogProbFormName(Enum):
    gaussian = "gaussian"
    unnormalised = "unnormalised"


class TrainerEngineName(Enum):
    torch = "torch"  # whole on every rank
    fsdp2 = "fsdp2"  # everything cut over the ranks
    deepspeed = "deepspeed"  # cut as far as zero_stage says


class Offload(Enum):
    """What the trainer keeps in the memory of the CPU: fsdp2 and deepspeed always, torch while a rollout is sampled."""

    none = "none"
    optimizer = "optimizer"  # its state; of deepspeed, stages 1 to 3, its step too
    all = "all"  # parameters too: torch, fsdp2, or deepspeed's stage 3


class RolloutOffload(Enum):
    none = "none"
    encoders = "encoders"  # text encoder and VAE leave the device while the trainer computes


class Reduce(Enum):
    """When engine=fsdp2 sums gradients over the ranks."""

    update = "update"  # once, so until then every rank holds those of all trained parameters whole
    backward = "backward"  # after every backward pass, so a rank keeps its share alone


class OldLogProbs(Enum):
    rollout = "rollout"  # exact profile: they are the trainer's own, bit for bit, so one forward pass is saved
    recompute = "recompute"


class OnMismatch(Enum):
    """What to do with a rollout whose log-probs are not the trainer's. The last two compare a sample before each update."""

    alert = "alert"  # say so and go on
    recompute = "recompute"  # this step's old log-probs become the trainer's own
    stop = "stop"  # before the update: nothing is learned from that rollout


class Schedule(Enum):
    constant = "constant"
    linear = "linear"  # to a tenth of the learning rate at the last step


class RewardNormalise(Enum):
    none = "none"
    group = "group"  # each reward by its own mean and standard deviation in the group, before the sum


class Width(Enum):
    """How many text tokens the transformer sees of a prompt, padding included."""

    fixed = "fixed"  # collate.prompt_width, whatever the prompt
    bucketed = "bucketed"  # the next multiple of 16, at most that; both guidance branches as wide as the wider one
    natural = "natural"  # the prompt's own tokens: no padding


@dataclass
class ModelConfig:
    path: str = MISSING  # a checkpoint in diffusers layout
    family: str = "qwen_image"
    dtype: DType = DType.float32  # what the transformer computes in, on both sides; master weights are fp32


@dataclass
class CollateConfig:
    width: Width = Width.fixed  # a trajectory records its own, and the trainer keeps to it
    prompt_width: int | None = None  # text tokens of a prompt at most; with width=fixed of every one; None: the family's
    negative_prompt_width: int | None = None  # None: as wide as prompt_width


@dataclass
class SamplingConfig:
    height: int | None = None  # pixels, a multiple of 16; None: the family's default
    width: int | None = None
    num_inference_steps: int | None = None  # None: the family's default; zero is an error, not a default
    true_cfg_scale: float | None = None  # None: the family's default; 1.0 and below turn guidance off
    negative_prompt: str | None = None  # None with guidance on: " ", Qwen-Image's own habit
    seed: int = 0  # of the run: every request's seed is derived from it, the step, the group and the member
    noise_level: float = 0.7
    sde_type: SDETypeName = SDETypeName.sde
    log_prob_form: LogProbFormName = LogProbFormName.gaussian
    extra: dict[str, Any] = field(default_factory=dict)  # what only this family has, such as frames; see its spec.py
    sde_window_size: int | None = None  # stochastic steps in a row; None: all of the range
    sde_window_range: list[int] | None = None  # [first, end) in which each group's window is drawn; None: all but the last step


@dataclass
class RolloutConfig:
    group_size: int = 8  # images per prompt, among which advantages are taken
    prompts_per_step: int = 4
    max_num_seqs: Any = 8  # requests denoised together; auto: what an engine in this process measures as it starts
    workers: int | None = None  # engines; None: one, or one beside each trainer rank. More than one with backend=verl
    placement: Placement = Placement.apart
    ahead: int = 0  # 1: the next batch is sampled before, and on verl while, this one is learned from; see docs/ahead.md
    timeout: float = 600.0  # seconds without a finished image after which an engine is taken for dead
    keep_finished: bool = True  # trajectories on disk until a checkpoint holds what was learned from them
    offload: RolloutOffload = RolloutOffload.none
    url: str | None = None  # of an `omni-rollout serve` that samples instead of an engine here; of several: "A,B"


@dataclass
class ServeConfig:
    """Of `omni-rollout serve`. What is past a limit is refused by its name; the token is in OMNI_ROLLOUT_TOKEN."""

    host: str = "127.0.0.1"  # any other address needs a token
    port: int = 8091  # 0: one that is free
    max_body_mb: int = 64  # of a request; weights may be as large as the model is
    max_requests: int = 256  # images in one body
    max_waiting: int = 1024  # images asked for and not finished, of all clients
    max_prompt_chars: int = 10_000
    max_prompt_width: int = 1024  # text tokens
    max_steps: int = 200
    max_pixels: int = 2048 * 2048  # of a frame, and of an input image
    max_frames: int = 161  # of a video; layers of an image
    timeout: float = 600.0  # seconds without a finished image after which the engine is taken for dead, and the server ends


@dataclass
class AlgorithmConfig:
    """What all algorithms have. Each adds keys of its own, and changes these defaults to its paper's: `algorithms/NAME.py`."""

    name: str = "flow_grpo"
    source: str | None = None  # of an algorithm of your own: package.module or path/to/file.py, `:Class` if it has several
    advantage_std: str = "global"  # global: over the step's rewards; group: within the group
    advantage_deviation: str = "population"  # divided by the count; sample: by the count less one
    advantage_eps: float = 1e-4  # added to the deviation
    advantage_clip: float = 5.0
    kl_coef: float = 0.0  # weight of the distance to the policy the run started from, which the algorithm defines


@dataclass
class RewardConfig:
    weights: dict[str, float] = field(default_factory=lambda: {"ocr": 1.0})  # name -> weight; the reward is their weighted sum
    source: dict[str, str] = field(default_factory=dict)  # name -> package.module:function, file.py:function or http(s) address
    model: dict[str, str] = field(default_factory=dict)  # name -> folder or hub id; geneval: A+B; vlm_judge: "ADDRESS#NAME"
    normalise: RewardNormalise = RewardNormalise.none
    threads: int = 1
    timeout: float = 300.0  # seconds for one call of one reward: for the images of a group, or of an evaluation
    max_failed: float = 0.1  # share of a step's images that may be lost to a reward that fails; more ends the run


@dataclass
class TrainerConfig:
    engine: TrainerEngineName = TrainerEngineName.torch
    ranks: int = 1  # processes that share an update's rows; more than one with backend=verl
    zero_stage: int = 1  # with engine=deepspeed: 0 cuts nothing, 1 the optimizer, 2 gradients too, 3 parameters too
    offload: Offload = Offload.none
    reduce: Reduce = Reduce.update
    fit: str = "none"  # auto: keys that were not given are set so that the run fits the memory; nothing of what is learned
    steps: int = 30
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    schedule: Schedule = Schedule.linear
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip_range: float = 1e-3
    updates_per_step: int = 1  # mini-batches, each with an optimizer step, that one rollout is cut into
    micro_batch_size: int = 16  # (trajectory, step) pairs per backward pass, at most
    micro_batch_tokens: int | None = None  # of a pass, image and text, with guidance, at most; what learns together stays so
    gradient_checkpointing: bool = False
    lora_rank: int = 0  # 0: full weights
    lora_alpha: int | None = None  # None: twice the rank
    ema_decay: float = 0.0  # 0: no average is kept
    old_log_probs: OldLogProbs | None = None  # None: rollout; with rollout.ahead=1 recompute
    save_every: int = 0  # steps between checkpoints; 0: only at the end, or when a signal ends the run
    keep_checkpoints: int = 3  # the newest; 0: all
    resume: str = "none"  # none: run_dir must be new; auto: from its newest checkpoint that is whole; or a checkpoint's folder


@dataclass
class EvaluationRewardConfig:
    weights: dict[str, float] = field(default_factory=dict)  # of rewards that nothing is trained on; see reward.source


@dataclass
class EvaluationConfig:
    every: int = 0  # steps; 0: before and after training only
    images: int = 0  # per evaluation; 0: none. ODE, fixed seeds, without guidance unless sampling turns it on
    prompts: str | None = None  # as `prompts`, one source; None: its `test` if there is one, else the training prompts
    seed: int = 10_000
    reward: EvaluationRewardConfig = field(default_factory=EvaluationRewardConfig)


@dataclass
class MonitorConfig:
    on_mismatch: OnMismatch = OnMismatch.alert
    tensorboard: bool = False  # event files in run_dir/tensorboard, with wandb's names; metrics.jsonl is always written


@dataclass
class LaunchConfig:
    """Of backend=verl. All from `slurm` on: of launch=slurm, passed to sbatch as they are; None: the cluster's default."""

    address: str | None = None  # of a Ray cluster, or `auto`; None: one is started here, and ends with the run
    cpus: int = 16  # logical ones of a cluster started here: a place for every process, however few cores there are
    object_store_mb: int = 1024  # of a cluster started here
    timeout: float = 7200.0  # seconds for an update, a weight sync or a checkpoint, after which the trainer ranks hang
    max_restarts: int = 2  # from the newest checkpoint, when a process dies that cannot be replaced in place
    slurm: bool = False  # write run_dir/job.sbatch instead of training here
    submit: bool = True  # and give it to sbatch
    nodes: int = 1
    gpus_per_node: int = 0  # one for each trainer rank and each engine that is apart; 0: they run on CPUs
    cpus_per_task: int | None = None  # of a node
    mem: str | None = None  # of a node
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    job_name: str = "omni-rollout"
    directives: list[str] = field(default_factory=list)  # more of sbatch's options, such as [qos=high, exclusive]
    setup: list[str] = field(default_factory=list)  # lines of shell before all else, such as ['module load cuda']


@dataclass
class WandbConfig:
    project: str = "omni_rollout"
    mode: str | None = None  # online|offline|disabled; None: online with a key at hand, else offline
    images: int = 8  # per step, to wandb and TensorBoard


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    collate: CollateConfig = field(default_factory=CollateConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    backend: Backend = Backend.embedded
    parity: Parity = Parity.exact
    prompts: Any = MISSING  # .txt (one a line), .jsonl or .parquet, a folder, a dataset, a function; or {SOURCE: WEIGHT}
    threads: int | None = None  # of torch; None: torch's own choice
    profile: bool = False  # of one step: a torch trace and a table by stage, in run_dir/profile
    profile_step: int = 2  # which, counted from where the run starts or goes on; the first is slower than the others
    run_dir: str = "runs/${now:%Y-%m-%d_%H-%M-%S}"
    experiment: Any = None  # set by `experiment=NAME`; the name is kept in the run's config.yaml

    @property
    def engines(self) -> int:
        """`rollout.workers`, whether it is given or not."""
        beside_ranks = self.trainer.ranks if self.rollout.placement is Placement.colocated else 1
        return beside_ranks if self.rollout.workers is None else self.rollout.workers
