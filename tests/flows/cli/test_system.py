"""`rlhf up` beside a system that runs already."""


def test_up_says_that_a_system_runs_already(rlhf, running):
    said = rlhf("up", code=0).stdout
    assert "already running" in said and "http://127.0.0.1:9" in said
    rlhf("up", "--no-s3", "--port", "9", code=0)


def test_up_with_other_options_on_a_running_system_is_refused(rlhf, running):
    said = rlhf("up", "--slots", "4", "--s3-port", "0", code=1).stderr
    assert "running already, with --no-s3 --slots 1; --s3-port 0 --slots 4 would change" in said
    assert "rlhf down" in said
