from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from omni_rollout.algorithms.flow_grpo import FlowGRPO
from omni_rollout.config import Backend, DType, OldLogProbs, Reduce, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose, to_yaml
from omni_rollout.launch.paths import config_dir, recipe_dir
from omni_rollout.launch.validate import validate, validate_rollout, validate_scoring

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
MINIMAL = ("model=nano", "prompts=prompts.txt")


@pytest.fixture
def sound(tmp_path: Path) -> TrainConfig:
    """A configuration that `validate` accepts."""
    model = tmp_path / "model"
    model.mkdir()
    for part in (recipe_dir("nano") / "checkpoint").iterdir():
        (model / part.name).symlink_to(part)
    (tmp_path / "prompts.txt").write_text("a red square\n")
    return compose([f"model.path={model}", f"prompts={tmp_path}/prompts.txt", f"run_dir={tmp_path}/runs/a"])


def test_defaults_are_those_of_the_dataclasses() -> None:
    config = compose(["model.path=model", "prompts=prompts.txt"])
    plain = TrainConfig(prompts="prompts.txt", run_dir=config.run_dir)
    plain.model.path, plain.algorithm = "model", FlowGRPO()
    assert config == plain
    assert isinstance(config.model.dtype, DType)


def sampled(*overrides: str, name: str = "train") -> tuple[object, ...]:
    config = compose([*overrides, "prompts=prompts.txt"], name=name)
    sampling = config.sampling
    width, group = config.collate.prompt_width, config.rollout.group_size
    return sampling.height, sampling.width, sampling.num_inference_steps, sampling.true_cfg_scale, width, group


@pytest.mark.parametrize(
    ("overrides", "train", "rollout", "parity"),
    [
        (["model=nano"], (64, 64, 10, 1.0, 16, 8), (64, 64, 10, 1.0, 16, 1), (64, 64, 6, 1.0, 16, 8)),
        (["model=qwen_image"], (1328, 1328, 50, 4.0, 256, 8), (1328, 1328, 50, 4.0, 256, 1), (64, 64, 6, 4.0, 256, 8)),
        (["model.path=m"], (None, None, None, None, None, 8), (None, None, None, None, None, 1), (64, 64, 6, None, None, 8)),
        (["model=nano", "model.path=m"], (64, 64, 10, 1.0, 16, 8), (64, 64, 10, 1.0, 16, 1), (64, 64, 6, 1.0, 16, 8)),
        # an experiment's own values come before the model's and the command's; what it leaves open, they give
        (["experiment=nano_ocr"], (64, 64, 10, 1.0, 16, 16), (64, 64, 10, 1.0, 16, 16), (64, 64, 6, 1.0, 16, 16)),
        (["experiment=qwen_image_ocr_lora"], *[(512, 512, 10, 4.0, 256, 16)] * 3),
        (["experiment=qwen_image_ocr_lora", "model=nano"], *[(512, 512, 10, 4.0, 16, 16)] * 3),
        # the command line has the last word
        (
            ["model=nano", "sampling.height=32", "sampling.num_inference_steps=4", "rollout.group_size=3"],
            *[(32, 64, 4, 1.0, 16, 3)] * 3,
        ),
        (["experiment=qwen_image_ocr_lora", "sampling.true_cfg_scale=1.0"], *[(512, 512, 10, 1.0, 256, 16)] * 3),
    ],
)
def test_schema_then_model_then_command_then_experiment_then_command_line(
    overrides: list[str], train: tuple[object, ...], rollout: tuple[object, ...], parity: tuple[object, ...]
) -> None:
    assert sampled(*overrides) == train
    assert sampled(*overrides, name="rollout") == rollout
    assert sampled(*overrides, name="parity") == parity


