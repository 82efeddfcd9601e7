"""Packs for the benchmarks of training: from our own text or from Alpaca records, encoded as a run would."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from operators.student.encode import Encoded, encode_example
from operators.train.pack import Document, _to_table, best_fit_decreasing

WORDS = Path(__file__).with_name("training.py").read_text().split()[:200]


def write_packs(tokenizer: Any, path: str, *, count: int, tokens: int, document: int, vocabulary: int = 1 << 31) -> str:
    """Write `count` packs of at most `tokens` tokens, of documents of about `document` tokens; returns `path`.

    Token ids are taken modulo `vocabulary`, for a random model with a smaller one.
    """
    documents = []
    for number in range(count * tokens // document):
        words = max(8, document - 40 + number * 13 % 40)
        answer = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(words))
        encoded = encode_example(tokenizer, f"Tell story {number}.", "", answer)
        small = ([one % vocabulary if one >= 0 else one for one in ids] for ids in (encoded.input_ids, encoded.labels))
        documents.append(Document(f"r{number}", Encoded(*small)))
    return _write(documents, path, count, tokens)


def write_alpaca_packs(tokenizer: Any, path: str, *, count: int, tokens: int, file: str) -> str:
    """The same of the first records of a file in Alpaca's layout, whose documents have the lengths of real ones."""
    documents: list[Document] = []
    for number, record in enumerate(json.loads(Path(file).read_text())):
        texts = (record["instruction"], record.get("input", ""), record["output"])
        document = Document(f"r{number}", encode_example(tokenizer, *texts))
        if len(document) <= tokens:
            documents.append(document)
        if sum(map(len, documents)) >= count * tokens:
            break
    return _write(documents, path, count, tokens)


def _write(documents: list[Document], path: str, count: int, tokens: int) -> str:
    fitting = [document for document in documents if len(document) <= tokens]
    pq.write_table(_to_table(best_fit_decreasing(fitting, tokens)[:count], []), path)
    return path
