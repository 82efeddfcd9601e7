"""The grammar that vLLM's structured output builds from a reply's schema admits paragraphs, quotes and code."""

import json

import xgrammar
from transformers import AutoTokenizer

from operators.evaluate.judge import verdict_schema
from operators.reflect.prompts import INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS, reply_schema

REWRITE = (
    'A "docstring" says what a function is for.\n\n'
    '```python\ndef greet(name):\n    """Greet \\\\ a name."""\n    print(f"Hello, {name}!\\n")\n```\n\n'
    "The third paragraph: 文字, émoji 😀, \\frac{1}{2} and a tab\tend it."
)


def matcher(schema: str, tokenizer_folder: str) -> xgrammar.GrammarMatcher:
    """The grammar as vLLM builds it with `disable_any_whitespace`."""
    tokenizer = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(tokenizer_folder))
    grammar = xgrammar.GrammarCompiler(tokenizer).compile_json_schema(schema, any_whitespace=False)
    return xgrammar.GrammarMatcher(grammar, terminate_without_stop_token=True)


def reply_with(text: str) -> str:
    values = dict.fromkeys(INSTRUCTION_CRITERIA, 'It says "clear" and\nmeans it.') | dict.fromkeys(
        INSTRUCTION_SECTIONS, text
    )
    return json.dumps(values, ensure_ascii=False)


def test_a_rewrite_with_code_quotes_and_paragraphs_is_within_the_grammar(demo_model: str) -> None:
    found = matcher(reply_schema(INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS), demo_model)
    assert found.accept_string(reply_with(REWRITE))
    assert found.is_terminated()


def test_a_verdict_may_quote_an_answer(demo_model: str) -> None:
    verdict = {"critique": 'Answer A says "Paris".\nAnswer B does not.', "score_a": 9, "score_b": 2}
    found = matcher(verdict_schema(critique=True), demo_model)
    assert found.accept_string(json.dumps(verdict))
    assert found.is_terminated()


def test_a_length_limit_would_forbid_line_breaks(demo_model: str) -> None:
    """This is why the schema has none. If this test fails, xgrammar#800 is fixed and limits can be used again."""
    schema = json.loads(reply_schema(INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS))
    for kind in schema["properties"].values():
        kind["maxLength"] = 8000
    assert not matcher(json.dumps(schema), demo_model).accept_string(reply_with(REWRITE))
