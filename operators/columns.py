"""The columns and Arrow types at every boundary of the data half.

A row keeps its `row_id` and its original texts from the first stage to the last; each stage appends columns.
`outcome` is empty while a row is active. A row that leaves (`quarantined:<reason>`, `dropped:<reason>`)
stays in the data set with its reason, so that every stage has exactly as many rows out as in.
"""

import pyarrow as pa

# Outcomes of rows that were recycled. All others are "quarantined:<reason>" or "dropped:<reason>".
ORIGINAL, INSTRUCTION, RESPONSE, BOTH = "original", "instruction", "response", "both"
RECYCLED_OUTCOMES = (ORIGINAL, INSTRUCTION, RESPONSE, BOTH)
ACTIVE = ""
PARSED = ("parsed", "repaired")  # statuses of reflections that may replace something
HELD_OUT = "dropped:held_out"
QUARANTINED, REJECTED = "quarantined:", "rejected:"  # open the outcome of a row, the status of a reflection
CALL_FAILED = "call_failed"  # the reason of a rejected reflection whose call has no reply

_TEXT = pa.string()
_SCORE = pa.float64()


def _extend(schema: pa.Schema, **columns: pa.DataType) -> pa.Schema:
    return pa.schema([*schema, *(pa.field(name, kind) for name, kind in columns.items())])


# raw_instructions: the texts of the source, normalised. In a dialogue, instruction and response are the pair that the
# teacher reflects on; `turns_before` (system prompt and earlier turns) and `turns_after` are JSON lists of objects with
# role and content, "" if there are none. `extra` is a JSON object of the columns that `source.pass_through` names, else
# "". `ignored_columns` is a JSON list of the record's other columns that are not empty and that nothing reads, else "".
# `origin` is the file; `escaped` says that chat markup inside the texts was broken up so that no tokenizer takes it for
# a control token.
RAW = pa.schema(
    [
        ("row_id", _TEXT),
        ("instruction", _TEXT),
        ("input", _TEXT),
        ("response", _TEXT),
        ("turns_before", _TEXT),
        ("turns_after", _TEXT),
        ("extra", _TEXT),
        ("ignored_columns", _TEXT),
        ("origin", _TEXT),
        ("escaped", pa.bool_()),
        ("outcome", _TEXT),
    ]
)

# instruction_reflections: the teacher's better instruction and its answer to that. `*_critique` is a JSON object,
# criterion -> sentence. `*_reflection` is "parsed", "repaired", "rejected:<reason>", or null if nothing was asked.
INSTRUCTION_REFLECTED = _extend(
    RAW,
    better_instruction=_TEXT,
    better_instruction_response=_TEXT,
    instruction_critique=_TEXT,
    instruction_reflection=_TEXT,
)

# selected_instructions: the student's scores (perplexity ratios, no unit, null = not scored; perplexities under the
# policy of that name) and its choice. `ifd_unscored` is null or says which candidate has no score and why, such as
# "original:over_max_tokens,better_instruction:empty".
SELECTED = _extend(
    INSTRUCTION_REFLECTED,
    ifd_original=_SCORE,
    ifd_better_instruction=_SCORE,
    ifd_unscored=_TEXT,
    selected_instruction=_TEXT,
    selected_response=_TEXT,
)

# response_reflections: the teacher's better response to the selected instruction.
RESPONSE_REFLECTED = _extend(
    SELECTED,
    better_response=_TEXT,
    response_critique=_TEXT,
    response_reflection=_TEXT,
)

# recycled_instructions: the final pair; `outcome` is never empty here. `rifd_unscored` is as `ifd_unscored`.
RECYCLED = _extend(
    RESPONSE_REFLECTED,
    rifd_selected=_SCORE,
    rifd_better_response=_SCORE,
    ifd_better_response=_SCORE,
    rifd_unscored=_TEXT,
    final_instruction=_TEXT,
    final_response=_TEXT,
)

# packed_sequences: one row per pack; all documents of a pack lie one after the other. `labels` is -100 where there is
# no loss; `position_ids` restarts at 0 with each document. A row that could not be packed is a row of its own with
# empty lists, its id in `row_ids` and its reason in `outcome`; packs have outcome "packed".
# `cut_rows` of a pack's rows were longer than a pack; `lost_tokens` supervised tokens of theirs are in no pack.
PACKED = "packed"
PACKS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("position_ids", pa.list_(pa.int32())),
        ("document_lengths", pa.list_(pa.int32())),
        ("row_ids", pa.list_(_TEXT)),
        ("outcome", _TEXT),
        ("cut_rows", pa.int32()),
        ("lost_tokens", pa.int32()),
    ]
)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give `table` exactly the columns of `schema`, in order and type; a column that is absent becomes null."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
