"""A local web page that shows a storage, also during a run: `recycle-and-train browse STORAGE`.

It shows the rows of every finished stage and the teacher's raw replies, page by page, with filters and a search. It is
read only, listens on 127.0.0.1 only, and uses no scripts. A request reads only what its page shows.
"""

import argparse
import json
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, urlencode

import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn
from pyarrow import fs
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from cluster.files import StorageError
from cluster.manifest import Manifest
from cluster.runtime import anchor
from cluster.storage import AssetStore
from flows.config import ConfigError, load_config
from flows.exit_codes import DONE, FAILED, UNUSABLE
from flows.graph import (
    EVALUATION,
    HELD_OUT,
    INSTRUCTION_REFLECTIONS,
    PACKED_SEQUENCES,
    PUBLISHED_DATASET,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    RELEASE,
    RESPONSE_REFLECTIONS,
    SELECTED_INSTRUCTIONS,
    STUDENT,
)
from flows.run import PROMPTS
from operators.browse.scan import Cursor, Page, Wanted, read_page
from operators.browse.views import (
    ACTIVE_NAME,
    KINDS,
    REFLECTIONS,
    REPLIES_SEARCHED,
    REPLY_COLUMNS,
    SEARCHED,
    UNSHOWN,
    choices,
    navigation,
    policy_of,
    render,
    reply_view,
    row_view,
)
from operators.evaluate.judge import ORDERS
from operators.files.atomic import open_filesystem
from operators.parquet_log import ParquetLog
from operators.reflect.reflect import UNREAD_REPLIES
from operators.report.costs import stage_costs
from operators.teacher.budget import BudgetConfig, Tokens

TABLES = (
    *(RAW_INSTRUCTIONS, HELD_OUT, INSTRUCTION_REFLECTIONS, SELECTED_INSTRUCTIONS, RESPONSE_REFLECTIONS),
    *(RECYCLED_INSTRUCTIONS, PACKED_SEQUENCES),
)
REFLECTED = (INSTRUCTION_REFLECTIONS, RESPONSE_REFLECTIONS)
VALUES = (PUBLISHED_DATASET, STUDENT, EVALUATION, RELEASE)

