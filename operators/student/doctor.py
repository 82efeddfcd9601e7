"""Checks a student before any paid call: whether it can be loaded, encode, be trained, stop, and be exported.

It writes nothing and does not call the teacher. The packing probe loads the first layers of the student and compares
the loss of documents alone and in one pack. It takes seconds for a small model, and memory for the embeddings and a few
layers of a large one.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from operators.model_files import embedding_findings, one_line, weight_findings
from operators.stage import Finding
from operators.student.chat_format import chat_format
from operators.student.config import TEMPLATE_KEY
from operators.student.encode import encode_example, load_tokenizer, require_template
from operators.student.generation import exportable
from operators.student.hyper_layers import EXACT, hyper_attention_layers
from operators.student.sliced_pack import KEY as SHARED
from operators.student.sliced_pack import unfit_heads, unfit_window

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

KEY = "student.model"
NOISE = "train.neftune_alpha"


@dataclass(frozen=True)
class StudentNeeds:
    """The configuration's requirements for the student.

    Attributes:
        max_tokens: of a pack.
        packed: several documents share a pack.
        hyper_attention_layers: the layers that should use HyperAttention; None if none.
        sequence_parallel: workers that share a pack in training.
        neftune_alpha: of the noise in training; 0 without noise.
        chat_template: text that replaces the student's own template; "" keeps it.
        template_file: where that text comes from.
    """

    max_tokens: int
    packed: bool = True
    hyper_attention_layers: str | Sequence[int] | None = None
    sequence_parallel: int = 1
    neftune_alpha: float = 0.0
    chat_template: str = ""
    template_file: str = ""


def examine_student(student: str, needs: StudentNeeds) -> list[Finding]:
    """Check files, tokenizer, template, labels, generation config, packing and HyperAttention's layers.

    Args:
        student: folder or hub id, as `resolve_model` returns it.
        needs: the run's requirements for it.

    Returns:
        What is wrong, the most basic first; if a check fails, checks that depend on it are left out.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(student, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        return [
            Finding(KEY, f"{student} has no usable config.json ({one_line(error)}); give a Hugging Face model folder")
        ]
    tokenizer, problems = _tokenizer(student, config, needs)
    found = [*weight_findings(student, KEY), *problems, *_positions(config, needs)]
    if tokenizer is not None:
        found += _generation_config(student, tokenizer)
    found += _hyper_attention(config, needs)
    found += _slices(config, needs)
    return found if any(finding.fatal for finding in found) else [*found, *_packing(student, config, needs)]


def _tokenizer(
    student: str, config: "PretrainedConfig", needs: StudentNeeds
) -> "tuple[PreTrainedTokenizerBase | None, list[Finding]]":
    try:
        tokenizer = load_tokenizer(student, needs.chat_template)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, [Finding(KEY, one_line(error))]
    try:
        require_template(tokenizer)
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        if not needs.chat_template:
            return None, [Finding(KEY, one_line(error))]
        text = f"{needs.template_file}: {one_line(error)}; mend the file, or leave out the key for the model's own"
        return None, [Finding(TEMPLATE_KEY, text)]
    needed = encode_example(tokenizer, "Name a colour.", "", "Blue.").input_ids
    found = [*embedding_findings(tokenizer, config, needed, KEY)]
    form = chat_format(tokenizer)
    if form.skipped:
        text = f"the template writes {form.skipped!r} before each answer; it is context, and neither learnt nor scored"
        found.append(Finding(KEY, text, fatal=False))
    return tokenizer, found


def _positions(config: "PretrainedConfig", needs: StudentNeeds) -> Iterator[Finding]:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and needs.max_tokens > positions:
        yield Finding(
            "pack.max_tokens",
            f"{needs.max_tokens} tokens of a pack against the {positions} positions of the student; "
            f"lower pack.max_tokens to {positions}, or take a student with a longer context",
        )


def _generation_config(student: str, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(student)
    except OSError:
        return  # there is none; the export writes one
    except (ValueError, TypeError) as error:
        yield Finding(
            KEY, f"generation_config.json cannot be read ({one_line(error)}); the export writes a new one", False
        )
        return
    exported, changed = exportable(settings, tokenizer)
    if changed:
        text = "generation_config.json has sampling values with do_sample: false, or others that cannot be saved"
        yield Finding(KEY, f"{text}; the student is exported with {changed}", fatal=False)
    stops, before = exported.eos_token_id, settings.eos_token_id
    end = chat_format(tokenizer).end_token
    if before is not None and end not in (before if isinstance(before, list) else [before]):
        text = f"its template ends a turn with {tokenizer.convert_ids_to_tokens(end)!r}, where its answers do not stop"
        yield Finding(KEY, f"{text}; the student is exported with eos_token_id {stops}", fatal=False)


def _hyper_attention(config: "PretrainedConfig", needs: StudentNeeds) -> Iterator[Finding]:
    if needs.hyper_attention_layers is None:
        return
    key = "train.hyper_attention_layers"
    try:
        chosen, used = hyper_attention_layers(config, needs.hyper_attention_layers)
    except ValueError as error:
        yield Finding(key, one_line(error))
        return
    text = f"{len(used)} of {config.get_text_config().num_hidden_layers} layers would use HyperAttention"
    others = sorted(set(chosen) - set(used))
    if not used:
        yield Finding(
            key,
            f"{text}: layers {others} {EXACT}; use train.attention: sdpa or another student",
        )
    elif others:
        yield Finding(key, f"{text}; layers {others} {EXACT}; they stay as they are", fatal=False)


def _slices(config: "PretrainedConfig", needs: StudentNeeds) -> Iterator[Finding]:
    if needs.sequence_parallel > 1:
        heads = unfit_heads(config, needs.sequence_parallel)
        window = unfit_window(config, needs.max_tokens, needs.hyper_attention_layers is not None)
        yield from (Finding(SHARED, problem) for problem in (heads, window) if problem)


def _packing(student: str, config: "PretrainedConfig", needs: StudentNeeds) -> Iterator[Finding]:
    from operators.student.embedding_gain import embedding_gain
    from operators.student.packing_probe import load_probed, probe_packing
    from operators.student.slice_probe import unfit_model

    log = logging.getLogger("transformers.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)  # otherwise it lists every layer that is left out
    unfit: list[str] = []
    try:
        model = load_probed(student, config)
        probe = probe_packing(model, packed=needs.packed)
        unfit += unfit_model(model) if needs.sequence_parallel > 1 else ()
        gain = embedding_gain(model) if needs.neftune_alpha else None
    except Exception as error:  # noqa: BLE001 - code of any model runs here, and a run would fail the same way
        text = f"the student cannot be trained: {type(error).__name__}: {one_line(error)}; take another student"
        yield Finding(KEY, text)
        return
    finally:
        log.setLevel(level)
    yield from (Finding(SHARED, problem) for problem in unfit)
    if gain is not None and (gain.problem or gain.note):
        yield Finding(NOISE, gain.problem or gain.note, fatal=bool(gain.problem))
    if probe.leaks:
        yield Finding(
            "pack.packed",
            f"documents of one pack influence each other in a {config.model_type} student (with {probe.attention}, "
            f"packed losses differ by {probe.change:.2g} of it, and one document's moves by {probe.moved:.2g} when "
            "another changes); set pack.packed: false, so that each document is trained alone",
        )
