"""Tells people once what keeps the daemon from looking: a source out of reach, a damaged file of the storage."""

import re
from collections.abc import Sequence

import dagster as dg

from cluster.alert import send_alert
from cluster.files import explained
from flows.run import Run
from operators.redact import without_credentials

KEY = "recycle/troubles/"  # of Dagster's key-value store, before the storage: what people were told last
_REQUEST_ID = re.compile(r"[0-9A-Z]{12,}")  # in the messages of object stores, another one each time


def words_of_trouble(error: Exception, place: str) -> str:
    """An error in one line."""
    known = explained(error, place) if isinstance(error, OSError) else None
    return str(without_credentials(" ".join((known or str(error)).split())))


def alert_once(instance: dg.DagsterInstance, run: Run, troubles: Sequence[str]) -> None:
    """Send one alert when the troubles are others than at the last look; try again until it is delivered.

    Args:
        instance: remembers what was told, also when the daemon starts again.
        run: names the storage, and where alerts go.
        troubles: one line each; none forgets what was told, so that the next trouble is told again.
    """
    key, told = f"{KEY}{run.config.storage}", "; ".join(sorted(set(troubles)))
    now, store = _REQUEST_ID.sub("", told), instance.daemon_cursor_storage
    if now == store.get_cursor_values({key}).get(key, ""):
        return
    message = {
        "text": f"refreshes of {run.config.storage} wait: {told}",
        "name": run.config.name,
        "storage": run.config.storage,
        "reason": told,
    }
    schedule = run.config.schedule
    if not told or not send_alert(message, schedule.alert_url_env, schedule.alert_command):
        store.set_cursor_values({key: now})
