"""The browse pages over a storage on disk: by a client of the application, and in a real browser."""

import io
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from flows.browse import Pages, application, browse
from operators.browse.scan import read_page
from operators.columns import RECYCLED
from operators.parquet_log import write_whole
from operators.teacher.budget import BudgetConfig
from operators.teacher.ledger import RECORD
from tests.flows.browsed_storage import SAMPLE, a_call, sample_storage, write_asset


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return sample_storage(tmp_path)


@pytest.fixture
def client(storage: Path) -> TestClient:
    prices = BudgetConfig(prompt_price=1000.0, generated_price=2000.0)
    return TestClient(application(Pages(str(storage), prices)), base_url="http://127.0.0.1")


def pages_of(client: TestClient, address: str) -> Iterator[str]:
    while address:
        html = client.get(address).text
        yield html
        address = html.split('rel="next" href="')[1].split('"')[0].replace("&amp;", "&") if 'rel="next"' in html else ""


def test_a_port_that_is_taken_is_one_line(storage: Path) -> None:
    err = io.StringIO()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert browse([str(storage), "--port", port], io.StringIO(), err) == 1
    [line] = err.getvalue().splitlines()
    assert line.startswith(f"browse: --port {port}: ")


def test_a_truncated_file_of_replies_is_named_and_breaks_no_other_page(client: TestClient, storage: Path) -> None:
    (storage / "ledger" / "reflect_instructions" / "cut.parquet").write_bytes(b"PAR1")
    found = client.get("/replies/reflect_instructions")
    assert found.status_code == 200
    assert "cannot be read and is left out: cut.parquet" in found.text
    assert "cannot be read" not in client.get("/replies/reflect_responses").text
    assert client.get("/rows/recycled_instructions?refresh=2026-11-22").status_code == 200


def test_the_overview_counts_rows_and_calls(client: TestClient) -> None:
    html = client.get("/").text
    assert "/rows/recycled_instructions?refresh=2026-11-22" in html
    assert f">{len(SAMPLE)}<" in html
    assert "/replies/reflect_instructions?failed=1" in html
    assert ">3.6<" in html, "three calls of 1000 and 100 tokens at these prices"


def test_the_pages_of_a_stage_hold_every_row_once(client: TestClient) -> None:
    whole = "".join(pages_of(client, "/rows/recycled_instructions?refresh=2026-11-22"))
    for row in SAMPLE:
        assert whole.count(f'aria-label="Row {row["row_id"]}"') == 1


def test_rows_are_filtered_by_outcome_and_searched(client: TestClient) -> None:
    address = "/rows/recycled_instructions?refresh=2026-11-22"
    for outcome in ("both", "original"):
        whole = "".join(pages_of(client, f"{address}&outcome={outcome}"))
        wanted = [row["row_id"] for row in SAMPLE if row["outcome"] == outcome]
        assert [whole.count(f'aria-label="Row {row_id}"') for row_id in wanted] == [1] * len(wanted)
        assert whole.count('aria-label="Row ') == len(wanted)
    found = client.get(address, params={"refresh": "2026-11-22", "text": SAMPLE[3]["instruction"].upper()}).text
    assert f'aria-label="Row {SAMPLE[3]["row_id"]}"' in found
    assert "No row matches." in client.get(address, params={"refresh": "2026-11-22", "text": "nowhere at all"}).text


def test_rows_are_found_by_what_became_of_the_teachers_reply(client: TestClient, storage: Path) -> None:
    rows = [dict(row) | {"instruction_reflection": "parsed", "response_reflection": "parsed"} for row in SAMPLE]
    rows[1]["instruction_reflection"], rows[2]["response_reflection"] = "rejected:no_json", "filtered:echo"
    write_asset(storage, "recycled_instructions", pa.Table.from_pylist(rows, schema=RECYCLED), "2026-11-23")
    metrics = {"unread_replies": {"no_json": 1, "cut_off": 2}}
    table = pa.Table.from_pylist(rows, schema=RECYCLED)
    write_asset(storage, "instruction_reflections", table, "2026-11-23", metrics=metrics)
    address = "/rows/recycled_instructions?refresh=2026-11-23"
    for reason, number in (("no_json", 1), ("rejected:", 1), ("filtered:", 2), ("cut_off", None)):
        for query in (f"reflection={reason}", *([f"text={reason}"] if ":" not in reason else [])):
            html = client.get(f"{address}&{query}").text
            if number is None:
                assert "No row matches." in html
            else:
                assert html.count('aria-label="Row ') == 1
                assert f'aria-label="Row {rows[number]["row_id"]}"' in html
    assert '<option value="rejected:cut_off">' in html
    assert 'name="reflection" value="cut_off"' in client.get(f"{address}&reflection=cut_off").text
    assert "No row matches." in client.get(f"{address}&reflection=no_json&outcome=nothing").text


