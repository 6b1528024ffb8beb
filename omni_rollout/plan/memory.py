"""Bytes per trainer rank, per rollout engine and per node: each line of the plan, with its formula in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import AUTO, Offload, RolloutOffload, TrainerEngineName
from omni_rollout.models.base.passes import PassLimit
from omni_rollout.models.base.sizes import decode_rows
from omni_rollout.plan.parts import ALWAYS, Part, Run, Sharing, When
from omni_rollout.rewards.base.sizes import model_bytes

CONTEXT_BYTES = 1 << 30  # what CUDA itself takes of a GPU, for each process on it. A round guess
RESERVE_BYTES = 4 << 30  # that, NCCL's buffers, and what fragmentation wastes. A round guess
DEEPSPEED_BUCKET = 500_000_000  # numbers, as `policy/trainer_engines/deepspeed_config.py` has it
SYNC_BYTES = 32 << 20  # as `RolloutEngine.update_weights` cuts them
TRANSFORMER, ENCODERS = "transformer", ("text encoder", "VAE")


def rank_parts(run: Run, ranks: int) -> list[Part]:
    """On the GPU of one of `ranks` trainer ranks, at the widest moment of an update."""
    return [_policy(run, ranks), *_state(run, ranks), *_gathered(run, ranks), *_update(run), _reserve(run)]


def process_parts(run: Run, ranks: int = 1) -> list[Part]:
    """On the GPU of one process that holds an engine and one of `ranks` ranks, by what `run/phases.py` does with each."""
    trainer = [_shared_policy(run) if run.shared else _policy(run, ranks), *_state(run, ranks), *_gathered(run, ranks)]
    whole = [] if run.shared or ranks == 1 else [replace(part, when=(When.start,)) for part in _whole_policy(run)]
    rewards = _reward_models(run) if ranks == 1 else []  # on verl a process without a GPU scores
    return [*_engine_in_turns(run), *trainer, *whole, *_update(run), _new_weights(), *rewards, _reserve(run)]


def _policy(run: Run, ranks: int) -> Part:
    cut = Sharing.of(run.config, ranks).weights
    of = f" / {ranks} ranks" if cut > 1 else ""
    if run.config.trainer.offload is Offload.all and not run.in_turns:
        return Part(name="policy", bytes=0, why="in the memory of the CPU (trainer.offload)")
    if not run.rank:
        why = f"4 bytes x {_billions(run.parameters)} parameters, fp32{of}"
        return Part(name="master weights", bytes=4 * run.parameters // cut, why=why, when=_of_policy(run))
    why = f"{run.master} bytes x {_billions(run.parameters)} frozen, 4 x {_billions(run.trained)} trained{of}"
    return Part(name="policy", bytes=(run.master * run.parameters + 4 * run.trained) // cut, why=why, when=_of_policy(run))


def _shared_policy(run: Run) -> Part:
    """Beside what the engine holds; see `Learner.shared`."""
    if not run.rank:
        return Part(name="master weights", bytes=0, why="the engine's, which are of fp32 too")
    what = f"{run.master} bytes x {_billions(run.adapted)} that are adapted, 4 x {_billions(run.trained)} trained"
    held = run.master * run.adapted + 4 * run.trained
    return Part(name="policy", bytes=held, why=f"{what}; the rest is the engine's", when=_of_policy(run))


def _of_policy(run: Run) -> tuple[When, ...]:
    """When what is as large as the policy is on the device."""
    return (When.start, When.update, When.sync) if run.in_turns and run.config.trainer.offload is Offload.all else ALWAYS


def _engine_in_turns(run: Run) -> Iterator[Part]:
    """An engine beside a trainer: what the trainer does not share of its policy is given back for an update."""
    away = run.config.rollout.offload is RolloutOffload.encoders
    anew = 0 if run.shared and not run.rank else run.adapted if run.shared else run.parameters
    for part in _engine(run):
        if part.name == TRANSFORMER:
            why = f"{part.why}, which a sync makes anew" if anew == run.parameters else f"{part.why}, but for the next line"
            if kept := part.bytes - run.item * anew:
                yield replace(part, bytes=kept, why=why if anew else part.why)
            if anew:
                why = f"{run.item} bytes x {_billions(anew)}: given back in an update, made anew by the sync"
                yield Part(
                    name=f"{TRANSFORMER}, anew", bytes=run.item * anew, why=why, when=(When.start, When.rollout, When.sync)
                )
        elif part.name in ENCODERS and away:
            yield replace(part, why=f"{part.why}; offloaded (rollout.offload)", when=(When.rollout,))
        else:
            yield part


def _reward_models(run: Run) -> Iterator[Part]:
    for name, size in model_bytes(run.config).items():
        known = "weights of its model, here all the time" if size else "the model that another reward has loaded"
        why = (
            known
            if size is not None
            else f"NOT counted: no sizes of {run.config.reward.model[name]} are shipped; give a folder"
        )
        yield Part(name=f"reward {name}", bytes=size or 0, why=why)


def _new_weights() -> Part:
    return Part(name="new weights", bytes=SYNC_BYTES, why="as many as are on their way at a time", when=(When.sync,))


def _state(run: Run, ranks: int) -> Iterator[Part]:
    """Gradients, optimizer, average, reference: what stays from micro-batch to micro-batch."""
    config, trainer, share = run.config, run.config.trainer, Sharing.of(run.config, ranks)
    trained, kept = run.trained, trainer.offload is Offload.none or run.in_turns
    on_gpu = kept or trainer.offload is Offload.optimizer
    own = _of_policy(run)
    cut = f" / {ranks} ranks" if share.weights > 1 else ""
    if trainer.engine is TrainerEngineName.deepspeed and trainer.zero_stage > 0 and trainer.offload is Offload.none:
        why = f"4 bytes x {_billions(trained)} trained / {ranks} ranks: ZeRO's flat fp32 partition beside the parameters"
        yield Part(name="optimizer's copy", bytes=4 * trained // share.moments, why=why)
    why = f"4 bytes x {_billions(trained)} trained" + (
        f" / {ranks} ranks" if share.gradients > 1 else ", whole until the update"
    )
    if kept or trainer.engine is TrainerEngineName.fsdp2:
        stay = trainer.engine is TrainerEngineName.deepspeed and trainer.zero_stage == 3  # in a buffer that is never let go
        yield Part(name="gradients", bytes=4 * trained // share.gradients, why=why, when=ALWAYS if stay else (When.update,))
    if kept:
        why = f"8 bytes x {_billions(trained)} trained" + (f" / {ranks} ranks" if share.moments > 1 else "")
        when = ALWAYS if trainer.offload is Offload.none else (When.update,)
        yield Part(name="AdamW's moments", bytes=8 * trained // share.moments, why=why, when=when)
    if config.rollout.ahead and on_gpu:
        why = f"2 x 4 bytes x {_billions(trained)} trained{cut}: kept, and its own set aside while it is compared"
        yield Part(name="policy that sampled", bytes=2 * 4 * trained // share.weights, why=why, when=own)
    algorithm = get_algorithm(config.algorithm)
    for name, there in (("average (EMA)", trainer.ema_decay), ("old policy", algorithm.keeps_old)):
        if there and on_gpu:
            why = f"4 bytes x {_billions(trained)} trained{cut}"
            yield Part(name=name, bytes=4 * trained // share.weights, why=why, when=own)
    if algorithm.needs_reference and not run.rank and on_gpu:
        why = f"4 bytes x {_billions(run.parameters)}, the policy the run started from{cut}"
        yield Part(name="reference policy", bytes=4 * run.parameters // share.weights, why=why, when=own)


def _gathered(run: Run, ranks: int) -> Iterator[Part]:
    """What engines that cut the policy put together again as they compute."""
    trainer, model = run.config.trainer, run.sizes.transformer
    if trainer.engine is TrainerEngineName.fsdp2 and ranks > 1:
        outside = model.parameters - model.layers * model.block_parameters
        why = f"{run.master} bytes x (2 blocks, one of them on its way, and what lies outside the blocks)"
        gathered = run.master * (2 * model.block_parameters + outside)
        yield Part(name="gathered weights", bytes=gathered, why=why, when=(When.update, When.sync))
    if trainer.engine is TrainerEngineName.deepspeed and trainer.zero_stage > 0:
        if trainer.zero_stage == 3:
            live, why = model.block_parameters, "a block: what is fetched ahead comes as the block's activations go"
            if len(run.passes(1)) > 1:
                live = (run.parameters + (run.trained if run.rank else 0)) // run.sizes.experts
                why = "all: guidance in two passes, and none is given back before both are over; one text width needs one"
            yield Part(name="gathered weights", bytes=4 * live, why=f"4 bytes x {_billions(live)}, {why}", when=(When.update,))
        bucket = min(run.trained, DEEPSPEED_BUCKET)
        yield Part(name="reduce bucket", bytes=4 * bucket, why=f"4 bytes x {_billions(bucket)}, reduce_bucket_size")
        if trainer.zero_stage == 3:
            why = "as much again: the gradients of a bucket in the order of ranks, as they are summed"
            yield Part(name="bucket in exchange", bytes=4 * bucket, why=why, when=(When.update,))


def _update(run: Run) -> Iterator[Part]:
    """What one micro-batch needs, forward and backward."""
    return (replace(part, when=(When.update,)) for part in _micro_batch(run))


def _micro_batch(run: Run) -> Iterator[Part]:
    trainer, model, lora = run.config.trainer, run.sizes.transformer, bool(run.rank)
    limit = PassLimit.of_trainer(trainer, get_algorithm(run.config.algorithm).rows_together)
    checkpointing, branches = trainer.gradient_checkpointing, run.passes(limit.holds(run.spec))
    tokens = " and ".join(f"{one.rows} rows of {one.image_tokens} + {one.text_tokens}" for one in branches)
    what = f"{tokens} tokens, {model.layers} blocks of width {model.width}"
    saved = sum(run.activations.saved(model, one, lora=lora, checkpointing=checkpointing) for one in branches)
    if checkpointing:
        yield Part(name="block inputs", bytes=saved, why=f"kept by gradient checkpointing: {what}")
        widest = max(run.activations.saved_in_block(model, one, lora=lora) for one in branches)
        why = "activations and merged or cast weights of the block that backward computes again"
        yield Part(name="one block", bytes=widest, why=why)
    else:
        made = [word for word, there in (("merged", lora), ("cast", branches[0].casts)) if there]
        cast = f", {' and '.join(made)} weights" if made else ""
        yield Part(name="activations", bytes=saved, why=f"what backward needs{cast}: {what}")
    working = max(run.activations.backward_working(model, one, lora=lora) for one in branches)
    yield Part(name="backward", bytes=working, why="gradients within one block, as backward passes it")
    if len(branches) > 1 and not lora:
        waiting = run.trained // run.sizes.experts
        why = f"4 bytes x {_billions(waiting)}: gradients of one guidance branch wait for the other's"
        yield Part(name="branch gradients", bytes=4 * waiting, why=why)


def start_parts(run: Run) -> list[Part]:
    """On a rank's GPU before training."""
    return [*_whole_policy(run), Part(name="reserve", bytes=CONTEXT_BYTES, why="CUDA context: a guess, not derived")]


