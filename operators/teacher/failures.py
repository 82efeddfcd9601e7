"""Kinds of failed calls: the beginning of the error decides whether the call is made again, and who is to blame."""

from collections.abc import Iterable

from operators.teacher.calls import is_cut

FATAL = "fatal: "  # no teacher can answer this call: it is never made again, and does not count against the teacher
REFUSED = "no teacher: "  # the teacher answers no call: the stage ends, and this is not an attempt of the row
LOST = "connection lost: "  # temporary: counts against the teacher, but is not an attempt of the row
BUSY = "teacher busy: "  # temporary, treated as a lost connection
NO_COMPLETION = "no chat completion: "  # not a teacher, such as a proxy's page; treated as a lost connection
BROKEN_OFF = "the reply broke off, finish reason "
OVER_LONG = f"{FATAL}over teacher.max_model_len: "  # final as long as that limit stays the same
OVER_CONTEXT = f"{FATAL}over the endpoint's context: "  # final as long as max_tokens and teacher.max_model_len stay
TEXTLESS = "a reply without text, finish reason "  # the finish reason follows; the model may have thought until a limit
CUT_TEXTLESS = f"{TEXTLESS}length"  # whatever the endpoint calls this reason; its tokens are paid
CRASHED = f"{FATAL}the engine crashed on this call"

_NO_ATTEMPT = (REFUSED, LOST, BUSY, NO_COMPLETION)
_ADDRESS = "teacher.base_url, teacher.model and the key in the variable that teacher.api_key_env names"
_THOUGHTS = (
    "the replies end before an answer begins: raise teacher.max_tokens, or reflect.max_tokens and the judge's, and "
    "teacher.max_model_len; or let the teacher think less (teacher.chat_template_kwargs: {enable_thinking: false})"
)
_LIMITS = "lower teacher.concurrent_requests, or set teacher.requests_per_minute"
_PARAMETERS = (
    "if it refuses a parameter, see teacher.rename_parameters, teacher.leave_out_parameters and teacher.response_format"
)


def is_attempt(error: str) -> bool:
    """Whether a failed call counts among the `teacher.max_attempts` of its row."""
    return not error.startswith(_NO_ATTEMPT)


def is_teachers_fault(error: str) -> bool:
    """Whether a failed call counts against `teacher.max_failed_share`, which stops the stage."""
    return bool(error) and not error.startswith(FATAL)


def over_long(num_tokens: int, limit: int) -> str:
    """The error of a prompt that leaves no room for a reply within `teacher.max_model_len`."""
    return f"{OVER_LONG}{limit}; the prompt has {num_tokens} tokens, so there is no room for a reply; raise it"


def textless(finish_reason: str) -> str:
    """The error of a reply without an answer."""
    return CUT_TEXTLESS if is_cut(finish_reason) else f"{TEXTLESS}{finish_reason}"


def refusal(errors: Iterable[str]) -> str:
    """Why the teacher refuses all calls, if one of these errors is REFUSED; else ""."""
    words = next((error.removeprefix(REFUSED) for error in errors if error.startswith(REFUSED)), "")
    return f"the teacher answers no call: {words}; check {_ADDRESS}, then run again" if words else ""


def stage_failure(failed: int, settled: int, max_failed_share: float, last_error: str) -> str:
    """Why a stage with so many failed calls cannot count as done; "" if it can.

    Args:
        failed: number of calls that failed by the teacher's fault.
        settled: number of all calls that came back.
        max_failed_share: `teacher.max_failed_share`.
        last_error: of a failed call.
    """
    if not failed or failed <= max_failed_share * settled:
        return ""
    return (
        f"{failed} of {settled} calls failed, more than teacher.max_failed_share: {max_failed_share:g}; the last with "
        f"{last_error!r}; fix the teacher and run again, all replies are kept; {_cure(last_error)}"
    )


def _cure(error: str) -> str:
    if error.startswith(BUSY):
        return _LIMITS
    if error == CUT_TEXTLESS:
        return _THOUGHTS
    return f"check {_ADDRESS}; a base_url usually ends in /v1" if error.startswith(NO_COMPLETION) else _PARAMETERS
