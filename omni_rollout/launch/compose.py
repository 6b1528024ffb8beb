"""Overrides -> TrainConfig: Hydra composes `configs/` over the schema; whatever is wrong is said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from omni_rollout import plugins
from omni_rollout.algorithms import algorithm_class, names, source_name
from omni_rollout.config import RewardConfig, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch import ahead
from omni_rollout.launch.keys import deleted, expectation, is_free, keys, kind_of, meant, nearest, own_reward, unknown_key
from omni_rollout.launch.paths import config_dir, recipe_dir


def compose(
    overrides: Sequence[str],
    *,
    name: str = "train",
    unused: Sequence[str] = (),
    reads: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The configuration of one run, every key resolved.

    Args:
        overrides: Hydra's grammar: `key=value`, `group=choice`, `experiment=NAME`.
        name: file of `configs/` to start from; also the command, in errors.
        unused: mandatory keys that this command does not read; they may be left out.
        reads: the keys and sections that this command reads; any other may not be given. None: all.
        settings: of a checkpoint, by key: below the overrides, above all else.

    Raises:
        UserError: a key, value or choice that does not exist or does not fit, naming the nearest one that does; one that this
            command does not read; or a mandatory key without a value.
    """
    _register()
    parsed = [_parse(_reward_by_name(override)) for override in overrides]
    for override in parsed:
        _check_override(override)
        if reads is not None:
            _check_read(override, name, reads)
        if settings is not None and override.key_or_group in ("model", "experiment"):
            raise UserError(
                f"{override.input_line}: the checkpoint brings the settings of its run; leave it out, or give single keys"
            )
    replaced = [override for override in parsed if is_free(override.key_or_group)]  # Hydra would add them to the group's
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            plain = [_for_hydra(override) for override in parsed if override not in replaced]
            composed = hydra_compose(name, overrides=plain, return_hydra_config=True)
        experiment = composed.hydra.runtime.choices.get("experiment")
        with open_dict(composed):
            del composed["hydra"]
        composed.experiment = experiment
        _lay_under(composed, settings or {}, parsed)
        for override in replaced:
            OmegaConf.update(composed, override.key_or_group, override.value(), merge=False)
        for key in OmegaConf.missing_keys(composed) & set(unused):
            OmegaConf.update(composed, key, "")
        composed = _with_algorithm(composed)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError("; ".join(f"{key} has no value: give {_HOW_TO_GIVE.get(key, f'{key}=VALUE')}" for key in missing))
        return typed(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, parsed) from error


def _check_read(override: Override, command: str, reads: Sequence[str]) -> None:
    key = override.key_or_group
    if key.startswith("hydra.") or any(key == read or key.startswith(f"{read}.") for read in (*reads, "experiment")):
        return
    raise UserError(f"{override.input_line}: {command} does not read {key}; it reads {', '.join(reads)}, and nothing else")


def _lay_under(composed: Any, settings: Mapping[str, Any], overrides: Sequence[Override]) -> None:
    """Sets what a checkpoint was trained with, then once more what was given. A key that this version lacks decides nothing."""
    groups = {override.key_or_group for override in overrides if _choices(override.key_or_group)}
    kept = {key: value for key, value in settings.items() if key.partition(".")[0] not in groups and kind_of(key) is not None}
    for section in {key.rpartition(".")[0] for key in kept}:
        if is_free(section):  # names of the user's choosing replace those of configs/
            OmegaConf.update(composed, section, {}, merge=False)
    for key, value in kept.items():
        OmegaConf.update(composed, key, value, merge=False, force_add=True)
    for override in overrides if settings else ():
        if override.key_or_group not in groups and not override.is_delete():
            OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)


_HOW_TO_GIVE = {
    "model.path": "model.path=FOLDER (a checkpoint in diffusers layout), model=nano, or an experiment",
    "prompts": "prompts=FILE (.txt, .jsonl or .parquet)",
}


def typed(section: Any) -> TrainConfig:
    """A whole configuration, checked against the schema that goes with its algorithm."""
    return ahead.implied(cast(TrainConfig, OmegaConf.to_object(_with_algorithm(section))))


