"""The short run form: what is written wins, and what is wrong is named before anything starts."""

from typing import get_args

import pytest

from flows.form import Preset, form_config, rlhf_form, run_name
from flows.retrain import rlhf_retrain
from rlhf_core.errors import ConfigError, PreflightError
from rlhf_core.jobs import BaseJob, PipelineConfig, PPOSettings
from rlhf_core.pipeline.preset_files import preset_names
from rlhf_core.pipeline.presets import build_config
from rlhf_core.store import open_store
from tests.flows.test_flow import logs_of, newest_flow_run


def test_form_offers_every_preset():
    assert sorted(get_args(Preset)) == sorted(["none", *preset_names()])


def test_explicit_value_wins_over_the_preset_even_if_it_is_the_default():
    default = PPOSettings().kl_coef
    assert build_config("demo").ppo.kl_coef != default
    found = form_config("demo", f"ppo: {{kl_coef: {default}}}\nrounds: 1", "mine", seed=0)
    assert (found.ppo.kl_coef, found.ppo.steps, found.name) == (default, 10, "mine")
    assert form_config("none", "preset: demo\nseed: 0", "x", seed=0).ppo.steps == 10


def test_stages_run_on_the_work_pool_unless_the_settings_say_otherwise():
    assert form_config("none", "", "x").launcher.type == "work_pool"
    assert form_config("none", "launcher: {type: local}", "x").launcher.type == "local"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("ppo: {kl_coef: [0.1", "the form's settings, line 1, column 20"),
        ("- ppo", "the form's settings holds a list; expected sections"),
        ("ppo: {kl_coeff: 0.1}", "ppo.kl_coeff is not a setting; did you mean ppo.kl_coef?"),
        ("ppo: {clip_range: 2}\nseed: x", "ppo.clip_range: found 2, expected less than 1."),
        ("preset: smoke", "preset is demo in the form and 'smoke' in its settings"),
        ("seed: 3", "seed is 0 in the form and 3 in its settings"),
    ],
)
def test_wrong_settings_are_one_message_that_names_them(settings, said):
    with pytest.raises((ConfigError, PreflightError)) as caught:
        form_config("demo", settings, "x", seed=0 if settings == "seed: 3" else None)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "settings", "name"),
    [
        ("friendlier tone!", "", "friendlier-tone"),
        ("", "name: mine", "mine"),
        ("typed", "name: mine", "typed"),
        ("  ", "name: [", "None"),  # there is no flow run
        ("../..", "", "run"),
    ],
)
def test_run_is_named_by_form_settings_or_prefect(typed, settings, name):
    assert run_name(typed, settings) == name
    assert PipelineConfig(name=run_name(typed, settings)).name == name


def test_name_that_stands_for_ten_thousand_values_is_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 4)]
    settings = "\n".join([*lines, "name: *a3"])
    assert run_name("", settings) == "None"  # there is no flow run
    with pytest.raises(PreflightError, match="a0 is not a setting"):
        form_config("none", settings, "x")


@pytest.mark.slow
def test_form_ends_at_once_with_the_setting_that_is_wrong(prefect_server, stub):
    with pytest.raises(PreflightError, match=r"did you mean ppo\.kl_coef"):
        rlhf_form(preset="smoke", name="wrong one", settings="ppo: {kl_coeff: 1}")
    flow_run = newest_flow_run()
    assert (flow_run.name, flow_run.state.name) == ("wrong-one", "ConfigurationError")
    assert "ppo.kl_coeff is not a setting" in flow_run.state.message
    assert not any("model" in line for line in logs_of(flow_run)), "no stage has started"
    with pytest.raises(ConfigError, match="line 1"):
        rlhf_retrain(settings="[")
    assert newest_flow_run().state.name == "ConfigurationError"


@pytest.mark.slow
def test_name_of_a_run_is_the_same_everywhere(prefect_server, stub, tmp_path, monkeypatch):
    monkeypatch.setattr(BaseJob, "torchrun", False)  # it takes two seconds a stage
    settings = f"launcher: {{type: local}}\nstore: {tmp_path / 'store'}\npublish: {{name: chat}}"
    summary = rlhf_form(preset="smoke", name="Tone 2", settings=settings)
    flow_run = newest_flow_run()
    assert flow_run.name == "Tone-2"
    assert summary["run"].endswith("-Tone-2")
    store = open_store(str(tmp_path / "store"))
    assert store.read_record(f"runs/{summary['run']}.json")["name"] == "Tone-2"
    assert summary["report"].split("/")[-2] == summary["run"]
    from rlhf_core.store import registry

    assert registry.read_model(store, "chat").versions[0].run == summary["run"]