ROWS_PER_PAGE, REPLIES_PER_PAGE = 20, 20
HOSTS = ["127.0.0.1", "localhost"]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def browse(argv: Sequence[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Serve the pages until Ctrl-C; 1 if the port is taken, 2 if the storage or the configuration cannot be used."""
    parser = argparse.ArgumentParser(prog="recycle-and-train browse", description="Show a storage, read only.")
    parser.add_argument("storage", nargs="?", help="folder or URI; without it, --config names the storage")
    parser.add_argument("--config", type=Path, help="YAML file of the run; its prices give the cost of every call")
    parser.add_argument("--port", type=int, default=8321, help="on 127.0.0.1 (%(default)s); 0 takes a free one")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, []) if arguments.config else None
        storage = arguments.storage or (config.storage if config else "")
        if not storage:
            raise ConfigError("browse: name a storage, or a configuration with --config")
        pages = Pages(anchor(storage), config.budget if config else BudgetConfig())
        if not pages.exists():
            raise ConfigError(f"browse: {pages.storage}: no such storage; a run creates it")
    except (ConfigError, ValueError, OSError) as error:
        err.write(f"{error}\n")
        return UNUSABLE
    server = uvicorn.Server(uvicorn.Config(application(pages), port=arguments.port, log_level="warning"))
    try:
        listening = socket.create_server(("127.0.0.1", arguments.port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        err.write(f"browse: --port {arguments.port}: {why}; give another port, or 0 for a free one\n")
        return FAILED
    out.write(f"http://127.0.0.1:{listening.getsockname()[1]}\nCtrl-C ends it\n")
    out.flush()
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    return DONE


class Pages:
    """The pages of one storage as HTML; each call reads what its page shows, and keeps nothing."""

    def __init__(self, storage: str, prices: BudgetConfig) -> None:
        """Open an absolute path or a URI."""
        self.storage, self._prices = storage, prices
        self._store = AssetStore(storage)
        self._filesystem, self._root = open_filesystem(storage)
        self._ledger, self._prompts = ParquetLog(f"{storage}/ledger"), ParquetLog(f"{storage}/{PROMPTS}")

    def exists(self) -> bool:
        """Whether the storage has anything to show."""
        return bool(self._filesystem.get_file_info(self._root).type == fs.FileType.Directory)

    def overview(self) -> str:
        """The first page: tables by stage and refresh, stored calls by stage, results."""
        tables = [self._table_line(name, refresh, manifest) for name, refresh, manifest in self._tables()]
        values = {
            name: json.dumps(manifest.value, indent=1, ensure_ascii=False)
            for name in VALUES
            if (manifest := self._store.manifest(name)) and manifest.value is not None
        }
        costs = stage_costs(self._ledger, self._prices)
        return self._render("overview.html.j2", title="Storage", tables=tables, costs=costs, values=values)

    def rows(self, name: str, query: Mapping[str, str]) -> str | None:
        """A page of rows of a finished stage, else None. The query has refresh, outcome, reflection, text, at."""
        names = ("refresh", "outcome", "reflection", "text")
        refresh, outcome, reflection, text = (query.get(name, "") for name in names)
        known = name in TABLES and refresh in ("", *self._store.refreshes(name))
        manifest = self._store.manifest(name, refresh or None) if known else None
        if manifest is None or not manifest.files:
            return None
        equal = {"outcome": "" if outcome == ACTIVE_NAME else outcome} if outcome else {}
        wanted = Wanted(equal, (), text, SEARCHED, (reflection, REFLECTIONS), manifest.groups)
        files, columns = self._files(name, refresh or None, manifest)
        policy = self._policy(name, refresh)
        page = self._page(files, columns, wanted, query, ROWS_PER_PAGE)
        return self._render(
            "rows.html.j2",
            title=name.replace("_", " ").capitalize(),
            refresh=refresh,
            outcome=outcome,
            text=text,
            total=manifest.rows,
            choices=choices(manifest.outcomes),
            reflection=reflection,
            reasons=self._reasons(refresh) if set(REFLECTIONS) & set(columns) else [],
            rows=[row_view(row, policy) for row in page.rows],
            **navigation(f"/rows/{quote(name)}", page, query),
        )

    def replies(self, stage: str, query: Mapping[str, str]) -> str | None:
        """A page of stored calls of a stage; None if there are none. The query has failed, text, at."""
        if stage not in self._ledger.stages():
            return None
        wanted = Wanted({}, ("error",) if query.get("failed") else (), query.get("text", ""), REPLIES_SEARCHED)
        page = self._page(self._ledger.of(stage), REPLY_COLUMNS, wanted, query, REPLIES_PER_PAGE)
        return self._render(
            "replies.html.j2",
            title=f"Replies: {stage.replace('_', ' ')}",
            failed=query.get("failed", ""),
            text=query.get("text", ""),
            total=self._ledger.count(stage),
            cut_off=self._ledger.cut_off(stage),
            replies=self._with_prompts(stage, page.rows),
            **navigation(f"/replies/{quote(stage)}", page, query),
        )

    def row(self, row_id: str) -> str:
        """One row at every stage, and all calls that were made about it."""
        stages, out_of_time = [], False
        for name, refresh, manifest in self._tables():
            files, columns = self._files(name, refresh or None, manifest)
            page = self._page(files, columns, Wanted({"row_id": row_id}, groups=manifest.groups), {}, 1)
            out_of_time |= page.out_of_time and not page.rows
            policy = self._policy(name, refresh) if page.rows else ""
            stages += [{"name": name, "refresh": refresh, "row": row_view(row, policy)} for row in page.rows]
        replies, more = [], []
        about = frozenset({row_id, *(f"{row_id}:{order}" for order in ORDERS)})
        for stage in sorted(self._ledger.stages()):
            page = self._page(self._ledger.of(stage), REPLY_COLUMNS, Wanted({"row_id": about}), {}, REPLIES_PER_PAGE)
            replies += [(stage, reply) for reply in self._with_prompts(stage, page.rows)]
            if page.following:
                more.append((stage, f"/replies/{quote(stage)}?{urlencode({'text': row_id, 'at': page.following})}"))
        found = {"stages": stages, "replies": replies, "more": more, "out_of_time": out_of_time}
        return self._render("row.html.j2", title=f"Row {row_id}", **found)

    def missing(self, message: str) -> str:
        """A page that says what is missing."""
        return self._render("missing.html.j2", title="Not found", message=message)

    def _render(self, template: str, **values: Any) -> str:
        return render(template, storage=self.storage, **values)

    def _tables(self) -> Iterator[tuple[str, str, Manifest]]:
        for name in TABLES:
            for refresh in (*self._store.refreshes(name), None):
                manifest = self._store.manifest(name, refresh)
                if manifest is not None and manifest.files:
                    yield name, refresh or "", manifest

    def _files(self, name: str, refresh: str | None, manifest: Manifest) -> tuple[list[str], list[str]]:
        files = sorted(manifest.paths(self._store.folder(name, refresh)))
        schema = pq.read_schema(files[0], filesystem=self._filesystem)
        return files, [column for column in schema.names if column not in UNSHOWN]

    def _page(
        self, files: Sequence[str], columns: Sequence[str], wanted: Wanted, query: Mapping[str, str], limit: int
    ) -> Page:
        return read_page(self._filesystem, files, columns, wanted, Cursor.parse(query.get("at", "")), limit)

    def _table_line(self, name: str, refresh: str, manifest: Manifest) -> dict[str, Any]:
        address = f"/rows/{quote(name)}"
        about = {"refresh": refresh} if refresh else {}
        outcomes = [
            (outcome, number, f"{address}?{urlencode({**about, 'outcome': outcome or ACTIVE_NAME})}")
            for outcome, number in manifest.outcomes.items()
        ]
        href = f"{address}?{urlencode(about)}" if about else address
        return {"name": name, "refresh": refresh, "rows": manifest.rows, "outcomes": outcomes, "href": href}

    def _with_prompts(self, stage: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if not records:
            return []
        keys = frozenset(str(record["call_key"]) for record in records)
        found = self._page(self._prompts.of(stage), ("call_key", "messages"), Wanted({"call_key": keys}), {}, len(keys))
        prompts = {row["call_key"]: row["messages"] for row in found.rows}
        late = found.out_of_time
        return [reply_view(one, prompts.get(one["call_key"]), self._cost(one), out_of_time=late) for one in records]

    def _policy(self, name: str, refresh: str) -> str:
        """The `select.policy` that made the scores of a stage: the responses' own, else that of the instructions."""
        scored = RECYCLED_INSTRUCTIONS if name == RECYCLED_INSTRUCTIONS else SELECTED_INSTRUCTIONS
        manifest = self._store.manifest(scored, refresh or None)
        return policy_of(manifest.made_from) if manifest else ""

    def _reasons(self, refresh: str) -> list[str]:
        """What the filter of reflections offers: its kinds, and the reasons that the manifests count."""
        manifests = [self._store.manifest(name, refresh or None) for name in REFLECTED]
        counts = [manifest.metrics.get(UNREAD_REPLIES) for manifest in manifests if manifest]
        reasons = {f"rejected:{reason}" for count in counts if isinstance(count, dict) for reason in count}
        return [*KINDS, *sorted(reasons)]

    def _cost(self, record: Mapping[str, Any]) -> float | None:
        used = Tokens(record["prompt_tokens"] or 0, record["generated_tokens"] or 0)
        return self._prices.cost(used) or None


def application(pages: Pages) -> Starlette:
    """The web application: five pages, all by GET, for this machine's own names only."""

    def answer(make: Callable[[Request], str | None]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                found = await run_in_threadpool(make, request)
            except (StorageError, OSError, pa.ArrowException) as error:  # damaged, or replaced while it was read
                return HTMLResponse(pages.missing(f"{request.url.path}: cannot be read: {error}"), 503, HEADERS)
            text = pages.missing(f"{request.url.path}: not there, or not finished yet") if found is None else found
            return HTMLResponse(text, 404 if found is None else 200, HEADERS)

        return endpoint

    routes = [
        Route("/", answer(lambda _: pages.overview())),
        Route("/rows/{name}", answer(lambda request: pages.rows(request.path_params["name"], request.query_params))),
        Route("/row/{row_id:path}", answer(lambda request: pages.row(request.path_params["row_id"]))),
        Route(
            "/replies/{stage}",
            answer(lambda request: pages.replies(request.path_params["stage"], request.query_params)),
        ),
        Route("/{path:path}", answer(lambda _: None)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])
