"""Reads dialogues in all common forms, and picks the pair of a dialogue that the teacher reflects on.

A dialogue is a list of turns. The pair is a user's turn and the assistant's answer directly after it; system prompts,
tool turns and all other turns stay before or after it, word for word.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

Policy = Literal["last", "every", "first"]

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
_ROLES = {
    USER: ("user", "human", "prompter", "instruction", "question"),
    ASSISTANT: (
        "assistant",
        "gpt",
        "chatgpt",
        "model",
        "bot",
        "bard",
        "bing",
        "ai",
        "answer",
        "function_call",
    ),
    SYSTEM: ("system", "developer"),
    TOOL: ("tool", "function", "observation", "function_response", "ipython", "tool_response"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_CALLS = ("function_call",)  # roles of turns in which the assistant calls a tool
_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_TEXT_KEYS = ("content", "value", "text", "message", "utterance")
_OF_TREE = ("replies", "rank", "deleted")


class Turn(NamedTuple):
    """One turn; `is_call` if the assistant calls a tool in it and gives no final answer."""

    role: str
    content: str
    is_call: bool = False


class Exchange(NamedTuple):
    """A pair and the turns around it; `reason` says why it cannot be used, "" if it can."""

    instruction: str
    input: str
    response: str
    before: tuple[Turn, ...] = ()
    after: tuple[Turn, ...] = ()
    reason: str = ""

    @property
    def texts(self) -> tuple[str, str, str]:
        """Instruction, input and response."""
        return self[:3]


class Dialogue(NamedTuple):
    """The turns of a record, the `reason` why they cannot be used, if any, and the keys of turns that nothing reads."""

    turns: list[Turn]
    reason: str = ""
    unread: tuple[str, ...] = ()


def read_dialogue(messages: object) -> Dialogue:
    """The turns of a list of messages, in the form of OpenAI, Hugging Face, ShareGPT or oasst, or as one dict per pair.

    Reasons: malformed_messages; non_text_content, for a part of a message that is an image or a sound.
    """
    turns: list[Turn] = []
    unread: dict[str, None] = {}
    for message in messages if isinstance(messages, list) and messages else [None]:
        if not isinstance(message, dict):
            return Dialogue(turns, "malformed_messages")
        pair, read = _pair_of(message)
        if pair:
            turns += [turn for turn in pair if turn.role != SYSTEM or turn not in turns[:1]]  # said once
            unread |= dict.fromkeys(_others(message, read))
            continue
        (role_key, role), (text_key, said) = _first(message, _ROLE_KEYS), _first(message, _TEXT_KEYS)
        known = _ROLE_OF.get(role.strip().casefold()) if isinstance(role, str) else None
        content = _text_of(said)
        calls = message.get("tool_calls") or message.get("function_call")
        if content is not None and known is not None:
            text = "\n".join(part for part in (content, _as_json(calls) if calls else "") if part)
            turns.append(Turn(known, text, bool(calls) or str(role).casefold() in _CALLS))
        else:
            shows_media = known is not None and isinstance(said, list) and _is_media(said)
            return Dialogue(turns, "non_text_content" if shows_media else "malformed_messages")
        read = (role_key, text_key, "tool_calls" if message.get("tool_calls") else "function_call", *_OF_TREE)
        unread |= {key: None for key in _others(message, read) if message[key] not in (role, said)}
    return Dialogue(turns, "" if _alternates(turns) else "malformed_messages", tuple(unread))


def tree_path(root: object) -> tuple[list[object], int]:
    """The messages of the best path through a tree of replies, as in oasst, and the number of the other messages.

    After each message the path takes the reply of lowest `rank`, or the first one if there are no ranks. It never takes
    a deleted one.
    """
    path: list[object] = []
    others = 0
    while isinstance(root, dict):
        path.append(root)
        replies = _replies_of(root)
        there = [reply for reply in replies if reply.get("deleted") is not True]
        ranked = [reply for reply in there if isinstance(reply.get("rank"), int)]
        root = min(ranked, key=lambda reply: reply["rank"]) if ranked else next(iter(there), None)
        others += sum(_num_messages(reply) for reply in replies if reply is not root)
    while path and _ROLE_OF.get(str(path[-1].get("role")).casefold()) == USER:  # type: ignore[attr-defined]
        path.pop()  # an unanswered question at the end of the path
        others += 1
    return path, others


def exchanges_of(turns: list[Turn], policy: Policy) -> Iterator[Exchange]:
    """The pairs of a dialogue that the teacher reflects on; none if no user's turn is followed by an answer.

    Args:
        turns: of a dialogue.
        policy: "last" and "first" give one pair, with all other turns around it. "every" gives each pair with the turns
            before it, so that the student is trained on no answer twice; the last one has the turns after it too.
    """
    places = [place for place in range(len(turns) - 1) if _is_pair(turns[place], turns[place + 1])]
    answered = [place for place in places if turns[place].content.strip() and turns[place + 1].content.strip()]
    places = answered or places
    if policy != "every":
        places = places[-1:] if policy == "last" else places[:1]
    for place in places:
        after = tuple(turns[place + 2 :]) if place == places[-1] or policy != "every" else ()
        yield Exchange(turns[place].content, "", turns[place + 1].content, tuple(turns[:place]), after)


def as_json(turns: Iterable[Turn]) -> str:
    """A JSON list of objects with role and content; "" if there are no turns."""
    listed = [{"role": turn.role, "content": turn.content} for turn in turns]
    return _as_json(listed) if listed else ""


def _is_pair(asked: Turn, answer: Turn) -> bool:
    return asked.role == USER and answer.role == ASSISTANT and not answer.is_call


def _alternates(turns: list[Turn]) -> bool:
    """Whether no two turns of a user and no two final answers follow each other, and a system prompt comes first."""
    roles = [turn.role for turn in turns]
    pairs = itertools.pairwise(turns)
    doubled = any(a.role == b.role and a.role in (USER, ASSISTANT) and not (a.is_call or b.is_call) for a, b in pairs)
    return not doubled and SYSTEM not in roles[1:] and USER in roles and ASSISTANT in roles


def _pair_of(message: dict[str, object]) -> tuple[list[Turn], tuple[str, ...]]:
    """The turns of a dict that has the roles as keys, such as {"human": ..., "assistant": ...}, and the keys read.

    No turns if the dict is not of this form. A system prompt comes first.
    """
    keys: dict[str, str] = {}
    for key, value in message.items():
        role = _ROLE_OF.get(key.casefold())
        if role in (SYSTEM, USER, ASSISTANT) and isinstance(value, str) and value:
            keys.setdefault(role, key)
    if _first(message, _ROLE_KEYS)[1] is not None or not {USER, ASSISTANT} <= set(keys):
        return [], ()
    read = tuple(keys[role] for role in (SYSTEM, USER, ASSISTANT) if role in keys)
    return [Turn(role, str(message[keys[role]])) for role in (SYSTEM, USER, ASSISTANT) if role in keys], read


def _others(message: dict[str, object], read: tuple[str, ...]) -> list[str]:
    """The keys that hold something and are not in `read`."""
    return [key for key, value in message.items() if key not in read and value not in (None, "", [], {})]


def _first(message: dict[str, object], keys: tuple[str, ...]) -> tuple[str, object]:
    """The first of the keys that holds something, or else that is there, and its value."""
    there = [key for key in keys if message.get(key) is not None]
    key = next((key for key in there if message[key] not in ("", [], {})), next(iter(there), ""))
    return key, message.get(key)


def _text_of(content: object) -> str | None:
    """A string as it is, or the joined text parts of a list; "" if there is no content, None if it is not text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = [part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict)]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return None
    return "\n".join(text for text in texts if text)


def _is_media(parts: list[object]) -> bool:
    return any(isinstance(part, dict) and "type" in part for part in parts)


def _num_messages(root: dict[str, object]) -> int:
    return 1 + sum(_num_messages(reply) for reply in _replies_of(root))


def _replies_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    replies = message.get("replies")
    return [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []


def _as_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
