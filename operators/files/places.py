"""Which places can hold a storage: a folder, or a prefix in a bucket of an S3-compatible store.

The address of the store comes from the configuration, credentials come from the environment only: a URI with
credentials is refused, and no message repeats it.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

BUCKETS = "s3://"
# pyarrow, boto3 and fsspec all read this variable; it is set in the driver and in Ray's workers.
ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL_S3"
# Variables that say where the store is; none of them is a secret.
PASSED_TO_WORKERS = (ENDPOINT_VARIABLE, "AWS_REGION", "AWS_DEFAULT_REGION")
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role of the machine"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PART = re.compile(r"(?!\.\.?$)[A-Za-z0-9!_.*'()=+-]+")
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?")


def in_bucket(place: str) -> bool:
    """Whether a place of `require_place` is in a bucket, not a folder."""
    return place.startswith(BUCKETS)


def require_place(text: str) -> str:
    """Check that `text` can hold a storage: a path, which may be relative, or `s3://bucket/prefix`; returns it.

    Raises:
        ValueError: it is another URI, or has more than bucket and prefix; the message repeats only its scheme.
    """
    if not _SCHEME.match(text):
        return text
    parts = urlsplit(text)
    shown = f"storage: {parts.scheme}://..."
    if parts.scheme not in ("s3", "file") or not text.startswith(f"{parts.scheme}://"):
        raise ValueError(
            f"storage: {parts.scheme}:...: cannot hold a storage; give a folder that all nodes share, or "
            "s3://bucket/prefix"
        )
    if "@" in parts.netloc:
        raise ValueError(f"{shown}: holds credentials; take them out, and set {CREDENTIALS} in the environment")
    if "?" in text or "#" in text:
        raise ValueError(
            f"{shown}: holds parameters; give s3://bucket/prefix alone, the store's address as storage_endpoint and "
            "its region in the environment as AWS_REGION"
        )
    if parts.scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"{shown}: names a host; give file:///absolute/path")
        return str(Path(unquote(parts.path)))
    return _require_prefix(text, shown)


def _require_prefix(text: str, shown: str) -> str:
    bucket, *prefix = text.removeprefix(BUCKETS).split("/")
    if text.endswith("/"):
        raise ValueError(f"{shown}: ends with a slash; leave it out, a key with an empty part is another key")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"{shown}: names no bucket; give s3://bucket/prefix, where a bucket has 3 to 63 lower-case letters, "
            "digits, '.' and '-'"
        )
    if not all(_PART.fullmatch(part) for part in prefix):
        raise ValueError(
            f"{shown}: the prefix has an empty part, '.', '..' or a character that needs quoting; give letters, digits "
            "and !_.*'()=+- between single slashes"
        )
    return text


def require_endpoint(url: str) -> str:
    """Check the address of an S3-compatible store, empty for Amazon's own; returns it.

    Raises:
        ValueError: it is not a plain `http(s)://host[:port]`; the message does not repeat it.
    """
    if url and not _ENDPOINT.fullmatch(url):
        raise ValueError(
            "give http://host:port or https://host[:port] and nothing more; credentials belong in the environment "
            f"({CREDENTIALS})"
        )
    return url


def use_endpoint(url: str) -> None:
    """Let this process, and the workers that it starts, find buckets at this address; empty changes nothing."""
    if url:
        os.environ[ENDPOINT_VARIABLE] = url


def store_environment() -> dict[str, str]:
    """The part of this process's environment that says where the store is; no credentials."""
    return {name: os.environ[name] for name in PASSED_TO_WORKERS if os.environ.get(name)}