def to_yaml(config: TrainConfig) -> str:
    """The configuration as the run folder keeps it; every default is written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@dataclass
class _Open(TrainConfig):
    """Until it is known which algorithm was chosen, its section takes any key."""

    algorithm: Any = field(default_factory=dict)


def _register() -> None:
    # The schema has no rewards of its own: a reward group would otherwise add to them instead of choosing.
    ConfigStore.instance().store(name="schema", node=_Open(reward=RewardConfig(weights={})))
    for name in set(names()) - set(_files("algorithm")):  # a file is there only where keys of other sections change
        ConfigStore.instance().store(group="algorithm", name=name, node={"name": name})
    OmegaConf.register_new_resolver("recipe", lambda recipe: str(recipe_dir(recipe)), replace=True)


def _with_algorithm(composed: Any) -> DictConfig:
    """The same, with the keys, defaults and types that the chosen algorithm declares.

    Raises:
        UserError: no such algorithm, or a key that it does not have, with the nearest.
    """
    values: Any = OmegaConf.to_container(OmegaConf.create(composed), resolve=False, enum_to_str=True)
    section = values["algorithm"]
    source = section.get("source")
    if source is not None:
        source = section["source"] = str(source)
        path, colon, kind = source.partition(":")
        if path.endswith(".py"):  # another process may have another working directory
            source = section["source"] = f"{Path(path).absolute()}{colon}{kind}"
        section["name"] = source_name(source)
    algorithm = algorithm_class(section["name"], source)
    known = [each.name for each in fields(algorithm)]
    for key in section:
        if key not in known:
            near = [f"algorithm.{name}" for name in difflib.get_close_matches(key, known, n=1)]
            hint = meant(f"algorithm.{key}", near)
            pause = "" if not hint else " " if hint.endswith("?") else "; "
            raise UserError(f"algorithm.{key}: {section['name']} has no such key; {hint}{pause}it has {', '.join(known)}")
    schema = OmegaConf.structured(TrainConfig(algorithm=algorithm(), reward=RewardConfig(weights={})))
    return cast(DictConfig, OmegaConf.merge(schema, OmegaConf.create(values)))


def _reward_by_name(override: str) -> str:
    """`reward=NAME` needs no file in `configs/reward`: a reward of that name will do."""
    key, _, name = override.partition("=")
    plain = key == "reward" and name in plugins.registered("rewards") and name not in _files(key)
    return f"reward.weights={{{name}: 1.0}}" if plain else override


def _parse(override: str) -> Override:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(
            f"{override}: expected key=value; a value with an equals sign, comma, bracket or quote, or a letter "
            f"outside ASCII, needs quotes inside the shell's: "
            f"'key=\"a, b\"'"
        ) from error
    if parsed.is_sweep_override():
        raise UserError(f"{override}: several values start no sweep here; give one, or a list as [a,b], or quote the comma")
    return parsed


def _for_hydra(override: Override) -> str:
    """A free key (a reward's weight, an algorithm's own key) may be new, which Hydra wants to see marked."""
    inside = is_free(section := override.key_or_group.rpartition(".")[0]) or section == "algorithm"
    return f"++{override.input_line}" if inside and override.type == OverrideType.CHANGE else str(override.input_line)


def _check_override(override: Override) -> None:
    """Catches what Hydra would report without naming the key or the nearest choice."""
    key, value = override.key_or_group, override.value()
    if key.startswith("hydra."):
        return
    if override.is_delete():
        if not is_free(key.rpartition(".")[0]):
            raise deleted(key)
        return
    choices = _choices(key)
    if choices and not isinstance(value, dict):
        if value not in choices:
            if key == "reward" and _is_source(value):
                raise own_reward(key, str(value))
            own = f"; for one of your own: {key}.source, docs/extending.md" if key in ("reward", "algorithm") else ""
            raise UserError(f"{key}={value}: no such choice; {nearest(str(value), choices, prefix=f'{key}=')}{own}")
        return
    kind = kind_of(key)
    if kind is None:
        raise unknown_key(key)
    if key == "reward.source" and _is_source(value):
        raise own_reward(key, str(value))
    if is_dataclass(kind) and not isinstance(value, dict):
        inside = ", ".join(candidate for candidate in keys() if candidate.startswith(f"{key}."))
        raise UserError(f"{key}={value}: {key} is a section; set one of {inside}")


def _is_source(value: Any) -> bool:
    return isinstance(value, str) and (plugins.is_function(value) or plugins.is_address(value) or value.endswith(".py"))


def _explain(error: Exception, overrides: Iterable[Override]) -> UserError:
    """Hydra's error in terms of keys; the cause carries the key, the message only the file."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return UserError(f"{error.missing_cfg_file}: no such file in {config_dir()}; {nearest(choice, _choices(group))}")
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    first_line = str(cause or error).splitlines()[0]
    if cause is None or not cause.full_key:
        return UserError(first_line)
    key = cause.full_key.partition("[")[0]  # of a list's item: the list
    kind = kind_of(key)
    if kind is None:
        return unknown_key(key)
    given = next((str(override.input_line) for override in overrides if override.key_or_group == key), None)
    if isinstance(cause, InterpolationResolutionError):
        reason = first_line.rpartition("while resolving interpolation: ")[2]
        return UserError(f"{given or key}: {reason}")
    if given is None:  # set in a file, or within a dictionary
        return UserError(f"{key}: {expectation(kind, '')}; {first_line}")
    return UserError(f"{given}: {first_line if kind is Any else expectation(kind, given)}")


def _choices(group: str) -> list[str]:
    without = names() if group == "algorithm" else plugins.registered("rewards") if group == "reward" else []
    return sorted({*_files(group), *without})


def _files(group: str) -> list[str]:
    folder = config_dir() / group
    return sorted(path.stem for path in folder.glob("*.yaml")) if group and folder.is_dir() else []
