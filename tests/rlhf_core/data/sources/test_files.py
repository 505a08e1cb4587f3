"""Which files a source is: the same rules for folders and for a real S3 server."""

import json
import os

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.sources.files import find_files, s3_filesystem
from rlhf_core.data.sources.kind import source_kind
from rlhf_core.errors import DataError, RLHFError
from rlhf_core.jobs import DataSettings
from tests.rlhf_core.data.helpers import jsonl, prepared
from tests.rlhf_core.store.conftest import environment, s3_url, seaweed  # noqa: F401
from tests.rlhf_core.store.seaweed import BUCKET

NAMES = (
    "one.jsonl", "part1.jsonl", "part[1].jsonl", "v [2]/in.jsonl", "v 2/no.jsonl", "sub/two.jsonl",
    "sub/deep/three.json", "sub/README.md", ".ipynb_checkpoints/one-checkpoint.jsonl",
    "sub/.x.jsonl", "a b%20c.JSONL", "folder.jsonl/in.jsonl", "two.jsonl.gz.bak", "q?*.jsonl",
    "empty.jsonl",
)  # fmt: skip
HIDDEN = {".ipynb_checkpoints/one-checkpoint.jsonl", "sub/.x.jsonl"}
OTHER = {"sub/README.md", "two.jsonl.gz.bak"}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def tree(request, tmp_path):
    """A source's URL or path, below which the files of NAMES lie."""
    row = json.dumps({"prompt": "a"}) + "\n"
    if request.param == "s3":
        url = request.getfixturevalue("s3_url")
        fs = s3_filesystem()
        if not fs.exists(BUCKET):
            fs.mkdir(BUCKET)
        for name in NAMES:
            text = "" if name == "empty.jsonl" else row
            fs.pipe(f"{url.removeprefix('s3://')}/{name}", text.encode())
        return url
    for name in NAMES:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.jsonl" else row)
    return str(tmp_path / "tree")


def test_same_files_are_found_by_the_same_rules(tree):
    def names(below: str) -> list[str]:
        found = find_files(DataSettings(source=f"{tree}{below}")).files
        return [file.path.partition(tree.removeprefix("s3://"))[2].lstrip("/") for file in found]

    everything = sorted(set(NAMES) - HIDDEN - OTHER)
    assert names("") == everything
    assert names("/part[1].jsonl") == ["part[1].jsonl"]  # not part1.jsonl
    assert names("/part[0-9].jsonl") == ["part1.jsonl"]
    assert names("/v [2]") == ["v [2]/in.jsonl"] == names("/v [2]/*.jsonl")
    assert names("/*.jsonl") == sorted(n for n in NAMES if "/" not in n and n.endswith(".jsonl"))
    assert names("/a b%20c.JSONL") == ["a b%20c.JSONL"] == names("/*.JSONL")
    assert names("/q?*.jsonl") == ["q?*.jsonl"]  # as it is written
    assert names("/folder.jsonl") == ["folder.jsonl/in.jsonl"] == names("/folder.jsonl/")
    assert names("/**/*.jsonl") == [n for n in everything if n.endswith(".jsonl")]
    assert names("/sub/**/*.json*") == ["sub/deep/three.json", "sub/two.jsonl"]
    assert names("/*/.x.jsonl") == ["sub/.x.jsonl"]  # asked for by name
    assert find_files(DataSettings(source=tree)).left_out == {
        **dict.fromkeys(HIDDEN, "its name, or a folder's, begins with a dot"),
        **dict.fromkeys(OTHER, "no data file"),
    }
    with pytest.raises(DataError, match="no such"):
        names("/nothing")
    with pytest.raises(DataError, match="no data file found"):
        names("/nothing*")


