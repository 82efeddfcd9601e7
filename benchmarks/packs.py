"""Packs for the benchmarks of training: documents of about one length from our own text, encoded as a run would."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from operators.student.encode import encode_example
from operators.train.pack import Document, _to_table, best_fit_decreasing

WORDS = Path(__file__).with_name("training.py").read_text().split()[:200]


def write_packs(tokenizer: Any, path: str, *, count: int, tokens: int, document: int) -> str:
    """Write `count` packs of at most `tokens` tokens, of documents of about `document` tokens; returns `path`."""
    documents = []
    for number in range(count * tokens // document):
        words = max(8, document - 40 + number * 13 % 40)
        answer = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(words))
        documents.append(Document(f"r{number}", encode_example(tokenizer, f"Tell story {number}.", "", answer)))
    fitting = [document for document in documents if len(document) <= tokens]
    pq.write_table(_to_table(best_fit_decreasing(fitting, tokens)[:count], []), path)
    return path
