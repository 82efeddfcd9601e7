"""The allowed places of a storage: every mistake in a URI is refused with its cure, and no message repeats a secret."""

import pytest

from operators.files.places import (
    ENDPOINT_VARIABLE,
    in_bucket,
    require_endpoint,
    require_place,
    store_environment,
    use_endpoint,
)


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/prefix", "s3://my.bucket-1/a/refresh=2026-11-26/b_c"])
def test_a_bucket_with_or_without_a_prefix_is_taken_as_it_is(place: str) -> None:
    assert require_place(place) == place
    assert in_bucket(place)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        *[(path, path) for path in ("runs/demo", "/data", "~/runs")],
        *[("file:///data/runs", "/data/runs"), ("file:///data/", "/data"), ("file:///a%20b", "/a b")],
        *[("a:b", None), ("C:/runs", None)],
    ],
)
def test_a_path_stays_and_a_file_uri_is_its_path(text: str, path: str | None) -> None:
    if path is None:  # it would create a folder named like a scheme
        with pytest.raises(ValueError, match="cannot hold a storage"):
            require_place(text)
    else:
        assert require_place(text) == path
        assert not in_bucket(path)


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("s3://KEY:HIDDEN@bucket/runs", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/runs?access_key=KEY&secret_key=HIDDEN", "storage_endpoint"),
        ("s3://bucket/runs?", "storage_endpoint"),
        ("s3://bucket/runs#HIDDEN", "storage_endpoint"),
        ("s3://bucket/runs/", "ends with a slash; leave it out"),
        ("s3://bucket/", "ends with a slash; leave it out"),
        ("s3://bucket//HIDDEN", "between single slashes"),
        ("s3://bucket/../HIDDEN", "between single slashes"),
        ("s3://bucket/a%2fHIDDEN", "between single slashes"),
        ("s3://", "ends with a slash"),
        ("s3:///HIDDEN", "names no bucket"),
        ("s3://Bucket/runs", "lower-case"),
        ("s3:/bucket/HIDDEN", "a folder that all nodes share, or s3://bucket/prefix"),
        ("gs://bucket/HIDDEN", "a folder that all nodes share, or s3://bucket/prefix"),
        ("https://KEY:HIDDEN@host/bucket", "a folder that all nodes share, or s3://bucket/prefix"),
        ("file://host/HIDDEN", "file:///absolute/path"),
        ("file:HIDDEN", "a folder that all nodes share"),
        ("file:///data?HIDDEN", "holds parameters"),
    ],
)
def test_a_mistake_in_a_uri_is_refused_with_its_cure_and_without_its_text(text: str, cure: str) -> None:
    with pytest.raises(ValueError, match=r"^storage: ") as error:
        require_place(text)
    assert cure in str(error.value)
    assert "HIDDEN" not in str(error.value)
    assert "KEY:" not in str(error.value)


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:9000", "https://minio.example.org", "http://[::1]:9000"])
def test_an_endpoint_is_a_plain_address(url: str) -> None:
    assert require_endpoint(url) == url


@pytest.mark.parametrize("url", ["minio:9000", "http://key:HIDDEN@minio", "http://minio/HIDDEN", "https://m?HIDDEN"])
def test_any_other_endpoint_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port") as error:
        require_endpoint(url)
    assert "HIDDEN" not in str(error.value)


def test_workers_are_told_where_the_store_is_and_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT_VARIABLE, "http://old:1")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HIDDEN")
    use_endpoint("")
    assert store_environment()[ENDPOINT_VARIABLE] == "http://old:1"
    use_endpoint("http://new:2")
    assert store_environment() == {ENDPOINT_VARIABLE: "http://new:2", "AWS_REGION": "eu-north-1"}
