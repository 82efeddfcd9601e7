"""One run at a time on a bucket: a small object that only a conditional write can take, renew or give back.

The holder renews it often. A holder counts as dead if it has not renewed the lease for longer than the lease says, by
the store's own clock (`Date` minus `Last-Modified` of one response); host, process and the clocks of both machines do
not matter. A holder that cannot renew in time stops itself before another run may take over.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from cluster.files import StorageError
from cluster.terminal import tell
from operators.files.places import BUCKETS, CREDENTIALS, ENDPOINT_VARIABLE

LEASE = ".lease.json"
LOST_AFTER_S = 60.0  # time without renewal after which another run may take over
BEATS = 6  # renewals in that time
STOPS_AT = 0.7  # share of that time after which a holder that could not renew stops itself
GRACE_S, LEAST_GRACE_S = 20.0, 1.0  # longest and shortest time for a run that lost its lease to end by itself
CLOCK_S = 1.0  # resolution of the store's times
CONFLICT = (409, 412)


class StorageBusyError(RuntimeError):
    """Another run is writing to the storage; the command line shows it as one line."""


@dataclass(frozen=True)
class Record:
    """The content of the lease: its holder, how long it is valid without renewal, and how often it was renewed."""

    holder: str
    host: str
    pid: int
    lost_after_s: float
    beats: int = 0
    released: bool = False


@dataclass(frozen=True)
class Seen:
    """A record as read from the store, with its ETag and its age in seconds by the store's clock."""

    record: Record
    etag: str
    age_s: float


class LeaseObject:
    """The lease in its bucket; it is written only if nobody changed it since it was read."""

    def __init__(self, storage: str) -> None:
        """Open the store, without a request to it."""
        import boto3
        from botocore.config import Config

        self.storage = storage
        self._bucket, _, prefix = storage.removeprefix(BUCKETS).partition("/")
        self._key = f"{prefix}/{LEASE}" if prefix else LEASE
        patience = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "max_attempts": 3})
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._client = boto3.session.Session().client("s3", region_name=region, config=patience)

    def read(self) -> Seen | None:
        """The lease; None if there never was one.

        Raises:
            StorageError: the store cannot be asked.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key)
            content = json.loads(answer["Body"].read())
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise self._explained(error) from None
        except BotoCoreError as error:
            raise self._explained(error) from None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Seen(Record(**content), answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def write(self, record: Record, seen: Seen | None) -> Seen | None:
        """Write the record if the store still holds `seen`; returns None, and writes nothing, if it does not.

        Raises:
            StorageError: the store cannot be asked.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        condition = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen.etag}
        body = json.dumps(record.__dict__).encode()
        try:
            answer = self._client.put_object(Bucket=self._bucket, Key=self._key, Body=body, **condition)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in CONFLICT:
                raise self._explained(error) from None
            # If the response to a write was lost, the repeated write finds the first one.
            found = self.read()
            return found if found is not None and found.record == record else None
        except BotoCoreError as error:
            raise self._explained(error) from None
        return Seen(record, answer["ETag"], 0.0)

    def _explained(self, error: Any) -> StorageError:
        """The error in one line, without its own text, which may contain the name of an access key."""
        code = error.response["Error"]["Code"] if hasattr(error, "response") else type(error).__name__
        cures = {
            "NoSuchBucket": f"there is no bucket {self._bucket}; create it",
            "NoCredentialsError": f"no credentials; set {CREDENTIALS} in the environment",
            "PartialCredentialsError": f"half of the credentials; set {CREDENTIALS} in the environment",
            "EndpointConnectionError": f"nothing answers; check storage_endpoint or ${ENDPOINT_VARIABLE}",
            "NotImplemented": "this store has no conditional writes, so two runs could not be kept apart; use another",
        }
        refused = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403"}
        cure = f"refused ({code}); check {CREDENTIALS}, and that they may read, write and delete here"
        text = cures.get(code, cure if code in refused else f"{code}; run the same command again")
        return StorageError(f"storage: {self.storage}: {text}")


