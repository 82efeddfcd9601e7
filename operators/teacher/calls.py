"""A teacher call and its reply: the columns that the ledger, the teachers and the judge exchange."""

import hashlib
import json
from typing import Any

import pyarrow as pa

from operators.outside_text import replace_surrogates
from operators.redact import without_credentials
from operators.thoughts import begins_with_thoughts, reply_after_thoughts

CALLS = pa.schema(
    [
        ("call_key", pa.string()),
        ("row_id", pa.string()),
        ("messages", pa.string()),
        ("schema", pa.string()),
        ("max_tokens", pa.int32()),
        ("base_key", pa.string()),
    ]
)
REPLIES = pa.schema(
    [
        ("call_key", pa.string()),
        ("row_id", pa.string()),
        ("reply", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("generated_tokens", pa.int32()),
        ("error", pa.string()),
        ("base_key", pa.string()),  # null in records that are older than this column
    ]
)
ERROR_CHARS = 500
_CUT = ("length", "max_tokens", "model_length")  # endpoints' names for the finish reason "length"
_BROKEN = ("error", "abort", "aborted", "cancelled", "canceled", "failed")
MOST_TOKENS = 2**31 - 1
Call = dict[str, Any]
Reply = dict[str, Any]


def call_key(call: Call, stage: str, teacher_parts: list[str | float | int]) -> str:
    """Hash of everything that determines a reply: row, stage, prompt, output format, length limit, teacher."""
    return _hash([stage, call["row_id"], call["messages"], call["schema"], call["max_tokens"], *teacher_parts])


def base_key(call: Call, stage: str, teacher_parts: list[str | float | int]) -> str:
    """As `call_key` without the length limit: a reply that ended by itself is the reply under any limit."""
    return _hash([stage, call["row_id"], call["messages"], call["schema"], *teacher_parts])


def call_seed(key: str) -> int:
    """The sampling seed of one call: it depends on row, prompt and configured seed, because the key does."""
    return int(key[:8], 16) & 0x7FFFFFFF


def answered(call: Call, text: str, finish_reason: str, prompt_tokens: int, generated_tokens: int) -> Reply:
    """A reply as one row of REPLIES. Characters that cannot be stored, as outside text may have them, are replaced."""
    return {
        "call_key": call["call_key"],
        "row_id": call["row_id"],
        "reply": replace_surrogates(text),
        "finish_reason": "length" if is_cut(finish_reason) else "stop",
        "prompt_tokens": min(prompt_tokens, MOST_TOKENS),
        "generated_tokens": min(generated_tokens, MOST_TOKENS),
        "error": "",
        "base_key": call.get("base_key"),
    }


def is_cut(finish_reason: str) -> bool:
    """Whether this finish reason means that the limit of tokens ended the reply."""
    return finish_reason.casefold() in _CUT


def is_cut_in_thoughts(text: str, finish_reason: str) -> bool:
    """Whether the limit of tokens ended a reply before its answer began: it is empty or consists of thoughts."""
    rest = reply_after_thoughts(text)
    return is_cut(finish_reason) and (not rest.strip() or begins_with_thoughts(rest))


def is_broken(finish_reason: str) -> bool:
    """Whether this finish reason means that the server failed in the middle of a reply."""
    return finish_reason.casefold() in _BROKEN


def failed(call: Call, error: str, prompt_tokens: int = 0, generated_tokens: int = 0) -> Reply:
    """A call without a reply as one row of REPLIES, with the tokens that it cost; `failures` says how errors begin."""
    return {
        "call_key": call["call_key"],
        "row_id": call["row_id"],
        "reply": None,
        "finish_reason": None,
        "prompt_tokens": min(prompt_tokens, MOST_TOKENS),
        "generated_tokens": min(generated_tokens, MOST_TOKENS),
        "error": replace_surrogates(without_credentials(error))[:ERROR_CHARS] or "failed without a word",
        "base_key": call.get("base_key"),
    }


def _hash(parts: list[str | float | int]) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def replies_table(replies: list[Reply]) -> pa.Table:
    """Replies as a table of REPLIES."""
    return pa.Table.from_pylist(replies, schema=REPLIES)
