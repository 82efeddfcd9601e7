"""Refuses rewrites that cannot help, before the student chooses between them and the originals.

A refused rewrite stays in its column for inspection; its status becomes `filtered:<reason>`, and the row keeps its
original. The report counts every reason, and every test has a switch.
"""

import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field
from ray.data import Dataset

from operators.columns import ACTIVE, PARSED
from operators.ngrams import words
from operators.read.drop_contaminated import EvaluationIndex
from operators.reflect.prompts import CRITIQUE_HEADING, END_HEADING, INSTRUCTION_SECTIONS, RESPONSE_SECTIONS
from operators.reflect.reflect import Reflecting
from operators.reflect.refusals import REFUSAL
from operators.reflect.text_checks import (
    breaks_off,
    echoes,
    hangs,
    is_about_itself,
    is_ended,
    is_prompts_words,
    leaves_open,
    repetition,
    says_the_same,
)
from operators.stage import StageConfig, require_columns

SURE = 0.95  # minimum language-ID probability: 1,456 of 1,500 Alpaca answers reach it, none of them wrongly
LANGUAGE_CHARS = 600  # characters from which the language is identified; of whole answers 1,457 reach it

_HEADINGS = "|".join(
    map(re.escape, [CRITIQUE_HEADING, END_HEADING, *INSTRUCTION_SECTIONS.values(), *RESPONSE_SECTIONS.values()])
)
_LEAKED = re.compile(
    rf"^\s*\[(?:{_HEADINGS})\]|</?(?:instruction|input|answer) [0-9a-f]{{8}}>|"
    r"^\s*\{\s*\"\w+\"\s*:.*\"(?:better_instruction|better_response)\"|\bbetter_(?:instruction|response)\b",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)


class FilterConfig(StageConfig):
    """Configuration of `filter_rewrites`, the section `filter`."""

    prompt_words: bool = Field(
        True,
        description="Refuse a rewrite that consists of the prompt's own words, or an instruction that talks about the "
        "instruction instead of being one.",
    )
    unchanged: bool = Field(
        True, description="Refuse a rewrite that says the same as the original; in code every character counts."
    )
    min_chars: int = Field(
        1, ge=1, description="Length of the shortest rewritten text that is accepted, in characters."
    )
    max_chars: int = Field(
        16_000, ge=1, description="Length of the longest rewritten text that is accepted, in characters."
    )
    min_share: float = Field(
        0.1,
        ge=0,
        description="Smallest length of a rewritten response, as a fraction of the original's words; 0 allows any.",
    )
    echo: bool = Field(True, description="Refuse a response that only repeats words of the instruction.")
    max_repetition: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Largest fraction of a text's runs of four words that may repeat an earlier run; 1 allows any.",
    )
    language_drift: bool = Field(True, description="Refuse a rewrite whose language is certainly not the original's.")
    leaked_markup: bool = Field(
        True, description="Refuse a rewrite that contains markers of the prompt's reply format."
    )
    refusal: bool = Field(True, description="Refuse an answer that declines to answer if the original did answer.")
    unfinished: bool = Field(
        True, description="Refuse a rewrite that breaks off in a sentence, if the original did not."
    )


def filter_rewrites(
    rows: Dataset, about: Reflecting, config: FilterConfig, index: EvaluationIndex | None = None
) -> Dataset:
    """Give readable reflections that cannot help the status `filtered:<reason>`.

    The reasons are, in this order, unchanged, prompt_words, about_itself, too_short, too_long, repetitive,
    leaked_markup, refusal, unfinished, language_drift, echo, shrunk, contaminated; the first that applies counts. An
    echo must be refused here, because r-IFD rewards it: an answer that repeats the instruction makes it easy to guess.

    Args:
        rows: with the columns of the reflection.
        about: which reflection.
        config: what is refused.
        index: if given, a rewritten instruction that repeats an evaluation text is refused.

    Columns in and out:
        those of `rows`; only `about.status_column` changes.
    """
    wanted = ["input", "outcome", *about.columns_in, *about.columns_out, about.status_column]
    require_columns("filter_rewrites", wanted, rows.columns() or [])
    judge = partial(_filter, about=about, config=config, index=index)
    return rows.map_batches(judge, batch_format="pyarrow", num_cpus=0.5)


