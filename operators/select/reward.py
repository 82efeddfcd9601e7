"""A reward model that scores answers, instead of the student: a sequence-classification model with one output.

It reads the whole dialogue as its own chat template writes it or, if it has no template, the request and the answer as
a pair of texts. Its one output is the score, in its own unit. Reward models are trained to compare answers to the same
request. A pair and its rewrite have two different requests, so that comparison is less reliable.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from operators.model_files import embedding_findings, one_line, weight_findings
from operators.select.ifd import Prepared, Score, ScoreConfig, Turn
from operators.stage import Finding
from operators.student.pool import longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "select.reward_model"


class RewardScorer:
    """Scores answers with one reward model; each actor has one. The model is loaded when it is first needed."""

    def __init__(self, model: str, config: ScoreConfig) -> None:
        self._path, self._config = model, config

    @cached_property
    def _model(self) -> Any:
        import torch
        from transformers import AutoModelForSequenceClassification

        on_gpu = self._config.gpus_per_actor > 0
        if not on_gpu:
            torch.set_num_threads(self._config.threads)
        model = AutoModelForSequenceClassification.from_pretrained(
            self._path,
            dtype=torch.bfloat16 if self._config.precision == "bf16" else torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
        )
        # Without this id a model that reads the last token cannot tell where a padded text ends.
        tokenizer = reward_tokenizer(self._path)
        given = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        model.config.pad_token_id = next((number for number in given if number is not None), 0)
        return model.to("cuda" if on_gpu else "cpu").eval()

    def score(self, turns: Sequence[Turn]) -> list[Score]:
        """Score the second text of each turn as an answer to the first."""
        return self.score_prepared(self.prepare(turns))

    def prepare(self, turns: Sequence[Turn]) -> list[Prepared]:
        """Tokenize the turns; this loads no weights."""
        if not turns:
            return []
        tokenizer = reward_tokenizer(self._path)
        # For encoders such as RoBERTa, only the tokenizer knows how many tokens fit.
        limit = min(longest_context(self._path, self._config.max_tokens), tokenizer.model_max_length)
        return [encode(tokenizer, turn, limit) for turn in turns]

    def score_prepared(self, turns: Sequence[Prepared]) -> list[Score]:
        """Score the results of `prepare`."""
        from operators.student.nll import like_length_groups

        scores = [Score(reason=turn.reason) for turn in turns]
        places = [place for place, turn in enumerate(turns) if not turn.reason]
        for group in like_length_groups([len(turns[place].given) for place in places], self._config.batch_tokens):
            members = [places[number] for number in group]
            for place, reward in zip(members, self._rewards([turns[place] for place in members]), strict=True):
                scores[place] = Score(reward=reward) if math.isfinite(reward) else Score(reason="not_finite")
        return scores

    def _rewards(self, texts: list[Prepared]) -> list[float]:
        import torch

        model, longest = self._model, max(len(text.given) for text in texts)

        def padded(rows: list[list[int]], filled: int) -> Any:
            return torch.tensor([row + [filled] * (longest - len(row)) for row in rows], device=model.device)

        read = {
            "input_ids": padded([text.given for text in texts], model.config.pad_token_id),
            "attention_mask": padded([[1] * len(text.given) for text in texts], 0),
        }
        if texts[0].alone:
            read["token_type_ids"] = padded([text.alone for text in texts], 0)
        with torch.inference_mode():
            logits = model(**read).logits
        return [float(reward) for reward in logits[:, 0].double()]


@lru_cache(maxsize=2)
def reward_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """The reward model's tokenizer, loaded once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def encode(tokenizer: "PreTrainedTokenizerBase", turn: Turn, max_tokens: int) -> Prepared:
    """Tokenize a turn for a reward model. Reasons for no score: "empty", "chat_template", "over_max_tokens"."""
    asked, answer, *_ = turn
    if not asked.strip() or not answer.strip():
        return Prepared(reason="empty")
    try:
        found = _tokens(tokenizer, turn)
    except Exception:  # noqa: BLE001 - a template is a program of its author, and may raise anything
        return Prepared(reason="chat_template")
    return found if len(found.given) <= max_tokens else Prepared(reason="over_max_tokens")


def _tokens(tokenizer: "PreTrainedTokenizerBase", turn: Turn) -> Prepared:
    asked, answer, *before = turn
    earlier: list[dict[str, str]] = json.loads(before[0]) if before else []
    if tokenizer.chat_template:
        said = [*earlier, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return Prepared(list(tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)))
    pair = tokenizer("\n\n".join([*(one["content"] for one in earlier), asked]), answer)
    return Prepared(list(pair.input_ids), list(pair.get("token_type_ids", [])))


def examine_reward_model(model: str) -> Iterator[Finding]:
    """Findings that would end the run after the teacher was paid; of the weights only the headers are read.

    Args:
        model: folder or hub id.
    """
    from transformers import AutoConfig

    yield from weight_findings(model, KEY)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        yield Finding(KEY, f"{model} has no usable config.json ({one_line(error)}); give a Hugging Face model folder")
        return
    kinds = [name for name in config.architectures or [] if "SequenceClassification" in name]
    if not kinds or config.num_labels != 1:
        named = ", ".join(config.architectures or ["no architecture"])
        yield Finding(
            KEY,
            f"{model} is {named} with {config.num_labels} labels; a reward model is a sequence-classification model "
            "with 1 label",
        )
    try:
        tokenizer = reward_tokenizer(model)
        one, other = (_tokens(tokenizer, ("Name a colour.", answer)).given for answer in ("Blue.", "A dark red."))
    except Exception as error:  # noqa: BLE001 - a template is a program of its author, and may raise anything
        words = f"{type(error).__name__}: {one_line(error)}"
        yield Finding(KEY, f"its tokenizer cannot write a dialogue ({words}); give its tokenizer's files and template")
        return
    if one == other:
        yield Finding(KEY, "its chat template leaves out the answer, so all would have one score; correct the template")
    yield from embedding_findings(tokenizer, config, {*one, *other}, KEY)