@contextmanager
def bucket_lease(storage: str, lost_after_s: float = LOST_AFTER_S) -> Iterator[None]:
    """Hold `s3://bucket/prefix` while inside.

    Raises:
        StorageBusyError: another run holds it, or took it over because this one could not renew in time.
        StorageError: the store cannot be asked.
    """
    lease = LeaseObject(storage)
    me = Record(uuid.uuid4().hex, socket.gethostname(), os.getpid(), lost_after_s)
    keeper = _Keeper(lease, *_take(lease, me))
    keeper.start()
    try:
        yield
    finally:
        keeper.end()


def is_bucket_leased(storage: str) -> bool:
    """Whether a run holds the storage at this moment; nothing is written.

    Raises:
        StorageError: the store cannot be asked.
    """
    seen = LeaseObject(storage).read()
    return seen is not None and not _is_free(seen)


def _is_free(seen: Seen) -> bool:
    return seen.record.released or seen.age_s > seen.record.lost_after_s + CLOCK_S


def _take(lease: LeaseObject, me: Record) -> tuple[Seen, float]:
    """Take the lease; if it has a holder, wait until the holder renews it (then it is busy) or was silent for too long.

    Returns:
        The written record, and the time when writing began, from `time.monotonic`.
    """
    silent: Seen | None = None
    while True:
        seen = lease.read()
        if seen is None or _is_free(seen):
            tried = time.monotonic()
            taken = lease.write(me, seen)
            if taken is not None:
                return taken, tried
            continue
        if silent is not None and seen.etag != silent.etag:
            raise _busy(lease.storage, seen.record)
        silent = seen
        time.sleep(seen.record.lost_after_s / (2 * BEATS))


def _busy(storage: str, holder: Record) -> StorageBusyError:
    return StorageBusyError(
        f"storage: another run is writing to {storage} (process {holder.pid} on {holder.host}); wait for it or stop it"
    )


class _Keeper(threading.Thread):
    """Renews the lease until `end`; if that fails or hangs for too long, it stops the run."""

    def __init__(self, lease: LeaseObject, held: Seen, tried: float) -> None:
        super().__init__(daemon=True, name="lease")
        self._lease, self._held = lease, held
        self._renewed = tried  # when the last successful renewal began
        self._ended, self._stopping, self._lost = threading.Event(), threading.Lock(), ""
        self._failed = f"storage: {lease.storage}: the store does not answer"

    def run(self) -> None:
        """The thread's body."""
        limit_s = self._held.record.lost_after_s
        threading.Thread(target=self._watch, daemon=True, name="lease watch").start()
        while not self._ended.wait(limit_s / BEATS):
            tried = time.monotonic()
            try:
                beaten = replace(self._held.record, beats=self._held.record.beats + 1)
                held = self._lease.write(beaten, self._held)
            except StorageError as error:
                self._failed = str(error)
                continue
            if held is None:
                self._stop_the_run(
                    f"storage: another run took over {self._lease.storage}: this one did not renew its lease for "
                    f"{limit_s:g} s, and ends; run the same command again after the other"
                )
                return
            self._held, self._renewed = held, tried

    def _watch(self) -> None:
        """Stop the run in time, even if a renewal hangs, whose own timeouts and retries may take longer."""
        patience_s = STOPS_AT * self._held.record.lost_after_s
        while not self._ended.wait(max(0.0, self._renewed + patience_s - time.monotonic())):
            if time.monotonic() - self._renewed >= patience_s:
                why = f"the lease could not be renewed for {patience_s:g} s, so this run ends"
                self._stop_the_run(f"{self._failed}; {why}")
                return

    def end(self) -> None:
        """Give the lease back.

        Raises:
            StorageBusyError: it was lost before.
        """
        self._ended.set()
        self.join()
        if self._lost:
            raise StorageBusyError(self._lost)
        with suppress(StorageError):  # then the lease expires later; a finished run must not fail because of it
            self._lease.write(replace(self._held.record, released=True), self._held)

    def _stop_the_run(self, why: str) -> None:
        with self._stopping:
            if self._lost:
                return
            self._lost = why
        os.kill(os.getpid(), signal.SIGINT)
        left_s = (1 - STOPS_AT) * self._held.record.lost_after_s  # after that another run may take over
        if not self._ended.wait(max(LEAST_GRACE_S, min(GRACE_S, left_s))):  # this run must not write any more
            tell(why)
            os._exit(1)