def reason_against(original: str, rewrite: str, config: FilterConfig, *, is_answer: bool) -> str:
    """The reason why this rewrite cannot help; "" if it may help."""
    checks = {
        "unchanged": config.unchanged and says_the_same(original, rewrite),
        "prompt_words": config.prompt_words and is_prompts_words(rewrite) and not is_prompts_words(original),
        "about_itself": config.prompt_words
        and not is_answer
        and is_about_itself(rewrite)
        and not is_about_itself(original),
        "too_short": len(rewrite.strip()) < config.min_chars,
        "too_long": len(rewrite) > config.max_chars,
        "repetitive": repetition(rewrite) > config.max_repetition,
        "leaked_markup": config.leaked_markup and bool(_LEAKED.search(rewrite)) and not _LEAKED.search(original),
        "refusal": config.refusal and is_answer and bool(REFUSAL.match(rewrite)) and not REFUSAL.match(original),
        "unfinished": config.unfinished and _is_unfinished(original, rewrite, is_answer=is_answer),
    }
    # The language takes most of the time, so it is identified only if nothing else speaks against the rewrite.
    found = next((reason for reason, holds in checks.items() if holds), "")
    return found or ("language_drift" if config.language_drift and _drifts(original, rewrite) else "")


def _is_unfinished(original: str, rewrite: str, *, is_answer: bool) -> bool:
    """Whether the rewrite, but not the original, is unfinished: an instruction needs no full stop, only a last word."""
    if hangs(rewrite) and not hangs(original):
        return True
    return is_ended(original) and (breaks_off(rewrite) if is_answer else leaves_open(rewrite))


def _filter(rows: pa.Table, about: Reflecting, config: FilterConfig, index: EvaluationIndex | None) -> pa.Table:
    records = rows.to_pylist()
    judged = [row for row in records if row["outcome"] == ACTIVE and row[about.status_column] in PARSED]
    for row in judged:
        reason = _reason(row, about, config)
        row[about.status_column] = f"filtered:{reason}" if reason else row[about.status_column]
    if index is not None:
        left = [row for row in judged if row[about.status_column] in PARSED]
        texts = [f"{row[about.columns_out[0]]}\n{row['input'] or ''}" for row in left]
        for row, repeats in zip(left, index.contaminates(texts), strict=True):
            row[about.status_column] = "filtered:contaminated" if repeats else row[about.status_column]
    status = pa.array([row[about.status_column] for row in records], pa.string())
    return rows.set_column(rows.column_names.index(about.status_column), about.status_column, status)


def _reason(row: dict[str, str], about: Reflecting, config: FilterConfig) -> str:
    """The reason against a reflection, which has one text, an answer, or two: an instruction and its answer."""
    originals = [row[name] or "" for name in about.columns_in][-len(about.columns_out) :]
    rewrites = [row[name] or "" for name in about.columns_out]
    # A new instruction may keep its answer; an unchanged instruction is not a rewrite, even with another answer.
    rules = [config, config.model_copy(update={"unchanged": False})]
    reasons = [
        reason_against(original, rewrite, rule, is_answer=at == len(rewrites) - 1)
        for at, (original, rewrite, rule) in enumerate(zip(originals, rewrites, rules, strict=False))
    ]
    return next((reason for reason in reasons if reason), "") or _answer_reason(row, about, config)


def _answer_reason(row: dict[str, str], about: Reflecting, config: FilterConfig) -> str:
    """The reason that only shows in the answer with its instruction; it does not count if the original has it too."""
    instruction, original = (row[name] or "" for name in about.columns_in)
    *better_instruction, answer = (row[name] or "" for name in about.columns_out)
    asked = "\n".join([*(better_instruction or [instruction]), row["input"] or ""])
    if config.echo and echoes(answer, asked) and not echoes(original, f"{instruction}\n{row['input'] or ''}"):
        return "echo"
    return "shrunk" if len(words(answer)) < config.min_share * len(words(original)) else ""


def _drifts(original: str, rewrite: str) -> bool:
    languages = [_language(text) for text in (original, rewrite)]
    return None not in languages and languages[0] != languages[1]


def _language(text: str) -> str | None:
    """The language of the text, if it is certain; None for code, names, short texts and the like."""
    name, probability = _identifier().classify(text[:LANGUAGE_CHARS])
    return name if probability >= SURE else None


@lru_cache(maxsize=1)  # 0.7 s to load
def _identifier() -> Any:  # of py3langid, which has no types
    from py3langid import langid

    folder = Path(langid.__file__).parent
    return langid.LanguageIdentifier.from_modelpath(folder / langid.MODEL_FILE, norm_probs=True)
