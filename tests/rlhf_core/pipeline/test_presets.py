"""Presets: found, parsed, minimal; and what a wrong setting answers."""

import pytest
import yaml
from pydantic import BaseModel

from rlhf_core.errors import ConfigError, PreflightError
from rlhf_core.jobs import DataSettings, PipelineConfig, SampledPreferences
from rlhf_core.pipeline.preset_files import preset_names
from rlhf_core.pipeline.presets import (
    apply_overrides,
    build_config,
    load_preset,
)


def problems(overrides, preset="smoke"):
    with pytest.raises(PreflightError) as caught:
        build_config(preset, overrides)
    return caught.value.problems


def test_preset_names_are_those_of_the_files():
    assert {"bloom-560m", "demo", "llama-7b", "smoke", "dpo", "grpo"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_valid_and_named_after_itself(name):
    assert build_config(name).name == name


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def at(config, path):
    for key in path:
        if config is None:  # a section that is empty by default
            return None
        config = getattr(config, key) if isinstance(config, BaseModel) else config.get(key)
    return config


@pytest.mark.parametrize("name", preset_names())
def test_preset_holds_only_differences_from_defaults(name):
    config = build_config(name)
    below = build_config(load_preset(name).get("preset", {}))
    for path, _ in leaves(load_preset(name)):
        if path == ("preset",) or path[-1] == "mix":  # by default no data set is a mixture
            continue
        default = below
        if path[:2] == ("data", "preference") and isinstance(config.data.preference, DataSettings):
            default = default.model_copy(
                update={"data": default.data.model_copy(update={"preference": DataSettings()})}
            )
        if "resources" in path[1:]:  # lies over the top-level resources
            default = config.resources.model_copy()
            path_in_resources = path[path.index("resources") + 1 :]
            assert at(config, path) != at(default, path_in_resources), path
            continue
        assert at(config, path) != at(default, path), f"{'.'.join(path)} is the default"


def test_bloom_preset_is_the_classic_recipe():
    config = build_config("bloom-560m")
    placement = config.resources
    assert (placement.strategy, placement.ranks, placement.micro_batch_size) == ("zero2", 4, 4)
    assert config.sft.batch_size == 4 * 4 * 8
    assert (config.sft.learning_rate, config.sft.epochs) == (2e-5, 1)
    assert config.data.sft.max_samples == 512
    assert config.reward.loss == "log_exp"


def test_llama_preset_trains_all_weights_on_eight_gpus():
    config = build_config("llama-7b")
    assert (config.resources.ranks, config.resources.strategy) == (8, "fsdp2")
    assert all(s.lora is None for s in (config.sft, config.reward, config.ppo))
    assert all(s.precision == "bf16" for s in (config.sft, config.reward, config.ppo))


def test_overrides_are_yaml_and_later_ones_win():
    settings = apply_overrides({"seed": 1}, ["seed=2", "seed=3", "a.b=[1, x]", "c=", "d=1e-5"])
    assert settings == {"seed": 3, "a": {"b": [1, "x"]}, "c": None, "d": "1e-5"}


def test_overrides_leave_their_input_alone():
    settings = {"ppo": {"steps": 1}}
    apply_overrides(settings, ["ppo.steps=2"])
    assert settings == {"ppo": {"steps": 1}}


def test_exponent_without_a_dot_is_a_number():
    assert build_config({}, ["ppo.learning_rate=1e-5"]).ppo.learning_rate == 1e-5


def test_section_can_be_switched_on_by_one_of_its_settings():
    assert build_config({}, ["sft.lora.rank=4"]).sft.lora.rank == 4
    assert build_config({}, ["data.ptx.max_samples=5"]).data.ptx.max_samples == 5


def test_value_can_be_cleared():
    assert build_config("smoke", ["sft.max_steps=null"]).sft.max_steps is None


def test_stage_resources_lie_over_the_common_ones():
    config = build_config("smoke", ["resources.threads=3", "ppo.resources.micro_batch_size=2"])
    own = config.ppo.resources
    assert (own.ranks, own.threads, own.micro_batch_size) == (2, 3, 2)
    assert config.resources.micro_batch_size == 4
    assert config.sft.resources is None


def test_partial_resources_of_a_preset_lie_over_the_common_ones():
    config = build_config("llama-7b")
    assert config.ppo.resources.strategy == "fsdp2"
    assert config.ppo.resources.checkpoint_every == 20


def test_preference_is_told_apart_by_its_source():
    assert isinstance(build_config("smoke").data.preference, SampledPreferences)
    ready = build_config({}, ["data.preference={source: pairs.jsonl, format: hh}"])
    assert isinstance(ready.data.preference, DataSettings)


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ("[]", "mix: the list is empty; name at least one source, such as {source: a.json}"),
        ("[{weight: 1}]", "mix.0.source is missing."),
        ("[{source: a, weight: 1, rows: 5}]",
         "mix.0: weight is 1 and rows is 5; they exclude each other: clear one"),
        ("[{source: x/a.csv}, {source: y/a.csv}]",
         "mix: 2 sources have the name a; give each a name of its own, such as name: a-2"),
        ("[{source: a, weight: 0}]", "mix.0.weight: found 0, expected greater than 0."),
        ("[{source: a, weight: 1}, {source: b}]",
         "mix: a has a weight and b has none; give each source a weight, or none"),
        ("[{source: a, curriculum: d}, {source: b}]", "mix: a has a curriculum and b has none; "
         "name the column of each source, or of none"),
        ("[{source: a}, {source: b, columns: {margin: m}}]",
         "mix: b has a margin and a has none; name the column of each source, or of none"),
        ("[{source: a, heldout_fraction: 0.5}, {source: b}]", "mix: heldout_fraction is 0.1 for b, "
         "0.5 for a; a prompt is held out in all sources or in none: set it once, beside mix"),
        ("[{source: a, mix: [{source: b}]}]",
         "mix.0: a mixture stands inside a mixture; list its sources in the outer"),
        ("[{source: sampled}]", "mix.0: sampled preferences cannot be mixed: they are made while "
         "the run goes on; mix files or data sets of the hub, or set {source: sampled} alone"),
        ("[{source: a, wieght: 1}]",
         "mix.0.wieght is not a setting; did you mean data.preference.mix.0.weight?"),
    ],
)  # fmt: skip
def test_wrong_mixture_is_explained(mixture, said):
    assert problems([f"data.preference={{mix: {mixture}}}"]) == [f"data.preference.{said}"]


