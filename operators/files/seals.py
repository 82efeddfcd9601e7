"""Small JSON records with a checksum of their own, so that a flipped bit in one is found instead of believed.

A record that was written before records had a checksum is read as it is, and gets one when it is next written.
"""

import json
import zlib
from typing import Any

from pydantic import BaseModel

SEAL = "seal"  # key of the checksum


def sealed(record: BaseModel) -> str:
    """The text of a record's file, with a checksum of its content."""
    content = record.model_dump(mode="json")
    return json.dumps(content | {SEAL: _checksum(content)}, indent=1, sort_keys=True)


def unsealed(text: bytes | str) -> Any:
    """The content of a record's file without its checksum.

    Raises:
        ValueError: the content is not what was written, or this is no JSON.
    """
    content = json.loads(text)
    seal = content.pop(SEAL, None) if isinstance(content, dict) else None
    if seal is not None and seal != _checksum(content):
        raise ValueError("not what was written")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
