"""Patterns for the beginning of an answer that refuses to answer."""

import re

_NOT = (
    r"(?:can(?:no|['’]|\s*no)t|could not|couldn['’]t|won['’]t|will not|am (?:not able|unable)|"
    r"['’]m (?:not able|unable))"
)
_TURNS = (
    r"believe|wait|help but|stop|thank|remember|imagine|emphasi[sz]e|stress|express|get enough|say enough|live|sleep"
)
_SERVE = r"(?:help|assist|provide|fulfil|comply|answer|create|write|generate|support|do (?:that|this))l?"
_FOR_PEOPLE = (
    r"(?: (?:to hear|to learn|to announce|for your|for the|for my|for our|about|"
    r"that (?:you|your)|(?:that )?i (?:missed|was|forgot|hurt|let|did)|if (?:i|we)))"
)
_ENGLISH = (
    rf"(?:i(?:['’]m| am)|we(?:['’]re| are)) (?:so |very |really |truly |deeply |terribly )?sorry\b(?!{_FOR_PEOPLE}\b)",
    rf"(?:i(?:['’]m| am)|we(?:['’]re| are)) (?:so |very |really )?(?:sorry|afraid)\b.{{0,120}}?\b{_NOT}\b",
    r"(?:i(?:['’]m| am)|we(?:['’]re| are)) (?:unable|not (?:able|allowed|permitted|comfortable|programmed))\b",
    rf"i can(?:no|['’]|\s*no)t\b(?! (?:{_TURNS})\b)",
    rf"we can(?:no|['’]|\s*no)t {_SERVE}\b",
    r"(?:thank you|thanks|i (?:understand|appreciate)|i(?:['’]d| would) (?:be (?:happy|glad)|love|like) to)\b"
    rf"[^.\n]{{0,100}}?\bbut (?:unfortunately,? )?i(?: |(?=['’])){_NOT} {_SERVE}\b",
    r"(?:i|we) (?:won['’]t|will not|would not|wouldn['’]t) (?:be able|provide|help|assist|answer|write|create)\b",
    r"i (?:must|have to|need to|will have to) (?:respectfully |politely )?(?:decline|refuse)\b"
    r"(?! (?:the|your|this) (?:\w+ )?(?:invitation|offer|position)\b)",
    r"i (?:respectfully |politely )?(?:decline|refuse) to\b",
    r"i (?:do not|don['’]t) (?:feel comfortable|have (?:the ability|the capability|the means|access|enough information|"
    r"personal|real-time|sufficient))\b",
    r"(?:so )?sorry\b[,:;.!\-– ]+(?:but|i|we|this|that|no|there|as)\b",
    r"(?:my )?(?:sincere )?apologies\b[,:;.!\-– ]+(?:but|i|as)\b",
    r"i (?:sincerely |must |do )?apologi[sz]e\b"
    r"(?! (?:for (?:the|my|our|any (?:inconvenience|delay|trouble)|missing|being|having|forgetting)|"
    r"to (?:you|your))\b)",
    rf"i (?:sincerely |must |do )?apologi[sz]e\b.{{0,120}}?\b{_NOT}\b",
    r"(?:unfortunately|regrettably|regretfully)\b[, ]+(?:i|we|as an? \w+)\b"
    rf".{{0,60}}?(?:{_NOT}|do not have|don['’]t have)\b",
    rf"i regret\b.{{0,60}}?\b{_NOT}\b(?! (?:attend|join|come|be there|make it)\b)",
    r"as an? (?:responsible |helpful )?(?:ai|a\.i\.|artificial|(?:large )?language model|virtual assistant)\b",
    r"(?:i(?:['’]m| am) )(?:just |only )?an? (?:ai\b|artificial|(?:large )?language model)",
    r"it (?:is|['’]s|would be) (?:impossible|inappropriate|unethical|not (?:possible|appropriate|ethical)) for me to\b",
    r"(?:this|your|the) (?:request|prompt|instruction) (?:violates|goes against|is against|is inappropriate)\b",
)
_OTHER = (
    r"(?:很|非常|十分)?抱歉|对不起|對不起|(?:作为|作為)一(?:个|個|款|种)?(?:AI|人工智能|人工智慧|语言模型|語言模型)|我(?:无法|無法|不能)(?:提供|回答|协助|協助|帮助|满足|完成)",
    r"申し訳(?:ありません|ございません)|すみませんが|恐れ入りますが",
    r"죄송(?:합니다|하지만)|ขออภัย|ขอโทษ",
    r"lo siento\b|no puedo (?:ayudar|proporcionar|responder)|(?:je suis )?désolée?\b|"
    r"je ne peux pas\b|(?:es )?tut mir leid\b|ich kann (?:dir|ihnen|diese|das|dabei) .{0,40}nicht\b|"
    r"mi dispiace\b|desculpe\b|sinto muito\b|"
    r"извините\b|к сожалению,? я\b|przykro mi\b|het spijt me\b",
)
REFUSAL = re.compile(rf"[\W_]*(?:{'|'.join((*_ENGLISH, *_OTHER))})", re.IGNORECASE)
