"""Finds what `--refresh new` makes: new files as a refresh of their own, and refreshes that are not finished yet."""

from typing import TextIO

from flows.config import ConfigError
from flows.graph import RAW_INSTRUCTIONS
from flows.retries import describe, is_broken_off, is_pointless
from flows.run import Run, open_run
from flows.schedules import refresh_key, request_new_files

NEW = "new"  # the value of --refresh


def new_refreshes(run: Run, out: TextIO, *, writes: bool) -> list[str]:
    """Keys of the refreshes to make now, unfinished ones first. If there is none, the reason is printed.

    New files get the key that the daemon would give them. With `writes` they are asked for first, as the daemon does:
    a run that fails is continued by the next one, and no other refresh takes its files.

    Raises:
        ConfigError: the source has no file, and never had one.
    """
    look = open_run(run.config, run.specs, run.config.schedule.settle_seconds)
    known = look.store.refreshes(RAW_INSTRUCTIONS)
    try:
        files = look.staleness.files.files_of(None)
    except ValueError as error:
        if not known:
            raise ConfigError(str(error)) from None
        files = []
    troubles = look.requests.damaged()
    reason = request_new_files(look, troubles) if writes else "no file that no refresh has taken"
    out.writelines(f"warning: {trouble}\n" for trouble in troubles)
    requests = [request for request in look.requests.all() if not is_pointless(look, request)]
    for request in look.requests.all() if writes else ():
        if request not in requests:
            look.requests.remove(request.key)
    out.writelines(f"warning: {describe(request)}\n" for request in requests if request.given_up is not None)
    given_up = {request.key for request in requests if request.given_up is not None}
    broken_off = [key for key in known if is_broken_off(look.store, key)]
    asked_for = [request.key for request in sorted(requests, key=lambda each: (bool(each.files), each.key))]
    planned = [refresh_key(files)] if files and not writes else []
    found = [key for key in dict.fromkeys([*broken_off, *asked_for, *planned]) if key not in given_up]
    if not found:
        out.write(f"nothing to do: {reason}\n")
    return found
