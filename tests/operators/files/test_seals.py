"""A record says whether it is what was written, wherever a bit of it was flipped."""

import json

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from operators.files.seals import SEAL, sealed, unsealed


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    files: tuple[tuple[str, str], ...] = ()


RECORD = Record(name="grün", files=(("a.jsonl", "0123"), ("b.jsonl", "4567")))


def test_a_record_is_read_as_it_was_written() -> None:
    assert Record.model_validate(unsealed(sealed(RECORD))) == RECORD


def test_a_record_of_an_older_version_is_read() -> None:
    assert Record.model_validate(unsealed(RECORD.model_dump_json())) == RECORD


def test_no_flipped_bit_changes_what_is_read() -> None:
    text = sealed(RECORD).encode()
    changed = 0
    for place in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[place // 8] ^= 1 << place % 8
        try:
            changed += Record.model_validate(unsealed(bytes(flipped))) != RECORD
        except (ValueError, ValidationError):
            continue
    assert changed == 0


@pytest.mark.parametrize("text", ["", "{", "nothing"])
def test_what_is_no_json_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="Expecting"):
        unsealed(text)


def test_the_checksum_is_a_key_of_the_record() -> None:
    assert json.loads(sealed(RECORD)).keys() == {"name", "files", SEAL}
