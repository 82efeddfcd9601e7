"""The texts of evaluation files: what a record asks, in the formats of the usual benchmarks."""

import itertools
import json
from collections.abc import Iterator, Sequence

from operators.files.atomic import open_filesystem
from operators.ngrams import words
from operators.read.dialogues import USER, read_dialogue
from operators.read.nested_columns import paths_below
from operators.read.record_fields import NAMES, plain
from operators.read.record_formats import Record, read_records
from operators.read.source_files import Piece, list_source_files, shown
from operators.stage import Finding

KEY = "decontaminate.files"
EXAMINED = 20  # records of a file
MOST_NAMED = 12  # columns in one message


def evaluation_texts(record: Record, fields: Sequence[str], least_words: int) -> list[str]:
    """What a record asks: the texts of its fields as one, and each turn of a user as one; none for a bad record.

    Args:
        record: as of `read_records`.
        fields: columns that hold texts, lists of texts or lists of messages, also as JSON.
        least_words: a shorter turn, such as thanks, is evidence only together with the others.
    """
    if record.reason or not isinstance(record.value, dict):
        return []
    values = {plain(name): value for name, value in record.value.items()}
    names = dict.fromkeys([*(plain(name) for name in fields), *NAMES["messages"]])
    asked: list[str] = []
    turns: list[str] = []
    for name in names:
        value = _unpacked(values.get(name))
        if isinstance(value, str):
            asked += [value] if name not in NAMES["messages"] else []
        elif isinstance(value, list):
            turns += _turns(value)
    long = [turn for turn in turns if len(words(turn)) >= least_words]
    texts = ["\n".join(asked), *(dict.fromkeys(long) or ["\n".join(turns)])]
    return [text for text in texts if text.strip()]


def examine_file(path: str, fields: Sequence[str], least_words: int) -> Finding | None:
    """A fatal finding if none of the first records of an evaluation file gives a text: then nothing is compared."""
    filesystem, inside = open_filesystem(path)
    piece = Piece(0, path, 0, filesystem.get_file_info(inside).size or 0)
    records = list(itertools.islice(read_records(piece), EXAMINED))
    if any(evaluation_texts(record, fields, least_words) for record in records):
        return None
    objects = [record.value for record in records if isinstance(record.value, dict) and not record.reason]
    columns = list(dict.fromkeys(name for value in objects for name in paths_below(value)))
    text = (
        f"{shown(path)}: none of the first {len(records)} records has an evaluation text in the columns that are read"
    )
    if not columns:
        return Finding(KEY, f"{text}; it holds no objects with named columns: give another file")
    named = ", ".join(columns[:MOST_NAMED])
    return Finding(KEY, f"{text}; its columns are {named}; name those of the question in decontaminate.fields")


def examine_evaluation_files(paths: Sequence[str], fields: Sequence[str], least_words: int) -> Iterator[Finding]:
    """Findings about evaluation files that are missing, of unknown format, or without a text."""
    for path in paths:
        try:
            found = [examine_file(file.path, fields, least_words) for file in list_source_files(path)]
        except (ValueError, OSError) as error:
            yield Finding(KEY, str(error).removeprefix("read_instructions: source.path: "))
            continue
        yield from (finding for finding in found if finding is not None)


def _unpacked(value: object) -> object:
    """A list that a column holds as JSON; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found: object = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) else value


def _turns(items: list[object]) -> list[str]:
    if all(isinstance(item, str) for item in items):
        return [str(item) for item in items]
    return [turn.content for turn in read_dialogue(items).turns if turn.role == USER]
