"""IFD and r-IFD: how hard an answer is, and how easy to guess an instruction is, for the student before its training.

With L(t|c) the mean negative log likelihood in nats of the tokens of t after c, and ppl = exp(L):

    IFD(y|x)   = ppl(y|x) / ppl(y)   = exp(L(y|x) - L(y))
    r-IFD(x|y) = ppl(x|y') / ppl(x)  = exp(L(x|y') - L(x)),  y' = y in a request to guess the instruction

as in arXiv 2402.10110, section 3 (Selective Reflection-Tuning): the ratio of perplexities, not the ratio of losses of
Cherry LLM (arXiv 2308.12032). Both come from one student and are valid for this student only.

Which tokens. The context is the student's chat template around the user's turn, up to where the assistant's text
begins. The target is that text, without the end-of-turn token, whose likelihood says nothing about the text. For the
target alone, the same token ids follow only the token that the tokenizer itself puts before plain text, if it has one.
So alone, the first target token has no context, or one that only some students have. Both means leave it out, so that
both are over the same tokens for every student.

A target of one token, such as the answer "Yes" of a classification, has no other token. There both means score the
first token; alone it follows the student's beginning-of-text token, or its end-of-text token if it has no other. Its
IFD is p(token | nothing) / p(token | instruction).

Why transformers and not vLLM's prompt log-probabilities, which `benchmarks/scoring.py` compares: the scores are the
same (within 1e-5, relative, on 64 pairs), and vLLM, which pads nothing, is 1.3 times as fast on a CPU, one thread each
(4.2 against 3.3 pairs/s). The reasons for transformers are others: vLLM need not support the student, no engine has to
start (35 s on a CPU, as long as 150 pairs take), and the same code evaluates students. Neither was measured on a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from operators.chat_markup import control_tokens
from operators.student.encode import IGNORED, Encoded, EncodingError, encode_example, load_tokenizer, user_text
from operators.student.pool import StudentPoolConfig, longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The user's text, the text after it whose likelihood is measured, and the turns before, if there are any.
Turn = tuple[str, str] | tuple[str, str, str]
LARGEST_EXPONENT = 700.0  # exp of more overflows a float64

GUESS_REQUEST = (
    "The text between the lines is an assistant's answer. Work out which instruction it was given, "
    "and write that instruction.\n\n---\n{response}\n---"
)


class ScoreConfig(StudentPoolConfig):
    """Where the student that scores the candidates runs, and the longest candidate that it reads."""


@dataclass(frozen=True)
class Pair:
    """One candidate: an instruction, its input if any, and the response that belongs to it."""

    instruction: str
    input: str | None
    response: str
    turns_before: str = ""  # JSON list of turns, as in columns.RAW


@dataclass(frozen=True)
class Score:
    """Mean nats per target token with and without the context, or a reward model's score of the answer.

    If there is no score, the numbers are None and `reason` says why.
    """

    nll_given: float | None = None
    nll_alone: float | None = None
    reason: str = ""
    reward: float | None = None

    @property
    def ratio(self) -> float | None:
        """Perplexity ratio exp(nll_given - nll_alone): IFD or r-IFD, no unit."""
        if self.nll_given is None or self.nll_alone is None:
            return None
        return math.exp(self.nll_given - self.nll_alone)

    @property
    def perplexity(self) -> float | None:
        """exp(nll_given), no unit."""
        return None if self.nll_given is None else math.exp(self.nll_given)


@dataclass(frozen=True)
class Prepared:
    """A tokenized turn for a scorer's model, or the `reason` why there is none.

    Attributes:
        given: token ids of context and target.
        alone: token ids of the target without its context. For a reward model: the types of the tokens, if it has any.
        num_scored: number of tokens to score, at the end of both.
        reason: "" if the turn can be scored.
    """

    given: list[int] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    num_scored: int = 0
    reason: str = ""


class StudentScorer:
    """Scores texts with one student. Tokenizer and weights are each loaded when they are first needed.

    Tasks call `prepare`; an actor with a GPU only calls `score_prepared`.
    """

    def __init__(self, student: str, config: ScoreConfig, chat_template: str = "") -> None:
        self._student, self._config, self._template = student, config, chat_template

    @cached_property
    def _model(self) -> Any:
        from operators.student.nll import load_causal_lm

        return load_causal_lm(self._student, self._config)

    def ifd(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score each response given its instruction."""
        return self.score([ifd_turn(pair) for pair in pairs])

    def reverse_ifd(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score each instruction (with its input) given its response."""
        return self.score([reverse_ifd_turn(pair) for pair in pairs])

    def score(self, turns: Sequence[Turn]) -> list[Score]:
        """Score the second text of each turn given the first."""
        return self.score_prepared(self.prepare(turns))

    def prepare(self, turns: Sequence[Turn]) -> list[Prepared]:
        """Tokenize the turns; this loads no weights."""
        if not turns:
            return []
        tokenizer = student_tokenizer(self._student, self._template)
        limit = longest_context(self._student, self._config.max_tokens)
        return [target_spans(tokenizer, turn, limit) for turn in turns]

    def score_prepared(self, turns: Sequence[Prepared]) -> list[Score]:
        """Score the results of `prepare`."""
        from operators.student.nll import sum_nll

        found = [turn for turn in turns if not turn.reason]
        examples = [_labelled(ids, turn.num_scored) for turn in found for ids in (turn.given, turn.alone)]
        sums = iter(sum_nll(self._model, examples, self._config.batch_tokens) if examples else [])
        return [
            Score(reason=turn.reason) if turn.reason else score_of(next(sums), next(sums), turn.num_scored)
            for turn in turns
        ]


@lru_cache(maxsize=2)
def student_tokenizer(model: str, chat_template: str = "") -> "PreTrainedTokenizerBase":
    """The student's tokenizer, loaded once per process."""
    return load_tokenizer(model, chat_template)


def ifd_turn(pair: Pair) -> Turn:
    """The turn that IFD scores: the response, given the instruction with its input and the dialogue before them."""
    turn = user_text(pair.instruction, pair.input), pair.response
    return (*turn, pair.turns_before) if pair.turns_before else turn


def reverse_ifd_turn(pair: Pair) -> Turn:
    """The turn that r-IFD scores: the instruction with its input, given the request to guess it."""
    return guess_request(pair.response), user_text(pair.instruction, pair.input)


def guess_request(response: str) -> str:
    """The user's turn of r-IFD: the response, and the request to guess its instruction."""
    return GUESS_REQUEST.format(response=response)


def target_spans(tokenizer: "PreTrainedTokenizerBase", turn: Turn, max_tokens: int) -> Prepared:
    """Mark the scored tokens of a turn's target, with and without its context, or give the reason for no score.

    The reasons are "empty", "over_max_tokens", "too_short" (no token that could be scored), and those of an
    EncodingError.
    """
    asked, target, *before = turn
    if not asked.strip() or not target.strip():
        return Prepared(reason="empty")
    try:
        encoded = encode_example(tokenizer, asked, None, target, *before)
    except EncodingError as error:
        return Prepared(reason=error.reason)
    if len(encoded.input_ids) > max_tokens:
        return Prepared(reason="over_max_tokens")
    control = control_tokens(tokenizer)
    start = next(place for place, label in enumerate(encoded.labels) if label != IGNORED)
    end = next((place for place in range(start, len(encoded.labels)) if encoded.labels[place] in control), None)
    target_ids = encoded.input_ids[start:end]
    context, nothing = encoded.input_ids[:start], list(tokenizer("").input_ids)
    first = 1
    if len(target_ids) == 1:
        first, nothing = 0, nothing or _begin_of_text(tokenizer)
    if len(target_ids) == first or not (first or nothing):
        return Prepared(reason="too_short")
    return Prepared(context + target_ids, nothing + target_ids, len(target_ids) - first)


def score_of(given: float, alone: float, num_tokens: int) -> Score:
    """Make a score from two summed negative log likelihoods over the same tokens; only a reason if it is not finite."""
    nll_given, nll_alone = given / num_tokens, alone / num_tokens
    if not math.isfinite(nll_given - nll_alone) or max(nll_given, nll_given - nll_alone) > LARGEST_EXPONENT:
        return Score(reason="not_finite")
    return Score(nll_given, nll_alone)


def _labelled(ids: list[int], num_scored: int) -> Encoded:
    unscored = len(ids) - num_scored
    return Encoded(ids, [IGNORED] * unscored + ids[unscored:])


def _begin_of_text(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token that precedes a text for the student: its beginning-of-text token, else its end-of-text token."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return next(([number] for number in ids if number is not None), [])
