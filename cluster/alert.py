"""Alerts people when they must act: by a POST to a webhook, a command, or both."""

import http.client
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

TIMEOUT_S = 15.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without the message, and count as delivered."""

    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect, so that the response counts as an error."""


def send_alert(message: Mapping[str, Any], url_env: str, command: Sequence[str]) -> list[str]:
    """Deliver a message as JSON to each configured destination; it is no error if none is configured.

    Args:
        message: plain JSON; chat services show the key `text`.
        url_env: environment variable with the URL of a webhook; the URL may be a secret and is never shown.
        command: a program and its arguments; it gets the message on standard input.

    Returns:
        One line for each failed delivery, with the reason.
    """
    text = json.dumps(message)
    errors = []
    if url := os.environ.get(url_env, ""):
        errors += _post(url, text, url_env)
    if command:
        errors += _run(command, text)
    return errors


def _post(url: str, text: str, url_env: str) -> list[str]:
    if not url.startswith(("http://", "https://")):
        return [f"${url_env} holds no http or https URL"]
    try:
        request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json"})  # noqa: S310 - see above
        with urllib.request.build_opener(_NoRedirect()).open(request, timeout=TIMEOUT_S):
            return []
    except urllib.error.HTTPError as error:
        return [f"the webhook of ${url_env} answered {error.code}"]
    except (OSError, ValueError, http.client.HTTPException) as error:  # its text may contain the URL
        return [f"the webhook of ${url_env} cannot be reached: {type(error).__name__}"]


def _run(command: Sequence[str], text: str) -> list[str]:
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own command
            list(command),
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return [f"schedule.alert_command: {command[0]}: {type(error).__name__}"]
    return [] if done.returncode == 0 else [f"schedule.alert_command: {command[0]} ended with {done.returncode}"]