def _whole_policy(run: Run) -> Iterator[Part]:
    """As DeepSpeed takes it, before it cuts it; FSDP2 fetches it block by block."""
    if run.config.trainer.engine is TrainerEngineName.fsdp2:
        return
    why = f"{run.master} bytes x {_billions(run.parameters)}, before it is cut"
    yield Part(name="whole policy", bytes=run.master * run.parameters, why=why)
    if get_algorithm(run.config.algorithm).needs_reference and not run.rank:
        yield Part(name="reference policy", bytes=4 * run.parameters, why="a copy, before it is cut")


def engine_parts(run: Run) -> list[Part]:
    """On the GPU of one rollout engine, with `rollout.max_num_seqs` images in flight."""
    return [*_engine(run), _reserve(run)]


def _engine(run: Run) -> list[Part]:
    asked = run.config.rollout.max_num_seqs
    rows = 1 if asked == AUTO else asked  # no more in flight than there is room for
    sizes, model, spec = run.sizes, run.sizes.transformer, run.spec
    kept = len(spec.step_indices) + 1
    image = run.passes(1)[0].image_tokens
    latents = rows * (image * model.channels * 4 * (kept + 1) + run.conditions * run.item)
    embeddings = rows * sum(run.widths) * model.text_width * run.item
    forward = max(run.activations.forward_working(model, one) for one in run.passes(rows))
    decoded = decode_rows(run.layout)
    encoder, vae = sizes.encoder_parameters, sizes.vae_parameters
    encoder_item, vae_item = sizes.text_encoder_item or run.item, sizes.vae_item or run.item
    decode = decoded * run.activations.decode_working(sizes.vae_config, spec, vae_item)
    told = "prompt embeddings, conditions" if run.conditions else "prompt embeddings"
    experts = f", {sizes.experts} experts" if sizes.experts > 1 else ""
    tower = f", {'with' if sizes.vision_kept else 'without'} its vision tower" if sizes.vision_parameters else ""
    return [
        Part(
            name=TRANSFORMER,
            bytes=run.item * run.parameters,
            why=f"{run.item} bytes x {_billions(run.parameters)}{experts}",
        ),
        Part(name=ENCODERS[0], bytes=encoder_item * encoder, why=f"{encoder_item} bytes x {_billions(encoder)}{tower}"),
        Part(name=ENCODERS[1], bytes=vae_item * vae, why=f"{vae_item} bytes x {_billions(vae)}"),
        Part(
            name="requests",
            bytes=latents + embeddings,
            why=f"{rows} x ({kept} kept latents and the present one in fp32, {told})",
            when=(When.rollout,),
        ),
        Part(
            name="working memory",
            bytes=forward + decode,
            why=f"a forward pass over {rows} rows ({_gib(forward)}), beside it decoding {decoded} at a time ({_gib(decode)})",
            when=(When.rollout,),
        ),
    ]


