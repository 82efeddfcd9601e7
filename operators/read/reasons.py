"""Why a record of the source cannot be used, and how to fix it: one line each, for people."""

from collections.abc import Mapping

CURES = {
    "malformed_json": "write one JSON object per line, or one array",
    "rest_malformed": "a JSON file is read up to its first error, a CSV file up to a quote that nothing closes: fix it",
    "malformed_csv": "quote fields that hold the delimiter or a line end, and write each quote in them twice; a row "
    "has as many fields as the header",
    "invalid_utf8": "save the file as UTF-8, such as by iconv -f cp1252 -t utf-8",
    "unreadable_file": "the file is damaged, empty or not what its name says",
    "not_an_object": "a record is an object with named columns",
    "second_list": "put each list of records into a file of its own",
    "missing_parent": "a message is read only with all messages above it",
    "missing_field": "say which column is which by source.columns",
    "non_string_field": "say which column, or which part of one, holds the text by source.columns",
    "too_long": "raise source.max_chars",
    "too_deep": "unpack the record",
    "control_characters": "the text was damaged on its way; look where it comes from",
    "non_text_content": "pictures and sounds cannot be recycled",
    "malformed_messages": "turns of user and assistant alternate, each with role and content",
    "no_plain_answer": "the assistant only calls tools",
    "system_turn": "see source.system_turn",
    "empty_instruction": "there is nothing to recycle; source.columns says which column holds the text",
    "empty_response": "there is nothing to recycle; source.columns says which column holds the text",
}
STEP_FAILED = "_failed"  # ends the reason of a row on which an own step raised an error
MOST_CURED = 6  # most reasons whose cure one message names


def told(reasons: Mapping[str, int]) -> str:
    """One text: the reasons and how often each occurs, the most frequent first, and the cure of the first few."""
    ordered = sorted(reasons.items(), key=lambda each: (-each[1], each[0]))
    cures = CURES | {
        reason: "your step raised an error on it; --doctor shows the first one"
        for reason in reasons
        if reason.endswith(STEP_FAILED)
    }
    cured = {reason: f" ({cures[reason]})" for reason, _ in ordered[:MOST_CURED] if reason in cures}
    return ", ".join(f"{reason} {number}{cured.get(reason, '')}" for reason, number in ordered)
