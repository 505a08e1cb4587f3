import errno
import os
from pathlib import Path

import pytest

from rlhf_core.errors import ConfigError, StoreError, StoreUnavailable
from rlhf_core.store import StoreSettings, open_store, rlhf_home


def test_store_url_comes_from_argument_environment_or_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    assert open_store().url == f"file://{home}/store"
    monkeypatch.setenv("RLHF_STORE", "s3://bucket/some/prefix/")
    assert open_store().url == "s3://bucket/some/prefix"
    assert open_store("s3://bucket").url == "s3://bucket"
    assert open_store("az://container/runs/").url == "az://container/runs"
    assert open_store("file:///a/b/").url == open_store("/a/b").url == "file:///a/b"
    monkeypatch.chdir(tmp_path)
    assert open_store("data/../store").url == f"file://{tmp_path}/store"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hdfs://bucket/x", r"'hdfs' is not supported; use file:///path/to/folder, s3://"),
        ("gs://key:secret@bucket/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://container@account.blob.core.windows.net/x", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("az:///x", "names no container"),
        ("s3://", "names no bucket"),
        ("s3://bucket/../other", r"'\.\.' part"),
        ("s3://key:secret@bucket/x", "AWS_SECRET_ACCESS_KEY"),
        ("file://", "names no folder"),
    ],
)
def test_bad_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_store(url)
    assert "key:secret" not in str(caught.value)


def test_bad_settings_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_STORE_RETRIES", "many")
    with pytest.raises(ConfigError, match="RLHF_STORE_RETRIES"):
        open_store("s3://bucket")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", "http://10.0.0.5:9000")
    monkeypatch.setenv("RLHF_STORE_READ_TIMEOUT", "90")
    settings = StoreSettings()
    assert (settings.endpoint, settings.read_timeout) == ("http://10.0.0.5:9000", 90)


def test_home_is_the_nearest_folder_upward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_HOME")
    (tmp_path / "project" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "deep")
    assert rlhf_home() == tmp_path / "project" / "deep" / ".rlhf"
    (tmp_path / ".rlhf").mkdir()
    assert rlhf_home() == tmp_path / ".rlhf"


def test_place_that_is_no_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"file.*RLHF_STORE"):
        open_store(str(tmp_path / "file" / "store")).check()


def test_full_disk_is_reported_with_both_numbers(tmp_path: Path, folder: Path) -> None:
    from rlhf_core.store.local import file_errors, require_space

    with pytest.raises(StoreError, match=r"1,000,000,000,000,000,000 bytes, but only .* are free"):
        require_space(tmp_path / "not" / "yet", 10**18)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x")
    with (
        pytest.raises(StoreError, match=r"no space left for /x .*RLHF_STORE"),
        file_errors(tmp_path),
    ):
        raise full


def test_folder_without_hard_links_still_creates_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(str(tmp_path / "store"))
    store.check()
    assert store.write_record("runs/a.json", {"n": 1}, create=True) is True
    assert store.write_record("runs/a.json", {"n": 2}, create=True) is False
    assert store.read_record("runs/a.json") == {"n": 1}