def test_links_are_followed_once_and_one_to_nothing_is_an_error(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir(), other.mkdir()
    jsonl(data / "a.jsonl", [{"prompt": "a"}])
    jsonl(other / "b.jsonl", [{"prompt": "b"}])
    (data / "more").symlink_to(other)
    (data / "loop").symlink_to(data)
    found = find_files(DataSettings(source=str(data)))
    assert [file.name for file in found.files] == ["a.jsonl", "more/b.jsonl"]
    assert found.left_out == {"loop": "a link to a folder that is read already"}
    assert len(prepared(tmp_path / "out", str(data), "prompts")) == 2
    card = DataCard.load(tmp_path / "out")
    assert card.left_out == found.left_out and "loop: a link" in card.markdown()
    for name in ("gone.jsonl", "disk"):  # a folder of a disk that is not there
        (data / name).symlink_to(tmp_path / "nothing")
        with pytest.raises(DataError, match=f"{name}: this link leads to nothing"):
            find_files(DataSettings(source=str(data)))
        os.remove(data / name)


def test_link_to_a_folder_of_the_source_is_left_out_not_the_folder(tmp_path):
    (tmp_path / "z" / "deep").mkdir(parents=True)
    jsonl(tmp_path / "z" / "deep" / "b.jsonl", [{"prompt": "b"}])
    (tmp_path / "a").symlink_to(tmp_path / "z" / "deep")
    (tmp_path / "itself").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")  # nobody writes to it
    found = find_files(DataSettings(source=str(tmp_path)))
    assert [file.name for file in found.files] == ["z/deep/b.jsonl"]
    link = "a link to a folder that is read already"
    assert found.left_out == {"a": link, "itself": link, "pipe.jsonl": "no regular file"}
    # A pattern names the link itself.
    found = find_files(DataSettings(source=f"{tmp_path}/a/*.jsonl"))
    assert [file.path for file in found.files] == [f"{tmp_path}/a/b.jsonl"]


@pytest.mark.parametrize(
    "source", ["s3:/b/x.jsonl", "file:/x.jsonl", "s3:b/x", "s3//b/x.jsonl", " s3://b/x.jsonl",
               "'s3://b/x'", "s3;//b/x", "s3://", "s3:///b/x.jsonl"],
)  # fmt: skip
def test_near_urls_are_refused(source):
    with pytest.raises(DataError, match="expected s3://bucket/key"):
        source_kind(source)


def test_keys_in_an_s3_url_are_refused_and_not_shown():
    with pytest.raises(DataError, match="AWS_SECRET_ACCESS_KEY") as error:
        source_kind("s3://AKIAEXAMPLE:s3cr3tKEY@bucket/x.jsonl")
    assert "s3cr3t" not in str(error.value)


@pytest.mark.slow
def test_s3_source(tmp_path, s3_url):  # noqa: F811
    from rlhf_core.data.sources.files import s3_filesystem

    fs = s3_filesystem()
    if not fs.exists(BUCKET):
        fs.mkdir(BUCKET)
    path = s3_url.removeprefix("s3://")
    for name in ("b", "a"):
        fs.pipe(f"{path}/in/{name}.jsonl", json.dumps({"prompt": name}).encode() + b"\n")
    first = fingerprint(DataSettings(source=f"{s3_url}/in"))
    assert first == fingerprint(DataSettings(source=f"{s3_url}/in"))
    for source in (f"{s3_url}/in", f"{s3_url}/in/*.jsonl"):
        assert len(prepared(tmp_path / "out", source, "prompts")) == 2
    assert len(prepared(tmp_path / "out", f"{s3_url}/in/a.jsonl", "prompts")) == 1
    fs.pipe(f"{path}/in/a.jsonl", b'{"prompt": "c"}\n{\n')
    assert first != fingerprint(DataSettings(source=f"{s3_url}/in"))
    with pytest.raises(DataError, match=rf"{s3_url}/in/a.jsonl, row 2: malformed JSON"):
        prepared(tmp_path / "out", f"{s3_url}/in", "prompts")
    with pytest.raises(DataError, match="no such object or prefix"):
        prepared(tmp_path / "out", f"{s3_url}/nothing", "prompts")


def test_s3_that_cannot_be_reached_is_worth_a_retry(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("RLHF_STORE_RETRIES", "0")
    with pytest.raises(RLHFError) as error:
        prepared(tmp_path / "out", "s3://bucket/a.jsonl", "prompts")
    assert error.value.category == "store"
    assert "RLHF_STORE_ENDPOINT" in str(error.value)
    assert check_source(DataSettings(source="s3://bucket/a.jsonl"))