def test_source_beside_a_mixture_is_refused():
    said = "data.sft: source stands beside mix; put it into the list, or leave it out"
    assert problems(["data.sft={source: a, mix: [{source: b}]}"]) == [said]
    said = "data.sft.weight is not a setting; did you mean data.sft.mix.weight?"
    assert problems(["data.sft={weight: 1, mix: [{source: b}]}"]) == [said]


def test_settings_beside_a_mixture_hold_for_each_source():
    own = "data.sft={mix: [{source: s3://b/c/*.csv}, {source: o/b, max_length: 9}]}"
    config = build_config({}, [own, "data.sft.max_length=7"])
    assert [part.label for part in config.data.sft.parts] == ["c", "b"]
    assert [part.max_length for part in config.data.sft.parts] == [7, 9]
    assert config.data.sft.max_length == 9
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


def test_mixture_takes_the_place_of_a_data_set_and_the_other_way_round(tmp_path):
    over = {"preset": "smoke", "data": {"sft": {"mix": [{"source": "a"}, {"source": "b"}]}}}
    assert [part.source for part in build_config(over).data.sft.parts] == ["a", "b"]
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump(over))
    again = build_config({"preset": str(path), "data": {"sft": {"source": "c"}}})
    assert again.data.sft.source == "c"
    longer = build_config({"preset": str(path), "data": {"sft": {"max_length": 7}}})
    assert [part.max_length for part in longer.data.sft.parts] == [7, 7]


def test_all_problems_are_listed_at_once():
    found = problems(["ppo.kl_coeff=1", "ppo.clip_range=3", "seed=x", "resources.strategy=zero5"])
    assert len(found) == 4


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("ppo.kl_coeff=1", "ppo.kl_coeff is not a setting; did you mean ppo.kl_coef?"),
        ("kl_coef=1", "kl_coef is not a setting; did you mean ppo.kl_coef?"),
        ("ppo.kl=1", "did you mean ppo.kl_coef?"),
        ("data.preference.labeler=x", "did you mean data.preference.labeller?"),
        ("ppo.zzz=1", "ppo has: batch_size, clip_range"),
        ("ppo.clip_range=3", "ppo.clip_range: found 3, expected less than 1."),
        ("seed=x", "seed: found 'x', expected integer."),
        ("data.sft=3", "data.sft: found 3, expected a section with settings."),
        ("resources.strategy=zero5", "expected 'ddp', 'zero1', 'zero2', 'zero2_cpu' or 'fsdp2'."),
        ("data.preference.source=x.json", "is not a setting for this data.preference.source"),
        ("sft={lora: {}, trainable_layers: 2}", "lora and trainable_layers are both set"),
    ],
)
def test_wrong_setting_is_explained(override, text):
    assert any(text in problem for problem in problems([override]))