@pytest.mark.parametrize("path", sorted((config_dir() / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_model_brings_its_own_sizes(path: Path) -> None:
    stated = OmegaConf.load(path)
    assert path.read_text().splitlines()[0] == "# @package _global_"
    assert set(stated) == {"model", "collate", "sampling"}
    assert set(stated["sampling"]) - {"extra"} == {"height", "width", "num_inference_steps", "true_cfg_scale"}
    assert "path" in stated["model"] and "prompt_width" in stated["collate"]


def test_overrides_reach_their_keys_with_their_types() -> None:
    config = compose(
        [*MINIMAL, "trainer.steps=3", "trainer.learning_rate=1e-5", "sampling.sde_window_range=[0,4]", "threads=null"]
    )
    assert (config.trainer.steps, config.trainer.learning_rate, config.threads) == (3, 1e-5, None)
    assert config.sampling.sde_window_range == [0, 4]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_keep_their_name_and_open_with_their_command(name: str) -> None:
    config = compose([f"experiment={name}", "prompts=prompts.txt"])
    assert config.experiment == name
    header = (config_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()[:2]
    assert header[0] == "# @package _global_" and header[1].startswith(f"# omni-rollout train experiment={name}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_state_only_what_differs(name: str) -> None:
    stated = OmegaConf.load(config_dir() / "experiment" / f"{name}.yaml")
    chosen = [item for item in stated["defaults"] if item != "_self_"]
    below = [f"experiment={item}" if isinstance(item, str) else _chosen(item) for item in chosen]
    assert below
    base = OmegaConf.structured(compose([*below, "prompts=prompts.txt"]))
    for section, values in stated.items():
        if section == "defaults" or not OmegaConf.is_dict(values):
            continue
        for key, value in values.items():
            assert value != base[section][key], f"{name}: {section}.{key} restates what {' '.join(below)} gives"


def _chosen(item: Any) -> str:
    """What `override /GROUP: NAME` is on the command line."""
    ((group, name),) = item.items()
    return f"{group.removeprefix('override /')}={name}"


def test_the_flagship_reads_the_nano_recipe_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["experiment=nano_ocr"])
    assert config.model.path == str(recipe_dir("nano") / "checkpoint")
    assert config.prompts == str(recipe_dir("nano") / "data" / "train.jsonl")


def test_run_dir_has_the_time_in_it() -> None:
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", compose(MINIMAL).run_dir)


def test_a_reward_group_replaces_the_default_reward() -> None:
    assert compose([*MINIMAL, "reward=jpeg_compressibility"]).reward.weights == {"jpeg_compressibility": 1.0}
    assert compose([*MINIMAL, "reward.weights={jpeg_compressibility: 0.5}"]).reward.weights == {"jpeg_compressibility": 0.5}
    assert compose([*MINIMAL, "reward.weights.jpeg_compressibility=0.5"]).reward.weights == {
        "ocr": 1.0,
        "jpeg_compressibility": 0.5,
    }


@pytest.mark.parametrize("path", sorted((config_dir() / "reward").glob("*.yaml")), ids=lambda path: path.stem)
def test_reward_groups_name_rewards_that_exist(path: Path) -> None:
    import omni_rollout.rewards

    for name in OmegaConf.load(path)["weights"]:
        assert (Path(omni_rollout.rewards.__file__ or "").parent / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rat=1", "trainer.learning_rat: no such key; did you mean trainer.learning_rate?"),
        ("steps=3", "steps: no such key; did you mean trainer.steps?"),
        ("learning_rate=1", "learning_rate: no such key; did you mean trainer.learning_rate?"),
        ("trainer.steps.a=1", "trainer.steps.a: no such key; did you mean trainer.steps?"),
        ("+foo=1", "foo: no such key; there are model, collate"),
        ("experimnt=nano_ocr", "experimnt: no such key; did you mean experiment?"),
        ("trainer.steps=abc", "trainer.steps=abc: expected a whole number"),
        ("trainer.steps=1.5", "trainer.steps=1.5: expected a whole number"),
        ("trainer.learning_rate=null", "trainer.learning_rate=null: expected a number"),
        ("sampling.sde_window_range=[0,a]", "sampling.sde_window_range=[0,a]: expected a list of whole numbers, such as [1,2]"),
        ("sampling.sde_window_range=3", "sampling.sde_window_range=3: expected a list of whole numbers, such as [1,2]"),
        ("reward.weights.ocr=abc", "reward.weights.ocr=abc: expected a number"),
        ("reward.weights={ocr: abc}", "reward.weights.ocr: expected a number; Value 'abc'"),
        ("model.dtype=float33", "model.dtype=float33: did you mean float32? expected one of float32, bfloat16"),
        ("backend=ray", "backend=ray: expected one of embedded"),
        ("trainer=5", "trainer=5: trainer is a section; set one of trainer.engine"),
        ("trainer={stps: 3}", "trainer.stps: no such key; did you mean trainer.steps?"),
        ("experiment=nano_orc", "experiment=nano_orc: no such choice; did you mean experiment=nano_ocr?"),
        ("model=nan", "model=nan: no such choice; did you mean model=nano?"),
        ("reward=red", "vlm_judge; for one of your own: reward.source, docs/extending.md"),
        ("model=qwen", "model=qwen: no such choice; did you mean model=qwen_image?"),
        ("algorithm=nft", "algorithm=nft: no such choice; did you mean algorithm=diffusion_nft?"),
        ("algorithm=grpo", "algorithm=grpo: no such choice; did you mean algorithm=flow_grpo?"),
        ("algorithm.adv_estimator=x", "did you mean algorithm? (algorithm=NAME); it has name, source"),
        ("profile=perhaps", "profile=perhaps: expected true or false"),
        ("run_dir=[a]", "run_dir=[a]: expected text"),
        ("reward.source=[a]", "reward.source=[a]: expected {NAME: text}"),
        (
            "~trainer.steps",
            "~trainer.steps: a key cannot be taken away; leave it out for its default, or give trainer.steps=VALUE",
        ),
        ("~trainer.stps", "trainer.stps: no such key; did you mean trainer.steps?"),
        ("trainer.steps", "trainer.steps: expected key=value"),
        ("prompts=ü.txt", "prompts=ü.txt: expected key=value; a value with an equals sign"),
        ("trainer.steps=1,2", "trainer.steps=1,2: several values start no sweep here"),
        ("evaluation.prompts=${recipe:nan}", "recipe nan does not exist"),
    ],
)
def test_a_wrong_override_is_told_with_its_nearest_right_one(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compose([*MINIMAL, override])


def test_all_missing_values_are_named_with_how_to_give_them() -> None:
    with pytest.raises(
        UserError, match=r"model\.path has no value: give .*model=nano.*; prompts has no value: give prompts=FILE"
    ):
        compose([])


def test_a_typo_in_a_file_is_told_like_one_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in config_dir().rglob("*.yaml"):
        target = tmp_path / source.relative_to(config_dir())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    monkeypatch.setattr("omni_rollout.launch.compose.config_dir", lambda: tmp_path)
    experiment = tmp_path / "experiment" / "nano_ocr.yaml"
    experiment.write_text(experiment.read_text().replace("learning_rate:", "learning_rat:"))
    with pytest.raises(UserError, match=r"trainer\.learning_rat: no such key; did you mean trainer\.learning_rate\?"):
        compose(["experiment=nano_ocr"])
    experiment.write_text("# @package _global_\ndefaults: [override /model: nao]\n")
    with pytest.raises(UserError, match=r"model/nao: no such file.*did you mean nano\?"):
        compose(["experiment=nano_ocr"])


@given(
    steps=st.integers(0, 10**6),
    learning_rate=st.floats(1e-12, 1e3),
    text=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20),
    weights=st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), st.floats(-10, 10), min_size=1),
)
@settings(deadline=None, max_examples=25)
def test_a_run_reads_its_own_config_yaml_back(steps: int, learning_rate: float, text: str, weights: dict[str, float]) -> None:
    config = TrainConfig(prompts=text, backend=Backend.embedded, run_dir="runs/x")
    config.model.path, config.sampling.negative_prompt = "m", text
    config.trainer.steps, config.trainer.learning_rate, config.reward.weights = steps, learning_rate, weights
    config.trainer.old_log_probs = OldLogProbs.recompute
    text_schema = OmegaConf.structured(TrainConfig)
    text_schema.reward.weights = {}
    if "${" in text:  # would be an interpolation
        return
    assert OmegaConf.to_object(OmegaConf.merge(text_schema, OmegaConf.create(to_yaml(config)))) == config


def _set(key: str, value: object) -> Callable[[TrainConfig], None]:
    def change(config: TrainConfig) -> None:
        node = config
        *parents, leaf = key.split(".")
        for part in parents:
            node = getattr(node, part)
        assert hasattr(node, leaf)
        setattr(node, leaf, value)

    return change


def test_a_sound_configuration_passes(sound: TrainConfig) -> None:
    validate(sound)
    validate_rollout(sound, "rollouts")
    validate_scoring(sound, {"--json": Path("nowhere/p.json"), "--html": None})
    assert not Path(sound.run_dir).parent.exists() and not Path("nowhere").exists()  # asked, not made


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollout.group_size", 0, "expected at least 1"),
        ("rollout.group_size", 1, "flow_grpo compares"),
        ("rollout.max_num_seqs", 0, "expected at least 1"),
        ("trainer.micro_batch_size", 0, "expected at least 1"),
        ("trainer.updates_per_step", 1000, "has only 32 images"),
        ("trainer.clip_range", 0.0, "expected more than 0"),
        ("trainer.learning_rate", float("nan"), "expected more than 0"),
        ("trainer.zero_stage", 3, None),
        ("trainer.reduce", Reduce.backward, "needs trainer.engine=fsdp2"),
        ("trainer.lora_alpha", 8, "give trainer.lora_rank too"),
        ("trainer.betas", [0.9], "expected two numbers"),
        ("trainer.ema_decay", 1.0, "below 1"),
        ("collate.prompt_width", 0, "expected at least 1"),
        ("sampling.height", 65, "multiple of 16"),
        ("sampling.num_inference_steps", 1, "expected at least 2"),
        ("sampling.true_cfg_scale", -1.0, "expected 0 or more"),
        ("sampling.noise_level", 0.0, "a level above 0"),
        ("sampling.sde_window_range", [4, 4], "first < end"),
        ("sampling.sde_window_range", [0], "first < end"),
        ("algorithm.advantage_std", "batch", "expected global or group"),
        ("reward.weights", {}, "empty; give one"),
        ("reward.weights", {"ocr": 0.0}, "every weight is 0"),
        ("reward.weights", {"orc": 1.0}, "did you mean ocr? expected one of"),
        ("reward.weights", {"base": 1.0}, "expected one of"),
        ("model.family", "qwenimage", "did you mean qwen_image?"),
        ("algorithm.name", "flow_gpro", "did you mean flow_grpo?"),
        ("launch.cpus", 0, "expected at least 1"),
        ("launch.object_store_mb", 1, "expected at least 128"),
        ("trainer.weight_decay", float("inf"), "expected a finite number"),
        ("sampling.seed", -1, "expected 0 to 2**63 - 1"),
        ("sampling.seed", 2**63, "expected 0 to 2**63 - 1"),
        ("run_dir", "/dev/null", "/dev/null is no folder"),
        ("run_dir", "/dev/null/runs", "/dev/null is no folder"),
        ("run_dir", "/proc/runs", "cannot be written"),
        ("run_dir", "a" * 300, "cannot be written (File name too long)"),
        ("prompts", "/tmp", "it is a folder"),
        ("prompts", "a" * 300, "no such file"),
        ("wandb.mode", "on", "expected one of online"),
        ("model.path", "/nowhere", "no such folder"),
        ("model.path", "nowhere", "or a hub id"),
        ("model.path", "owner/never-downloaded", "not in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("sampling.noise_level", 1e300, "expected at most 2147483647"),
        ("rollout.group_size", 10**20, "expected at most 2147483647"),
        ("sampling.width", 16 * 10**20, "multiple of 16, from 16 to 65536"),
        ("prompts", "/nowhere.txt", "no such file"),
        ("evaluation.prompts", "/nowhere.txt", "no such file"),
    ],
)
def test_validate(sound: TrainConfig, key: str, value: object, message: str | None) -> None:
    _set(key, value)(sound)
    if message is None:
        validate(sound)
    else:
        with pytest.raises(UserError, match=f"(?s)^{re.escape(key)}=.*{re.escape(message)}"):
            validate(sound)


