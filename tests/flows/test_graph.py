"""The constants for asset names match the graph, and the graph is built once."""

import subprocess
import sys
from pathlib import Path

from flows import graph
from flows.recycle_and_train import GRAPH

REPOSITORY = Path(__file__).resolve().parents[2]
OTHERS = ("CONFIG_KEYS", "ONLY_ROWS", "PARTITION_TAG", "STAGES")
NAMES = {value for name, value in vars(graph).items() if name.isupper() and name not in OTHERS}


def test_every_asset_has_a_constant_with_its_name() -> None:
    assert set(GRAPH.specs) == NAMES


def test_a_selection_knows_whether_it_is_made_per_refresh() -> None:
    assert GRAPH.has_refreshes([])
    assert GRAPH.has_refreshes([graph.STUDENT, graph.HELD_OUT])
    assert not GRAPH.has_refreshes([graph.STUDENT, graph.REPORT])


def test_the_command_line_builds_the_graph_once_and_without_torch() -> None:
    """As a script the module is `__main__`, so importing it by its name would build every asset a second time.

    Importing torch would add eight seconds to every `--plan`, every process of Dagster and most processes of Ray.
    """
    code = (
        "import runpy, sys; sys.argv = ['flow', '--help']\n"
        "try: runpy.run_path('flows/recycle_and_train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('flows.recycle_and_train' in sys.modules, {'torch', 'transformers', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False set()"
