"""Response reflection: the teacher criticises a response by four criteria and writes a better one."""

from ray.data import Dataset

from operators.columns import RESPONSE_REFLECTED
from operators.reflect.prompts import RESPONSE_TASK
from operators.reflect.reflect import Reflecting, Reflection, reflect

STAGE = "reflect_responses"

ABOUT = Reflecting(
    stage=STAGE,
    task=RESPONSE_TASK,
    part="responses",
    columns_in=("selected_instruction", "selected_response"),
    columns_out=("better_response",),
    critique_column="response_critique",
    status_column="response_reflection",
    schema_out=RESPONSE_REFLECTED,
)


def reflect_responses(rows: Dataset, reflection: Reflection) -> Dataset:
    """Reflect on the response of the pair that the student selected, for every active row.

    Columns in:
        columns.SELECTED.
    Columns out:
        columns.RESPONSE_REFLECTED: adds better_response: str, null if not parsed; response_critique: JSON object,
        criterion -> sentence; response_reflection: "parsed" | "rejected:<reason>".
    Source:
        arXiv 2310.11716, "Reflection on Response"; arXiv 2402.10110, section 3 (sequential form, two calls per row).
    """
    return reflect(rows, ABOUT, reflection)
