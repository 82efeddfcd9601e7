"""Finds the thoughts that a reasoning teacher writes before its reply, in the marks of the known model families."""

import re

INVISIBLE = "\ufeff\u200b\u200e\u200f\u2060"
LONGEST_PROSE = 200  # characters before thoughts that are dropped with them

_NAME = r"(?:\w{1,20}:)?(?:think|thinking|thought|thoughts|scratchpad)"
_ANY_NAME = r"(?:\w{1,20}:)?(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis)"
_BLOCK = (
    rf"(?:[<\[◁](?P<tag>{_ANY_NAME})(?: [^<>\[\]\n]{{0,60}})?[>\]▷].*?[<\[◁]/(?P=tag)[>\]▷]|"
    r"<\|(?:begin|start)_of_(?P<other>thought|thinking|reasoning)s?\|>.*?<\|end_of_(?P=other)s?\|>|"
    r"thinking\.\.\.[ \t]*\n.*?\n\.\.\.done thinking\.)"
)
_FIRST = re.compile(rf"\s*{_BLOCK}", re.DOTALL | re.IGNORECASE)
# A reply begins with one of these characters, so that they end the prose before thoughts.
_LATER = re.compile(rf"[^<\[◁{{*#|]{{0,{LONGEST_PROSE}}}\n\s*{_BLOCK}", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(rf"</?{_NAME}(?: [^<>\n]{{0,60}})?>|\[/?THINK\]|◁/?think▷", re.IGNORECASE)
_OPENS = re.compile(rf"\s*(?:<{_NAME}(?: [^<>\n]{{0,60}})?>|\[THINK\]|◁think▷)", re.IGNORECASE)
_CLOSES = re.compile(
    rf"(?:</{_NAME}>|\[/THINK\]|◁/think▷)(?:\s{{0,9}}(?:</{_NAME}>|\[/THINK\]|◁/think▷))*", re.IGNORECASE
)
_CHANNEL = re.compile(r"\s*<\|(?:start|channel)\|>")
_FINAL = re.compile(r"<\|channel\|>\s*final[^<>|]{0,40}<\|message\|>")  # gpt-oss: what comes before it is analysis


def without_thoughts(text: str) -> str:
    """`text` without the complete blocks of thoughts that stand before everything else."""
    while found := _FIRST.match(text):
        text = text[found.end() :].strip(INVISIBLE + "\n")
    return text


def reply_after_thoughts(reply: str) -> str:
    """A whole reply without thoughts, also behind a few words or behind an opening tag that the chat template wrote."""
    channels = _FINAL.finditer(reply) if _CHANNEL.match(reply) else ()
    *_, final = [0, *(found.end() for found in channels)]
    text = without_thoughts(reply[final:])
    while found := _LATER.match(text):
        text = without_thoughts(text[found.end() :].strip(INVISIBLE + "\n"))
    opens, closes = re.search(r"[{\[*#]", text), _CLOSES.search(text)
    if closes and not _TAG.search(text[: closes.start()]) and not (opens and opens.start() == 0):
        text = text[closes.end() :].strip()
    return text.lstrip()


def begins_with_thoughts(text: str) -> bool:
    """Whether `text` begins with thoughts that do not end."""
    return _OPENS.match(text) is not None


def holds_thoughts(text: str) -> bool:
    """Whether a tag of thoughts is anywhere in `text`."""
    return _TAG.search(text) is not None
