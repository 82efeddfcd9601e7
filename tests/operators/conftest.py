"""Packs for the training tests: small examples in the demo model's own chat format."""

import pyarrow.parquet as pq
import pytest

from operators.student.encode import encode_example, load_tokenizer
from operators.train.pack import Document, _to_table, best_fit_decreasing


@pytest.fixture(scope="session")
def packs_file(tiny_model, tmp_path_factory):
    """A Parquet file of 24 examples in packs of 160 tokens, and one quarantined row."""
    tokenizer = load_tokenizer(tiny_model)
    texts = [(f"Count from {n} to {n + 3}.", "", " ".join(str(n + k) for k in range(4 + n % 5))) for n in range(24)]
    documents = [Document(f"r{n:03d}", encode_example(tokenizer, *text)) for n, text in enumerate(texts)]
    table = _to_table(best_fit_decreasing(documents, max_tokens=160), [("bad", "quarantined:too_long")])
    path = tmp_path_factory.mktemp("packs") / "packs.parquet"
    pq.write_table(table, path)
    return str(path)
