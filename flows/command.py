"""The command `recycle-and-train`; `flows/recycle_and_train.py` does the same.

recycle-and-train [run] ...                  run the graph, see flows/launch.py
recycle-and-train browse STORAGE             show a storage in a web browser
recycle-and-train releases STORAGE           list the releases
recycle-and-train rollback STORAGE VERSION   release an earlier student again
recycle-and-train refreshes STORAGE          list the refreshes, also those that were given up
recycle-and-train retry STORAGE KEY          try a given-up refresh again
recycle-and-train metrics STORAGE            serve Prometheus metrics on 127.0.0.1
"""

from collections.abc import Sequence

from flows.graph import Graph
from flows.launch import run_flow


def command(graph: Graph, argv: Sequence[str]) -> int:
    """Run the command that the first word names, or else run the graph. Returns the exit code."""
    match list(argv):  # each command imports only what it needs
        case ["browse", *rest]:
            from flows.browse import browse

            return browse(rest)
        case ["releases", *rest]:
            from flows.releases import show_releases

            return show_releases(rest)
        case ["rollback", *rest]:
            from flows.releases import roll_back

            return roll_back(rest)
        case ["refreshes", *rest]:
            from flows.refreshes import show_refreshes

            return show_refreshes(rest)
        case ["retry", *rest]:
            from flows.refreshes import retry_refresh

            return retry_refresh(rest)
        case ["metrics", *rest]:
            from flows.metrics import serve_metrics

            return serve_metrics(rest)
        case ["run", *rest]:
            return run_flow(graph, rest)
        case rest:
            return run_flow(graph, rest)
