"""Credentials are hidden wherever they stand, and nothing else is."""

from typing import Any

import pytest

from operators.redact import without_certain_credentials, without_credentials, without_secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://…@bucket/x"),
        ("https://u:p@ss@host:8000/v1", "https://…@host:8000/v1"),
        ("https://ghp_123@host/v1", "https://…@host/v1"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("abfs://name:secret@account/x", "abfs://…@account/x"),
        ("https://h/v1?a=1&token=abc", "https://h/v1?a=1&token=…"),
        ("s3://b/x?access_key=A&secret_key=B&region=eu", "s3://b/x?access_key=…&secret_key=…&region=eu"),
        ("https://h/f?sv=2024&sig=a%2Fb%3D&se=1", "https://h/f?sv=2024&sig=…&se=1"),
        ("https://h/f?X-Amz-Signature=ab&X-Amz-Date=1", "https://h/f?X-Amz-Signature=…&X-Amz-Date=1"),
        ("nobody at 'https://u:p@h/?api-key=1', retry", "nobody at 'https://…@h/?api-key=…', retry"),
        ("Authorization: Bearer sk-12345678", "Authorization: Bearer …"),
        ("Authorization: Basic dXNlcjpwdw==", "Authorization: Basic …"),
        (
            "{'Authorization': 'Token abcdef', 'x-api-key': 'k3y-of-mine'}",
            "{'Authorization': 'Token …', 'x-api-key': '…'}",
        ),
        ("authorization=sk-12345678 was refused", "authorization=… was refused"),
        ("authorization: required, api-key: missing", "authorization: required, api-key: missing"),
        ("a basic understanding of it", "a basic understanding of it"),
        ("the bearer understands it", "the bearer understands it"),
        ("storage: out/demo", "storage: out/demo"),
        ("mail me@home.org, see https://a.b/c?d=e", "mail me@home.org, see https://a.b/c?d=e"),
        ("x = 1 if a else token", "x = 1 if a else token"),
    ],
)
def test_credentials_in_texts_are_hidden(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"api_key": "k", "apiKey": "k", "hf_token": "t"}, {"api_key": "…", "apiKey": "…", "hf_token": "…"}),
        (
            {"headers": {"Authorization": "Bearer abc12345", "X-Api-Key": "k"}},
            {"headers": {"Authorization": "Bearer …", "X-Api-Key": "…"}},
        ),
        (
            {"authToken": "t", "clientSecret": "s", "SharedAccessKey": "k"},
            dict.fromkeys(("authToken", "clientSecret", "SharedAccessKey"), "…"),
        ),
        (
            {"Authorization": "Basic dXNlcjpwdw==", "password": "correct horse battery staple"},
            {"Authorization": "Basic …", "password": "…"},
        ),
        (
            {
                "api_keys": ["a", "b"],
                "secrets": {"one": "s"},
                "passwords": ["p"],
                "access_tokens": "t",
                "hf_tokens": ["t"],
            },
            {
                "api_keys": ["…", "…"],
                "secrets": {"one": "…"},
                "passwords": ["…"],
                "access_tokens": "…",
                "hf_tokens": ["…"],
            },
        ),
        ([("s3://a:b@c", 1), {"secret": "s"}], [["s3://…@c", 1], {"secret": "…"}]),
    ],
)
def test_credentials_in_values_are_hidden_by_their_names(value: Any, shown: Any) -> None:
    assert without_credentials(value) == shown


@pytest.mark.parametrize(
    "value",
    [
        {"max_tokens": 5, "token": 7, "key": None, "password": ""},
        {"eosToken": "</s>", "monkey": "m", "maxTokens": "5"},
        {"eos_token": "</s>", "stop_token": "<e>", "tokenizer": "t", "keys": "k", "api_key_env": "OPENAI_API_KEY"},
        {
            "signature": "Does it end with a signature?",
            "secret": "Does the answer keep the secret of the riddle to itself?",
        },
        {"max_tokens": "max_completion_tokens", "stop_tokens": ["<e>"], "passport": "p", "tokenizers": ["t"]},
    ],
)
def test_texts_that_only_look_like_credentials_stay(value: Any) -> None:
    assert without_credentials(value) == value


def test_the_time_of_a_long_text_does_not_grow_with_the_square_of_its_length() -> None:
    text = "a." * 100_000 + " s3://key:secret@bucket"
    assert without_credentials(text).endswith(" s3://…@bucket")  # 40,000 characters took 49 s


@pytest.mark.parametrize("name", ["think_token", "image_token", "sort_key", "token", "tokens", "signature"])
def test_possible_credentials_are_hidden_and_different_values_stay_different(name: str) -> None:
    one, other = ({name: [text] if name == "tokens" else text} for text in ("<one>", "<other>"))
    shown = without_credentials(one)
    assert "one" not in str(shown)
    assert without_credentials(shown) == shown
    assert shown != without_credentials(other)
    assert without_certain_credentials(one) == one


def test_a_certain_credential_is_hidden_from_hashes_too() -> None:
    value = {
        "api_key": "k",
        "headers": {"Authorization": "Bearer abc12345"},
        "url": "https://u:p@h/?api_key=1&page_token=2",
    }
    assert without_certain_credentials(value) == {
        "api_key": "…",
        "headers": {"Authorization": "Bearer …"},
        "url": "https://…@h/?api_key=…&page_token=2",
    }


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("sk-12345678", "key <key>x, max_tokens"),
        ("x", "key sk-12345678x, max_tokens"),
        ("max_tokens", "key sk-12345678x, <key>"),
    ],
)
def test_a_secret_is_hidden_and_a_short_one_does_not_cut_words(secret: str, shown: str) -> None:
    assert without_secret("key sk-12345678x, max_tokens", secret) == shown


def test_a_short_secret_is_hidden_as_a_word() -> None:
    assert without_secret("Incorrect key: 'x'.", "x") == "Incorrect key: '<key>'."
    assert without_secret("text", "") == "text"