def test_windows_are_checked_against_the_steps(sound: TrainConfig) -> None:
    sampling = replace(sound.sampling, num_inference_steps=10)
    for window, size, sde_type, message in (
        ([0, 11], None, "sde", "end at 9"),
        ([0, 10], None, "sde", "end at 9"),
        ([2, 6], 5, "sde", "the range has 4 steps"),
        (None, 10, "sde", "the range has 9 steps"),
        ([0, 10], None, "cps", "end at 9"),
    ):
        kind = type(sampling.sde_type)[sde_type]
        sound.sampling = replace(sampling, sde_window_range=window, sde_window_size=size, sde_type=kind)
        with pytest.raises(UserError, match=message):
            validate(sound)
    for window, size in (([0, 9], 9), ([0, 4], 4), (None, 9), (None, None)):
        sound.sampling = replace(sampling, sde_window_range=window, sde_window_size=size)
        validate(sound)


def test_zero_stages_matter_only_to_deepspeed(sound: TrainConfig) -> None:
    sound.trainer.zero_stage = 4
    validate(sound)
    sound.trainer.engine = type(sound.trainer.engine).deepspeed
    with pytest.raises(UserError, match="zero_stage=4: expected 0, 1, 2 or 3"):
        validate(sound)


def test_sampling_alone_may_be_deterministic_and_single(sound: TrainConfig) -> None:
    sound.sampling.sde_type = type(sound.sampling.sde_type).ode
    sound.rollout.group_size = 1
    validate_rollout(sound, "rollouts")
    with pytest.raises(UserError, match=r"(?s)sde_type=ode.*group_size=1"):
        validate(sound)


