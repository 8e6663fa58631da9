"""storage against an S3 server on loopback."""

import os
import random
import re
import socket
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest
import torch

from recray import digests, folders, locks, storage
from recray.config import DataConfig
from recray.data.sources import files, parquet
from recray.errors import StorageError
from recray.training import sharded_tables

pytest.importorskip("moto.server", reason="needs moto[server]")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    patch.setenv("AWS_ACCESS_KEY_ID", "testing")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import boto3

    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="clicks")
    yield "s3://clicks"
    server.stop()
    patch.undo()


def test_bytes_json_and_existence(bucket: str) -> None:
    uri = f"{bucket}/run/record.json"
    assert not storage.exists(uri)
    storage.write_json(uri, {"id": "a"})
    assert storage.exists(uri)
    assert storage.read_json(uri) == {"id": "a"}


def test_tables_listing_and_globs(bucket: str) -> None:
    table = pa.table({"user": [1, 2]})
    for name in ("day=02/a.parquet", "day=01/a.parquet", "_tmp/a.parquet"):
        storage.write_table(f"{bucket}/events/{name}", table)
    found = files.find(f"{bucket}/events/")
    assert [info.uri for info in found] == [f"{bucket}/events/day=01/a.parquet", f"{bucket}/events/day=02/a.parquet"]
    assert storage.read_table(found[0].uri).equals(table)
    for pattern in ("day=*1/*.parquet", "day={01,03}", "**/*1/a*"):
        assert [info.uri for info in files.find(f"{bucket}/events/{pattern}")] == [found[0].uri]
    assert files.find(f"s3a://{bucket.removeprefix('s3://')}/events/day=01/a.parquet")[0].size == found[0].size
    first, known_by = digests.fingerprint(found)
    assert known_by == "ETag" and digests.fingerprint(found)[0] == first
    storage.write_bytes(found[0].uri, storage.read_bytes(found[0].uri)[::-1])  # as many bytes
    again = files.find(f"{bucket}/events/")
    assert [info.size for info in again] == [info.size for info in found]
    assert digests.fingerprint(again)[0] != first


def test_a_log_in_partitions(bucket: str) -> None:
    for day in range(3):
        table = pa.table({"user_id": [1, 2], "item_id": [day, day], "timestamp": [1_600_000_000, 1_600_000_001]})
        storage.write_table(f"{bucket}/log/day={day}/part.parquet", table)
    columns = {"timestamp": "timestamp", "context": ["day"]}
    log = parquet.Log.open(DataConfig.model_validate({"path": f"{bucket}/log/", "columns": columns}))
    events = pa.concat_tables(t for task in log.tasks() for t in parquet.read_task(task, log.plan))
    assert events["context_day"].to_pylist() == [0, 0, 1, 1, 2, 2]


def test_folders(bucket: str, tmp_path: object) -> None:
    storage.write_bytes(f"{tmp_path}/local/a.bin", b"a")
    storage.copy_folder(f"{tmp_path}/local", f"{bucket}/checkpoint")
    storage.copy_folder(f"{bucket}/checkpoint", f"{tmp_path}/back")
    assert storage.read_bytes(f"{tmp_path}/back/a.bin") == b"a"
    assert folders.delete_written(f"{bucket}/checkpoint", re.compile(r"a\.bin")) == []
    assert not storage.exists(f"{bucket}/checkpoint/a.bin")


def test_pieces_are_read_from_a_copy_that_need_not_stay(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.files, "_PART_BYTES", 100)
    whole = torch.randn(50, 3)
    for piece in range(2):
        sharded_tables.write(f"{bucket}/run", "tables", piece, 2, {"a": whole[piece::2]})
        name = sharded_tables.file_name("tables", piece, 2)
        storage.copy_file(f"{bucket}/run/{name}", f"{bucket}/checkpoint/{name}")
    ids = torch.tensor([49, 3, 4])
    assert torch.equal(sharded_tables.ShardedTables(f"{bucket}/checkpoint", "tables", 2).rows("a", ids), whole[ids])


