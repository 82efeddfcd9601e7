"""Checks the teacher before any paid call: its files, template and arguments, or its endpoint, key and model."""

import os
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from operators.model_files import embedding_findings, weight_findings
from operators.redact import without_secret
from operators.stage import Finding
from operators.teacher.config import TeacherConfig
from operators.teacher.prompt_tokens import chat_tokenizer, prompt_token_ids
from operators.teacher.variants import every_teacher
from operators.teacher.vllm_backend import PROBE, engine_arguments, ranks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENDPOINT_TIMEOUT_S = 15.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAMES_SHOWN = 8


def check_teacher(teacher: TeacherConfig) -> list[Finding]:
    """What is wrong with the teachers that a run may ask; this makes no call that could cost anything.

    Args:
        teacher: with its models resolved (`variants.resolved`).
    """
    found: list[Finding] = []
    for key, one in every_teacher(teacher):
        if one.backend == "vllm":
            found += _check_engine(one, key)
        elif one.backend == "openai":
            found += [*_check_limit(one, key), *_check_endpoint(one, key)]
    return found


def _check_engine(teacher: TeacherConfig, key: str) -> Iterator[Finding]:
    if teacher.device == "cpu" and ranks(teacher) > 1:
        text = f"{ranks(teacher)} processes of an engine need GPUs; set it, and engine_kwargs' parallel sizes, to 1"
        yield Finding(f"{key}.tensor_parallel", text)
    yield from weight_findings(teacher.model, f"{key}.model", any_name=True)
    config, problems = _model_config(teacher, key)
    yield from problems
    try:
        rendered = prompt_token_ids(PROBE, teacher)
        if not rendered:
            yield Finding(f"{key}.model", "its chat template makes an empty prompt; take an instruction-tuned model")
        elif config is not None:
            yield from embedding_findings(chat_tokenizer(teacher.model), config, rendered, f"{key}.model")
    except Exception as error:  # noqa: BLE001 - a template is a program of its author, and may raise anything
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        # What transformers says of a missing template is long and names a method instead of the cure.
        is_missing = "chat_template is not set" in words
        text = "it has no chat template" if is_missing else f"its chat template cannot be rendered ({words})"
        yield Finding(f"{key}.model", f"{text}; take an instruction-tuned model")
    if config is not None:
        yield from _check_context(teacher, config, key)
    if teacher.engine_kwargs or teacher.reasoning_parser:
        yield from _check_arguments(teacher, key)


def _model_config(teacher: TeacherConfig, key: str) -> "tuple[PretrainedConfig | None, list[Finding]]":
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(teacher.model, trust_remote_code=False), []
    except (OSError, ValueError, KeyError) as error:
        return None, [Finding(f"{key}.model", f"its configuration cannot be read ({str(error).splitlines()[0]})")]


def _check_context(teacher: TeacherConfig, config: "PretrainedConfig", key: str) -> Iterator[Finding]:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    scaled = bool((getattr(text, "rope_parameters", None) or {}).get("factor"))
    if isinstance(longest, int) and not scaled and teacher.max_model_len > longest:
        yield Finding(
            f"{key}.max_model_len",
            f"{teacher.max_model_len} is more than the {longest} positions of the model; lower it to {longest}",
        )


def _check_arguments(teacher: TeacherConfig, key: str) -> Iterator[Finding]:
    from dataclasses import fields

    from vllm import AsyncEngineArgs
    from vllm.reasoning import ReasoningParserManager

    known = {field.name for field in fields(AsyncEngineArgs)}
    unknown = sorted(teacher.engine_kwargs.keys() - known)
    for name in unknown:
        yield Finding(f"{key}.engine_kwargs.{name}", "vLLM has no such engine argument; see vllm serve --help")
    if not unknown:
        try:
            AsyncEngineArgs(**engine_arguments(teacher))
        except (TypeError, ValueError) as error:
            yield Finding(f"{key}.engine_kwargs", f"vLLM refuses them: {' '.join(str(error).split())}")
    parsers = ReasoningParserManager.list_registered()
    if teacher.reasoning_parser and teacher.reasoning_parser not in parsers:
        yield Finding(
            f"{key}.reasoning_parser", f"{teacher.reasoning_parser!r} is not one of vLLM's: {', '.join(parsers)}"
        )


def _check_limit(teacher: TeacherConfig, key: str) -> Iterator[Finding]:
    if "max_tokens" in teacher.leave_out_parameters and not teacher.extra_body:  # which may hold another limit
        text = "without max_tokens a reply has no limit, and the budget can be exceeded; use rename_parameters instead"
        yield Finding(f"{key}.leave_out_parameters", text, fatal=False)


def _check_endpoint(teacher: TeacherConfig, key: str) -> Iterator[Finding]:
    from openai import APIConnectionError, APIStatusError, OpenAI

    secret = os.environ.get(teacher.api_key_env, "")
    host = urlsplit(teacher.base_url).hostname or "api.openai.com"
    if not secret and host not in LOOPBACK:
        text = f"the variable {teacher.api_key_env} is empty here; {host} will want a key on every node"
        yield Finding(f"{key}.api_key_env", text, fatal=False)
    if teacher.base_url and urlsplit(teacher.base_url).scheme not in ("http", "https"):
        yield Finding(
            f"{key}.base_url", f"{teacher.base_url!r} is not an address; write it as http://127.0.0.1:8000/v1"
        )
        return
    client = OpenAI(
        api_key=secret or "none", base_url=teacher.base_url or None, timeout=ENDPOINT_TIMEOUT_S, max_retries=1
    )

    def struck(error: Exception) -> str:
        return without_secret(" ".join(str(error).split()), secret)

    try:
        names = _model_names(client.models.list)
    except APIConnectionError as error:
        cause = f"{error.__cause__ or error}"
        yield Finding(
            f"{key}.base_url", f"nobody answers at {client.base_url} ({cause}); start it, or correct the address"
        )
    except APIStatusError as error:
        refused = f"{host} refuses the key in {teacher.api_key_env}: {struck(error)}"
        lost = f"{error.request.url} is not there; the address of a vLLM server ends in /v1"
        told = {
            HTTPStatus.UNAUTHORIZED: Finding(f"{key}.api_key_env", refused, fatal=bool(secret)),
            HTTPStatus.FORBIDDEN: Finding(f"{key}.api_key_env", refused, fatal=bool(secret)),
            HTTPStatus.NOT_FOUND: Finding(f"{key}.base_url", lost, fatal=False),
        }
        yield from (finding for status, finding in told.items() if status == error.status_code)
    except Exception as error:  # noqa: BLE001 - an endpoint without a list of models may answer anything
        text = f"{host} answers the request for its list of models with {type(error).__name__}: {struck(error)}"
        yield Finding(f"{key}.base_url", text, fatal=False)
    else:
        if names and teacher.model not in names:
            shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
            yield Finding(f"{key}.model", f"{teacher.model!r} is not in the list of {host}: {shown}", fatal=False)


def _model_names(list_models: Callable[[], Any]) -> list[str]:
    page = list_models()
    return [str(model.id) for model in getattr(page, "data", None) or [] if getattr(model, "id", None)]