def test_a_folder_that_is_no_checkpoint_and_a_file_that_is_no_prompt_list(sound: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "model" / "model_index.json").unlink()
    (tmp_path / "prompts.csv").write_text("")
    sound.prompts = str(tmp_path / "prompts.csv")
    with pytest.raises(UserError, match=r"(?s)has no model_index\.json.*ends in \.txt, \.jsonl, \.parquet"):
        validate(sound)


@pytest.mark.parametrize(
    "key", ["sampling.noise_level", "sampling.true_cfg_scale", "trainer.learning_rate", "algorithm.kl_coef"]
)
def test_infinity_is_refused(sound: TrainConfig, key: str) -> None:
    section, name = key.split(".")
    setattr(getattr(sound, section), name, float("inf"))
    with pytest.raises(UserError, match=f"{key}=inf: expected a finite number"):
        validate(sound)


def test_a_group_cannot_be_null() -> None:
    with pytest.raises(UserError, match="reward=None: no such choice"):
        compose([*MINIMAL, "reward=null"])


def test_a_weight_that_is_no_number_and_an_empty_run_dir(sound: TrainConfig) -> None:
    sound.reward.weights = {"ocr": float("nan")}
    sound.run_dir = " "
    with pytest.raises(UserError, match=r"reward\.weights\.ocr=nan: expected a finite number\nrun_dir is empty"):
        validate(sound)


def test_scoring_reads_no_window(sound: TrainConfig) -> None:
    sound.sampling.num_inference_steps, sound.sampling.sde_window_range = 6, [0, 9]
    validate_scoring(sound, {})


def test_scoring_is_checked_like_sampling_but_needs_no_prompts(sound: TrainConfig, tmp_path: Path) -> None:
    sound.prompts = ""
    validate_scoring(sound, {"--json": None})
    sound.sampling.height, sound.rollout.max_num_seqs = 65, 0
    with pytest.raises(UserError, match=r"(?s)max_num_seqs=0.*height=65.*--json .*it is a folder"):
        validate_scoring(sound, {"--json": tmp_path})
