"""Refusals are distinguished from answers that happen to begin with the same words."""

import json
from pathlib import Path

import pytest

from operators.reflect.refusals import REFUSAL

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I am sorry, I cannot provide this.",
    "Sorry, but I can't do that.",
    "Sorry, I am not able to answer.",
    "I'm unable to help with this request.",
    "I am not able to browse the internet.",
    "I apologize, but I cannot fulfil this request.",
    "I apologise. I have no such information.",
    "I apologize for any confusion, but as an AI I have no feelings.",
    "My apologies, but I cannot assist.",
    "I can't assist with that request.",
    "I cannot provide medical advice.",
    "I won't be able to answer this.",
    "I must respectfully decline.",
    "I don't have access to real-time data.",
    "I do not feel comfortable writing this.",
    "As an AI language model, I have no opinion.",
    "As a large language model, I do not know.",
    "I'm just an AI and have no body.",
    "Unfortunately, I am unable to see images.",
    "I regret that I cannot answer.",
    "I'm afraid I can't do that.",
    "It is not appropriate for me to answer this.",
    "This request violates the guidelines.",
    "**I'm sorry, but no.**",
    "I'd be happy to help, but I can't provide medical advice.",
    "I understand your request, but I cannot help with it.",
    "We cannot assist with this.",
    "I apologize for not being able to help.",
    "I'm sorry that I can't help.",
    "As a responsible AI, I will not.",
    "很抱歉，我无法回答这个问题。",
    "作为一个AI，我没有感情。",
    "申し訳ありませんが、お手伝いできません。",
    "ขออภัย ฉันไม่สามารถช่วยได้",
    "Lo siento, pero no puedo ayudar.",
    "Es tut mir leid, das kann ich nicht.",
    "Je suis désolé, mais je ne peux pas.",
]
ANSWERS = [
    "I can't wait to see you at the party.",
    "I cannot stop thinking of the sea.",
    "I am sorry to hear that you are ill.",
    "I'm sorry for your loss. He was a good friend.",
    "I apologize for the delay of your order, which leaves today.",
    "Sorry is the hardest word, says the song.",
    "As an engineer, I would begin with the bridge.",
    "Unfortunately, the train was late, and so was I.",
    "It is not possible to divide by zero.",
    "The request was denied.",
    "I will not forget this summer.",
    "We can't change the past, but we can shape the future.",
    "I'm so sorry I missed your birthday party.",
    "I'm sorry that I was late yesterday.",
    "We are sorry to announce the closing of our shop.",
    "I apologize for missing the deadline.",
    "I must decline your kind invitation.",
    "I regret that I cannot attend the dinner on Friday.",
    "Thank you for the offer, but I cannot accept it.",
    "As an early AI researcher, she wrote programs that play chess.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_recognised(text: str) -> None:
    assert REFUSAL.match(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text: str) -> None:
    assert not REFUSAL.match(text)


def test_no_real_answer_is_mistaken_for_a_refusal(alpaca: Path) -> None:
    answers = [record["output"] for record in json.loads(alpaca.read_text())]
    assert [text[:80] for text in answers if REFUSAL.match(text)] == []
