"""Credentials are refused wherever a URI can be given, and no message repeats them."""

import traceback
from pathlib import Path
from typing import Any

import pytest

import recray
from helpers.cli import recray_command
from recray import credentials, storage
from recray.cluster import runtime
from recray.cluster.submit import Jobs
from recray.errors import ConfigError

SECRET = "wJalr/XUtnFEMI+K7MDENG"
URIS = [
    f"s3://AKIAKEY:{SECRET}@bucket/clicks",
    f"S3A://AKIAKEY:{SECRET}@bucket/clicks",
    f"s3://{SECRET.replace('/', '%2F')}@bucket/clicks",
    f"s3://AKIAKEY:{SECRET}%40bucket/clicks",
    f"https://user:{SECRET}@host/x.parquet",
    f"https://{SECRET.replace('/', '')}@host/x.parquet",
    f"redis://:{SECRET}@host:6379",
    f"gs://bucket/x?access_token={SECRET}",
    f"s3://bucket/clicks?access_key=AKIAKEY&secret_key={SECRET}",
    f"s3://bucket/clicks?region=us-east-1&secret%5Faccess%2Dkey={SECRET}",
    f"s3://bucket/clicks?X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/x?sv=2024&sig={SECRET}",
    f"s3://bucket/clicks?endpoint_override=https%3A%2F%2Fuser%3A{SECRET}%40host",
    f"s3://bucket/clicks?endpoint_override=user:{SECRET}@host",
]
HARMLESS = [
    "s3://bucket/user@example.com/x.parquet",
    "s3://bucket/at=10:30@utc/x.parquet",
    "s3://bucket/clicks?region=eu-west-1&scheme=https&endpoint_override=localhost:9000",
    "gs://anonymous@public-bucket/clicks",
    "http://host:8265/a@b",
    "ray://head:10001",
    "/home/me@work/a:b@c/part-?.parquet",
    "data//me@work/part-??=1.parquet",
    "file:///data/a:b@c.parquet",
    "clicks/token=5/part-0.parquet",
    "--set",
    "ndcg@10",
]


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize(
    ("key", "nest"),
    [
        ("data.path", lambda uri: {"data": {"path": uri}}),
        ("data.parquet.path", lambda uri: {"data": {"parquet": {"path": uri}}}),
        ("data.item_table", lambda uri: {"data": {"item_table": uri}}),
        ("run.output", lambda uri: {"run": {"output": uri}}),
        ("run.plugins", lambda uri: {"run": {"plugins": uri}}),
        ("tune.space.data.path.choices", lambda uri: {"tune": {"space": {"data.path": {"choices": ["a", uri]}}}}),
        ("model", lambda uri: {"model": {uri: 1}}),
        ("no_such_section.key", lambda uri: {"no_such_section": {"key": [[uri]]}}),
    ],
)
def test_a_configuration_value_with_credentials_is_refused_by_its_key(key: str, nest: Any, uri: str) -> None:
    for read in (recray.parse_config, recray.Config.model_validate):
        with pytest.raises(ConfigError) as caught:
            read(nest(uri))
        assert str(caught.value).startswith(key) and "AWS_PROFILE" in str(caught.value)
        assert "wJalr" not in _text(caught.value) and "AKIAKEY" not in str(caught.value)


@pytest.mark.parametrize("uri", URIS)
def test_every_other_place_of_a_uri_refuses_credentials_too(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://user:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", f"ray://user:{SECRET}@127.0.0.1:9")
    for call in (
        lambda: recray.load_config(uri),
        lambda: recray.parse_config({}, [f"run.output={uri}"]),
        lambda: recray.parse_config({}, [uri.replace("=", "%3D")]),
        lambda: recray.infer(uri),
        lambda: storage.read_bytes(uri),
        lambda: storage.exists("s3://bucket/x"),
        lambda: Jobs(f"http://user:{SECRET}@127.0.0.1:9"),
        lambda: Jobs(f"user:{SECRET}@127.0.0.1:9"),
        runtime.check,
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert "wJalr" not in _text(caught.value)


@pytest.mark.parametrize("uri", URIS)
def test_a_command_refuses_credentials_in_any_argument(uri: str, tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text('[run]\nname = "x"\n')
    for arguments in (
        ["init", uri],
        ["init", "x.parquet", "--items", uri],
        ["run", uri],
        ["run", str(config), f"--report={uri}"],
        ["train", str(config), "--set", f"data.path={uri}"],
        ["recommend", str(config), "--output", uri],
        ["runs", uri],
        ["submit", str(config), "--address", uri],
        ["no-such-command", uri, "--json"],
    ):
        done = recray_command(*arguments)
        assert done.code == 2 and "credentials" in done.out + done.err
        assert "wJalr" not in done.out + done.err


@pytest.mark.parametrize("uri", HARMLESS)
def test_other_uris_and_paths_are_not_refused(uri: str) -> None:
    assert not credentials.found_in(uri)
    credentials.refuse({"a": [{"b": uri}]}, "")


@pytest.mark.parametrize("name", ["password", "secret_key", "aws_secret_access_key", "api-key", "authToken"])
def test_a_key_that_is_called_a_secret_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.warehouse\.{name} is a secret") as caught:
        recray.parse_config({"data": {"source": "warehouse", "warehouse": {name: SECRET}}})
    assert "wJalr" not in _text(caught.value)


def test_columns_and_features_may_be_called_as_they_are() -> None:
    """A key with a number or a table behind it is no secret."""
    credentials.refuse(
        {"features": {"token": {"kind": "categorical"}, "password": {"kind": "numeric"}, "secret": 3}}, "data"
    )