def host_parts(run: Run, ranks: int, engines: int, shared: int) -> list[Part]:
    """In the memory of one node that has `ranks` trainer ranks and `engines` of them; `shared`: ranks of the whole run."""
    share, trainer = Sharing.of(run.config, shared), run.config.trainer
    weights = 4 * run.trained if run.rank else run.item * run.parameters  # of a LoRA the factors are sent
    why = f"{ranks} ranks x {run.master} bytes x {_billions(run.parameters)}: each loads the whole checkpoint"
    parts = [Part(name="loading the policy", bytes=ranks * run.master * run.parameters, why=why)] if ranks else []
    if trainer.offload is not Offload.none and ranks:
        each = (4 + 8 + 4) * run.trained // share.moments
        if trainer.offload is Offload.all:
            beside = run.trained * (bool(trainer.ema_decay) + 2 * run.config.rollout.ahead)
            each += (run.master * run.parameters + 4 * ((run.trained if run.rank else 0) + beside)) // share.weights
        parts.append(Part(name="offloaded state", bytes=ranks * each, why=f"{ranks} ranks x {_gib(each)} (trainer.offload)"))
    if engines:
        why = f"{engines} engines x {_gib(weights)}: the new weights as they arrive"
        parts.append(Part(name="weight sync", bytes=engines * weights, why=why))
    parts += [replace(part, why=f"{part.why}, in the reward worker on a CPU") for part in _reward_models(run)]
    why = f"2 versions of the weights, {_gib(weights)} each: Ray needs that much object store on every node"
    return [*parts, Part(name="object store", bytes=2 * weights, why=why)]


def _reserve(run: Run) -> Part:
    why = "CUDA context, NCCL, fragmentation: a guess" if run.reserve == RESERVE_BYTES else "libraries, as measured on a CPU"
    return Part(name="reserve", bytes=run.reserve, why=f"{why}, not derived")


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e7 else f"{number / 1e6:.2f} M"


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
