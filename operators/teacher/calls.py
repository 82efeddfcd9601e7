"""A teacher call and its reply: the columns that the ledger, the teachers and the judge exchange."""

import hashlib
import json
from typing import Any

import pyarrow as pa

CALLS = pa.schema(
    [
        ("call_key", pa.string()),
        ("row_id", pa.string()),
        ("messages", pa.string()),
        ("schema", pa.string()),
        ("max_tokens", pa.int32()),
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
    ]
)
ERROR_CHARS = 500
# Of tasks that hold replies which are paid for: a killed one is tried again for as long as the stage goes on. The same
# arguments everywhere, because Ray Data makes one task of steps that have them in common.
WITH_REPLIES: dict[str, Any] = {"num_cpus": 0.25, "max_retries": -1}


def call_key(call: dict[str, Any], stage: str, teacher_parts: list[str | float | int]) -> str:
    """Hash of everything that determines a reply: row, stage, prompt, output format, length limit, teacher."""
    parts = [stage, call["row_id"], call["messages"], call["schema"], call["max_tokens"], *teacher_parts]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def call_seed(key: str) -> int:
    """The sampling seed of one call. The key holds the configured seed, so row, prompt and seed all decide."""
    return int(key[:8], 16) & 0x7FFFFFFF
