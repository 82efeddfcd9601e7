"""A storage to browse, for tests."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.manifest import Manifest
from operators.columns import RECYCLED
from operators.parquet_log import write_whole
from operators.teacher.ledger import RECORD

SAMPLE = json.loads((Path(__file__).resolve().parents[1] / "data" / "report_sample.json").read_text())["rows"]
ATTACK = "<script>alert(1)</script></style>\u202e"


def write_asset(storage: Path, name: str, rows: pa.Table, refresh: str | None, **more: Any) -> None:
    folder = storage / "assets" / name / (f"refresh={refresh}" if refresh else "")
    folder.mkdir(parents=True)
    for part, start in enumerate(range(0, rows.num_rows, 10)):
        pq.write_table(rows.slice(start, 10), folder / f"part-{part}.parquet")
    outcomes = {item["values"]: item["counts"] for item in rows["outcome"].value_counts().to_pylist()}
    files = {path.name: path.stat().st_size for path in folder.glob("*.parquet")}
    about = {"made_from": {}, "rows": rows.num_rows, "outcomes": outcomes, "files": files, "refresh": refresh}
    manifest = Manifest.model_validate({"asset": name, "fingerprint": "x", **about, **more})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "_SUCCESS").touch()


def a_call(number: int, **columns: Any) -> dict[str, Any]:
    call = {
        "call_key": f"k{number}",
        "row_id": SAMPLE[number]["row_id"],
        "reply": f'{{"reply": {number}}}',
        "error": "",
    }
    tokens = {"finish_reason": "stop", "prompt_tokens": 1000, "generated_tokens": 100}
    return call | tokens | {"stage": "reflect", "model": "big", "created": "2026-11-26T00:00:00"} | columns


def sample_storage(tmp_path: Path) -> Path:
    """A storage with recycled rows, replies and prompts; some of its texts attack the page."""
    root = tmp_path / "storage"
    rows = [dict(row) for row in SAMPLE]
    rows[0] = rows[0] | {"instruction": ATTACK, "instruction_critique": json.dumps({ATTACK: ATTACK})}
    write_asset(root, "recycled_instructions", pa.Table.from_pylist(rows, schema=RECYCLED), "2026-11-22")
    calls = [a_call(0), a_call(1, reply=None, error=f"401 wrong key {ATTACK}"), a_call(2)]
    write_whole(f"{root}/ledger/reflect_instructions", pa.Table.from_pylist(calls, schema=RECORD))
    messages = json.dumps([{"role": "user", "content": f"Improve this {ATTACK}"}])
    prompts = pa.table({"call_key": ["k0", "k9"], "messages": [messages, "[]"]})
    write_whole(f"{root}/prompts/reflect_instructions", prompts)
    return root
