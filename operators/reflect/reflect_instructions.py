"""Instruction reflection: the teacher criticises an instruction by five criteria and writes a better one."""

from ray.data import Dataset

from operators.columns import INSTRUCTION_REFLECTED
from operators.reflect.prompts import INSTRUCTION_TASK
from operators.reflect.reflect import Reflecting, Reflection, reflect

STAGE = "reflect_instructions"

ABOUT = Reflecting(
    stage=STAGE,
    task=INSTRUCTION_TASK,
    part="instructions",
    columns_in=("instruction", "response"),
    columns_out=("better_instruction", "better_instruction_response"),
    critique_column="instruction_critique",
    status_column="instruction_reflection",
    schema_out=INSTRUCTION_REFLECTED,
)


def reflect_instructions(rows: Dataset, reflection: Reflection) -> Dataset:
    """Reflect on the instruction of every active row.

    The new instruction always comes with its own new answer, so that it is never paired with the old one. The row's
    `input` is shown to the teacher and stays with the new instruction; it is never rewritten and never lost.

    Columns in:
        columns.RAW.
    Columns out:
        columns.INSTRUCTION_REFLECTED: adds better_instruction, better_instruction_response: str, null if not parsed;
        instruction_critique: JSON object, criterion -> sentence; instruction_reflection: "parsed" or
        "rejected:<reason>".
    Source:
        arXiv 2310.11716, "Reflection on Instruction"; arXiv 2402.10110, section 3. Differs: the papers' code leaves
        the input out of the prompt.
    """
    return reflect(rows, ABOUT, reflection)
