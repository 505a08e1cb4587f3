"""What is said of services before a stage asks them."""

from __future__ import annotations

from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import check
from rlhf_core.preflight.services import remarks_on_services
from rlhf_core.system.ports import free_ports
from tests.rlhf_core.rewards.standin import StandIn


def test_services_that_do_not_answer_are_told(tmp_path, request):
    """An answer that is an error is one: the stand-in knows no GET."""
    away = f"http://127.0.0.1:{free_ports(1)[0]}/v1"
    service = StandIn(lambda path, body: {})
    request.addfinalizer(service.close)
    settings = [
        f"store={tmp_path}",
        "ppo.rewards=[{type: model}, {type: http, url: "
        f"{service.url}/score}}, {{type: judge, url: {away}, model: m}}]",
        f"data.preference.judge={{type: endpoint, url: {away}, model: m}}",
        "data.preference.labeller=endpoint",
        f"evaluate.judge_endpoint={{type: endpoint, url: {service.url}/v1, model: m}}",
    ]
    config = build_config("demo", settings)
    (remark,) = remarks_on_services(config)
    assert remark.startswith(f"ppo.rewards.2: nothing answers at {away} now (ConnectError)")
    remarks: list[str] = []
    check(config, remarks=remarks)
    assert remark in remarks
    assert remarks_on_services(build_config("demo", [])) == []
