"""One run at a time on a bucket, whatever host and clock; against a real S3 protocol (moto's server)."""

import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from cluster.bucket_lease import LEASE, LeaseObject, Record, bucket_lease, is_bucket_leased
from cluster.files import StorageError
from cluster.lease import StorageBusyError, is_leased, lease

QUICK_S = 0.6
OTHER = Record("other", "far-away", 1, 60.0)


def age(bucket: str, seconds: float) -> None:
    """Make the store report an earlier time of writing for the lease, without telling this process."""
    key = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket.removeprefix("s3://")].keys[f"runs/{LEASE}"]
    key.last_modified -= timedelta(seconds=seconds)


@pytest.fixture
def storage(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("cluster.bucket_lease.LEAST_GRACE_S", 20.0)  # so that the tests pass on a busy machine
    # A run is stopped by SIGINT, which tests in the background of a shell ignore.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield f"{bucket}/runs"
    signal.signal(signal.SIGINT, before)


def test_a_second_run_is_refused_until_the_first_has_ended(storage: str) -> None:
    assert not is_leased(storage)
    with lease(storage, 6.0):  # renewed once a second, and valid for long enough on a busy machine
        assert is_leased(storage)
        with pytest.raises(StorageBusyError, match=f"another run is writing to {storage} \\(process "), lease(storage):
            pytest.fail("both hold it")
    assert not is_leased(storage)
    with lease(storage):
        pass


def test_a_dead_holder_is_replaced_by_the_clock_of_the_store(storage: str, bucket: str) -> None:
    LeaseObject(storage).write(OTHER, None)
    age(bucket, 40)
    assert is_bucket_leased(storage)
    age(bucket, 22)
    assert not is_bucket_leased(storage)
    with bucket_lease(storage):
        seen = LeaseObject(storage).read()
        assert seen is not None
        assert seen.record.holder != "other"


def test_a_silent_holder_is_watched_until_it_counts_as_dead(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    LeaseObject(storage).write(OTHER, None)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        age("s3://" + storage.split("/")[2], 20)

    monkeypatch.setattr("cluster.bucket_lease.time.sleep", wait)
    with bucket_lease(storage):
        assert waited == [5.0] * len(waited)
        assert len(waited) in (3, 4)  # 60 s without a sign of life, by a clock of whole seconds


def test_a_holder_that_lost_its_lease_is_stopped(storage: str) -> None:
    def work() -> None:
        with bucket_lease(storage, 3.0):
            mine = LeaseObject(storage)
            while mine.write(OTHER, mine.read()) is None:
                pass  # it was renewed in between
            threading.Event().wait(20)

    with pytest.raises(StorageBusyError, match=f"another run took over {storage}"):
        work()
    seen = LeaseObject(storage).read()
    assert seen is not None
    assert seen.record == OTHER


def test_a_holder_that_cannot_renew_stops_before_another_may_take_over(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("storage: gone")

    def work() -> None:
        with bucket_lease(storage, QUICK_S):
            monkeypatch.setattr(LeaseObject, "write", refuse)
            threading.Event().wait(20)

    with pytest.raises(StorageBusyError, match="the lease could not be renewed"):
        work()


def test_a_holder_whose_renewal_hangs_stops_before_another_may_take_over(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def hang(*_: Any) -> None:
        answered.wait(5)
        raise StorageError("storage: too late")

    def work() -> None:
        with bucket_lease(storage, QUICK_S):
            monkeypatch.setattr(LeaseObject, "write", hang)
            try:
                threading.Event().wait(4)
            finally:
                hung.append(not answered.is_set())
                answered.set()

    hung: list[bool] = []
    with pytest.raises(
        StorageBusyError, match=r"the store does not answer; the lease could not be renewed for 0\.42 s"
    ):
        work()
    assert hung == [True]


def test_a_holder_recognises_its_own_write_whose_answer_was_lost(storage: str) -> None:
    first, again = LeaseObject(storage), LeaseObject(storage)
    assert first.write(OTHER, None) is not None
    assert again.write(OTHER, None) is not None
    assert again.write(Record("mine", "here", 2, 60.0), None) is None


def test_a_refusal_of_the_store_is_one_line_with_its_cure(
    storage: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"^storage: s3://nowhere/runs: there is no bucket nowhere; create it$"):
        is_bucket_leased("s3://nowhere/runs")
    monkeypatch.setattr(
        "botocore.client.BaseClient._make_api_call",
        lambda *_: (_ for _ in ()).throw(client_error("SignatureDoesNotMatch", 403)),
    )
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as error, lease(storage):
        pass
    assert "\n" not in str(error.value)


def client_error(code: str, status: int) -> Exception:
    from botocore.exceptions import ClientError

    answer: Any = {"Error": {"Code": code, "Message": "KEY"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "GetObject")


def test_without_credentials_the_environment_is_named(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        is_bucket_leased(storage)


def test_the_lease_holds_no_secret(storage: str, bucket: str) -> None:
    with bucket_lease(storage):
        client = boto3.client("s3", region_name="us-east-1")
        held = client.get_object(Bucket=bucket.removeprefix("s3://"), Key=f"runs/{LEASE}")["Body"].read()
    assert b"secret" not in held
