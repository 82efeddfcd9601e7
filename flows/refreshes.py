"""The refreshes of a storage on the command line: lists them, and retries one that was given up.

recycle-and-train refreshes STORAGE
recycle-and-train retry STORAGE KEY
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from cluster.files import StorageError, explained
from cluster.refresh_key import require_refresh_key
from cluster.storage import AssetStore
from flows.exit_codes import DONE, FAILED, UNUSABLE
from flows.graph import RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.refresh_requests import Request, Requests
from flows.releases import existing_storage
from flows.retries import describe


def show_refreshes(argv: Sequence[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Print one line per refresh, in the order in which they were made.

    Returns 1 if a refresh was given up or the file of a request is damaged, 2 if the storage cannot be read, else 0.
    """
    parser = argparse.ArgumentParser(prog="recycle-and-train refreshes", description="List the refreshes of a storage.")
    parser.add_argument("storage", help="folder or URI of the runs' storage")
    arguments = parser.parse_args(argv)
    try:
        storage = existing_storage(arguments.storage)
        store, asked = AssetStore(storage), Requests(storage)
        requests, damaged = {request.key: request for request in asked.all()}, asked.damaged()
        made = store.refreshes(RAW_INSTRUCTIONS)
        for key in made:
            out.write(f"{_made_line(store, key)}{_request_note(requests.get(key))}\n")
        for key, request in requests.items():
            if key not in made:
                out.write(f"{key:<24}  {len(request.files):>6} files{_request_note(request)}\n")
    except (ValueError, StorageError, OSError) as error:
        err.write(f"{_line(error, arguments.storage)}\n")
        return UNUSABLE
    given_up = [request for request in requests.values() if request.given_up is not None]
    for request in given_up:
        err.write(f"{describe(request)}; `recycle-and-train retry {storage} {request.key}` tries again\n")
    err.writelines(f"{line}\n" for line in damaged)
    return FAILED if given_up or damaged else DONE


def retry_refresh(argv: Sequence[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Let the daemon retry a given-up refresh as if it had never failed; returns 2 if none of this key was given up."""
    parser = argparse.ArgumentParser(prog="recycle-and-train retry", description="Try a given-up refresh again.")
    parser.add_argument("storage", help="folder or URI of the runs' storage")
    parser.add_argument("key", help="as `recycle-and-train refreshes` lists it")
    arguments = parser.parse_args(argv)
    try:
        requests = Requests(existing_storage(arguments.storage))
        request = requests.get(require_refresh_key(arguments.key))
        if request is None or request.given_up is None:
            known = ", ".join(each.key for each in requests.all() if each.given_up is not None) or "none"
            raise ValueError(f"retry: {arguments.key}: no such refresh was given up; given up were: {known}")
        forgiven = (*request.forgiven, *request.given_up.runs)
        requests.put(request.model_copy(update={"forgiven": forgiven, "given_up": None}))
    except (ValueError, StorageError, OSError) as error:
        err.write(f"{_line(error, arguments.storage)}\n")
        return UNUSABLE
    out.write(
        f"refresh {request.key} is asked for at the daemon's next look, or make it now: --refresh {request.key}\n"
    )
    return DONE


def _line(error: Exception, storage: str) -> str:
    return (explained(error, storage) if isinstance(error, OSError) else None) or str(error)


def _made_line(store: AssetStore, key: str) -> str:
    raw, recycled = store.manifest(RAW_INSTRUCTIONS, key), store.manifest(RECYCLED_INSTRUCTIONS, key)
    rows = raw.rows if raw is not None else 0
    state = "recycled" if recycled is not None else "not recycled yet"
    files = len(raw.made_from.get("files", [])) if raw is not None else 0
    return f"{key:<24}  {files:>6} files  {rows:>9} rows  {state}"


def _request_note(request: Request | None) -> str:
    if request is None:
        return ""
    return "  GIVEN UP" if request.given_up is not None else "  asked for"