def test_what_is_not_there_is_named(bucket: str) -> None:
    with pytest.raises(StorageError, match="s3://clicks/absent does not exist"):
        files.find(f"{bucket}/absent")
    with pytest.raises(StorageError, match=r"s3://clicks/absent\.json cannot be read"):
        storage.read_json(f"{bucket}/absent.json")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/a cannot be written"):
        storage.write_bytes("s3://no-such-bucket/a", b"x")


def test_a_write_that_fails_leaves_the_old_object(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow completes an upload whose block raises: apache/arrow#40502."""
    uri = f"{bucket}/served/model.bin"
    storage.write_bytes(uri, b"good" * 1000)
    for size in (2, 12 << 20):  # one PUT, and several parts

        def fail(size: int = size) -> None:
            with storage.writer(uri) as stream:
                stream.write(b"x" * size)
                raise RuntimeError("stopped")

        with pytest.raises(RuntimeError):
            fail()
    with pytest.raises(StorageError, match=r"absent.* cannot be read"):
        storage.copy_file(f"{bucket}/absent", uri)
    with pytest.raises(StorageError), storage.files.atomic(uri) as path:
        open(path, "wb").close()
        raise pa.ArrowInvalid("a table that cannot be written")
    assert storage.read_bytes(uri) == b"good" * 1000


def test_an_upload_that_the_store_breaks_off_leaves_the_old_object(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moto.s3.responses

    uri = f"{bucket}/served/large.bin"
    storage.write_bytes(uri, b"good")
    real, sent = moto.s3.responses.S3Response.key_response, []

    def broken(self: object, request: object, full_url: str, headers: object) -> object:
        if "partNumber=2" in full_url:
            sent.append(full_url)
            return 403, {}, "<Error><Code>AccessDenied</Code></Error>"
        return real(self, request, full_url, headers)

    monkeypatch.setattr(moto.s3.responses.S3Response, "key_response", broken)
    with pytest.raises(StorageError, match=r"large\.bin cannot be written"):
        storage.write_bytes(uri, b"x" * (25 << 20))
    assert sent and storage.read_bytes(uri) == b"good"


@pytest.mark.parametrize("failing", [0.1, 0.3])
def test_requests_that_fail_are_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch, failing: float) -> None:
    import moto.s3.responses

    real, failed, choose = moto.s3.responses.S3Response.key_response, [], random.Random(1)

    def failing_response(self: object, request: object, full_url: str, headers: object) -> object:
        if choose.random() < failing:
            failed.append(full_url)
            return 503, {}, "<Error><Code>SlowDown</Code></Error>"
        return real(self, request, full_url, headers)

    monkeypatch.setattr(moto.s3.responses.S3Response, "key_response", failing_response)
    table = pa.table({"item": list(range(1000))})
    for number in range(20):
        storage.write_json(f"{bucket}/retried/{number}.json", number)
        storage.write_table(f"{bucket}/retried/{number}.parquet", table)
    for number in range(20):
        assert storage.read_json(f"{bucket}/retried/{number}.json") == number
        assert storage.read_table(f"{bucket}/retried/{number}.parquet").equals(table)
    assert len(failed) > 80 * failing / 2


def test_a_store_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"s3://clicks/a cannot be opened: .*refused"):
            storage.exists("s3://clicks/a")
        assert time.monotonic() - began < 5


def test_options_of_a_uri(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_json(f"{bucket}/options.json", 1)
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    system, path = storage.resolve(f"{bucket}/options.json?endpoint_override={endpoint}&scheme=http&region=eu-west-1")
    assert path == "clicks/options.json" and system.get_file_info(path).size and system.region == "eu-west-1"
    with pytest.raises(StorageError, match="unknown option 'colour'; known are region, scheme, endpoint_override"):
        storage.resolve(f"{bucket}/a?colour=red")


def test_a_lease(bucket: str) -> None:
    with locks.exclusive(f"{bucket}/run/a"):
        holder = storage.read_json(f"{bucket}/run/a.lock")["holder"]
        with pytest.raises(StorageError, match=f"being written by {holder}"), locks.exclusive(f"{bucket}/run/a"):
            pass
    assert not storage.exists(f"{bucket}/run/a.lock")