@pytest.mark.parametrize("override", ["x", "=1", "a..b=1", ".a=1"])
def test_override_that_is_none_is_refused(override):
    with pytest.raises(ConfigError, match="key=value"):
        apply_overrides({}, [override])


def test_override_through_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"name is a value \('smoke'\)"):
        build_config("smoke", ["name.x=1"])


def test_override_with_broken_yaml_is_refused():
    with pytest.raises(ConfigError, match="is not YAML"):
        apply_overrides({}, ["a=[1"])


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([{"type": "nothing"}], "grpo.rewards.0.type: found 'nothing', expected one of model, "),
        ([{"type": "model"}, {"type": "length", "targett": 3}],
         "grpo.rewards.1.targett is not a setting; did you mean grpo.rewards.1.target?"),
        (3, "grpo.rewards: found 3, expected a list."),
    ],
)  # fmt: skip
def test_entry_of_a_list_is_named_by_its_place(rewards, said):
    with pytest.raises(PreflightError) as raised:
        build_config({"grpo": {"rewards": rewards}})
    assert said in str(raised.value)


def test_long_name_of_an_unknown_setting_is_cut():
    with pytest.raises(ConfigError) as raised:
        build_config({"sft": {"long " * 2000: 1}})
    assert str(raised.value).count("long") < 20


def test_unknown_preset_names_the_closest_and_all():
    with pytest.raises(ConfigError, match=r"Did you mean smoke\?.*bloom-560m, calculator"):
        load_preset("smok")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_preset(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft:\n  a: [1\n", "line 3, column 1"),
        ("sft: 1\nppo: 2\nsft: 3\n", "line 3, column 1: 'sft' was already set in line 1"),
        ("- 1\n", "holds a list"),
        ("a: \t- 1\n  b", "line"),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "my run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_preset(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2001-99-99", "month must be in 1..12"),
        ("!!int x", "invalid literal"),
        ("!!map [1]", "does not have the form of its type"),
        ("[" * 2000, "nested too deeply"),
        ("9" * 5000, "does not have the form of its type"),
    ],
)
def test_yaml_value_that_python_refuses_is_one_message(tmp_path, value, message):
    (tmp_path / "x.yaml").write_text(f"seed: {value}\n")
    for attempt in (
        lambda: load_preset(tmp_path / "x.yaml"),
        lambda: build_config({}, [f"seed={value}"]),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            attempt()
        assert len(str(caught.value)) < 600


def test_yaml_alias_that_stands_for_ten_thousand_values_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 4)]
    (tmp_path / "x.yaml").write_text("\n".join([*lines, "seed: *a3"]))
    with pytest.raises(PreflightError, match="seed: found") as caught:
        build_config(tmp_path / "x.yaml")
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    "path", ["/" + "a" * 300 + ".yaml", "~nobody-here/x.yaml", "a\0b.yaml", "."]
)
def test_path_that_cannot_be_opened_is_one_message(path):
    with pytest.raises(ConfigError, match=r"Cannot read|no preset"):
        load_preset(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.learning_rate=.nan", "ppo.learning_rate: found nan, expected a finite number"),
        ("ppo.temperature=.inf", "finite number"),
        ("ppo.batch_size=1000000000000", "less than or equal to 2147483647"),
        ("seed=0x" + "f" * 9000, "seed: found a very large int"),
    ],
)
def test_number_without_end_is_refused(override, message):
    with pytest.raises(PreflightError, match=message):
        build_config({}, [override])


def test_half_a_character_is_refused():
    for settings in ({"store": "\ud800"}, {"data": {"sft": {"columns": {"prompt": "a\udfff"}}}},
                     {"sft": {"lora": {"targets": ["q\ud800"]}}}):  # fmt: skip
        with pytest.raises(PreflightError, match="half a character"):
            build_config(settings)


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_preset(path)


def test_empty_file_means_the_defaults(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("")
    assert build_config(path) == PipelineConfig()


def test_config_survives_the_way_through_json():
    for name in preset_names():
        config = build_config(name)
        assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


def test_record_of_an_older_version_is_read():
    """There `preset` was a field of the configuration, which had been applied."""
    smoke = build_config("smoke")
    assert PipelineConfig.model_validate({"preset": "none", **smoke.model_dump()}) == smoke
    with pytest.raises(PreflightError, match="presett is not a setting; did you mean preset"):
        build_config({"presett": "smoke"})


def test_settings_file_may_name_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: smoke\nppo: { kl_coef: 0.3 }\n")
    assert build_config(path) == build_config("smoke", ["ppo.kl_coef=0.3"])