def test_scores_have_the_name_of_the_policy_that_made_them(client: TestClient, storage: Path) -> None:
    address = "/rows/recycled_instructions?refresh=2026-11-2"
    assert "r-IFD of the rewrite" in client.get(f"{address}2").text
    made_from = {"config": {"select": {"policy": "reward"}}}
    table = pa.Table.from_pylist(SAMPLE, schema=RECYCLED)
    write_asset(storage, "recycled_instructions", table, "2026-11-23", made_from=made_from)
    html = client.get(f"{address}3").text
    assert "Reward of the rewrite" in html
    assert "IFD" not in html.split("<main")[1]


def test_a_row_with_more_calls_than_a_page_holds_says_where_they_are(client: TestClient, storage: Path) -> None:
    calls = [a_call(0, call_key=f"more{number}") for number in range(25)]
    write_whole(f"{storage}/ledger/judge", pa.Table.from_pylist(calls, schema=RECORD))
    html = client.get(f"/row/{SAMPLE[0]['row_id']}").text
    href = html.split("One page had no room or time for all of judge")[1].split('href="')[1].split('"')[0]
    assert client.get(href.replace("&amp;", "&")).text.count('aria-label="Call ') == 5


def test_a_prompt_that_one_page_has_no_time_for_is_not_called_missing(
    client: TestClient, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        prompts = pa.table({"call_key": [f"other{number}"], "messages": ["[]"]})
        write_whole(f"{storage}/prompts/reflect_instructions", prompts)
    monkeypatch.setattr("flows.browse.read_page", partial(read_page, seconds=-1))
    html = client.get("/replies/reflect_instructions?text=k2").text + client.get("/replies/reflect_instructions").text
    assert "was not found in the time of one page" in html


def test_a_row_shows_its_calls_with_prompt_and_cost(client: TestClient) -> None:
    html = client.get(f"/row/{SAMPLE[0]['row_id']}").text
    assert "Improve this" in html
    assert "cost 1.2" in html
    assert "{&#34;reply&#34;: 0}" in html
    other = client.get(f"/row/{SAMPLE[2]['row_id']}").text
    assert "The prompt of this call was not stored." in other


def test_failed_calls_are_found_with_the_endpoints_words(client: TestClient) -> None:
    html = client.get("/replies/reflect_instructions?failed=1").text
    assert "401 wrong key" in html
    assert html.count('aria-label="Call ') == 1
    assert client.get("/replies/reflect_instructions?text=wrong+KEY").text.count('aria-label="Call ') == 1


@pytest.mark.parametrize(
    "address",
    [
        "/rows/nothing",
        "/rows/student",
        "/rows/recycled_instructions?refresh=../../..",
        "/rows/..%2f..%2fledger",
        "/replies/..%2f..",
        "/replies/nothing",
        "/etc/passwd",
    ],
)
def test_an_unknown_page_or_row_is_not_found(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert "not there, or not finished yet" in answer.text


def test_pages_are_inert_and_for_this_machine_only(client: TestClient, storage: Path) -> None:
    addresses = ["/", "/rows/recycled_instructions?refresh=2026-11-22", f"/row/{SAMPLE[0]['row_id']}"]
    addresses += ["/replies/reflect_instructions", "/rows/x", "/replies/reflect_instructions?text=%3Cscript%3E"]
    for address in addresses:
        answer = client.get(address)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "<script" not in answer.text
        assert "\u202e" not in answer.text
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400, "a name that was bent to 127.0.0.1"
    assert client.post("/").status_code == 405
    before = sorted(path.stat().st_mtime_ns for path in storage.rglob("*"))
    client.get("/")
    assert sorted(path.stat().st_mtime_ns for path in storage.rglob("*")) == before


def test_a_damaged_asset_is_reported_and_the_other_pages_work(client: TestClient, storage: Path) -> None:
    [file] = (storage / "assets" / "recycled_instructions").rglob("part-0.parquet")
    file.write_bytes(b"not Parquet")
    answer = client.get("/rows/recycled_instructions?refresh=2026-11-22")
    assert answer.status_code == 503
    assert "cannot be read" in answer.text
    assert client.get("/replies/reflect_instructions").status_code == 200
    next((storage / "assets").rglob("manifest.json")).write_text("{")
    assert client.get("/").status_code == 503


def test_an_empty_storage_says_so(tmp_path: Path) -> None:
    client = TestClient(application(Pages(str(tmp_path), BudgetConfig())), base_url="http://127.0.0.1")
    html = client.get("/").text
    assert "No stage is finished yet." in html
    assert "No call was made yet." in html


def test_replies_appear_while_a_run_stores_them(client: TestClient, storage: Path) -> None:
    assert "3 stored calls" in client.get("/replies/reflect_instructions").text
    write_whole(f"{storage}/ledger/reflect_instructions", pa.Table.from_pylist([a_call(5)], schema=RECORD))
    assert "4 stored calls" in client.get("/replies/reflect_instructions").text
