"""The Jinja environment of every HTML page: all text is escaped, and a missing value is an error."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from operators.report.texts import count, decimal, duration, share, short, signed, visible, word_diff, words

HERE = Path(__file__).parent  # its templates, style sheet and macros serve every page
FILTERS = (count, decimal, duration, share, short, signed, visible, words)


def page_environment(folders: Sequence[Path] = ()) -> Environment:
    """An environment with the templates of these folders, then the report's, and filters that show values as text."""
    environment = Environment(
        loader=FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in FILTERS}
    environment.globals["word_diff"] = word_diff
    return environment
