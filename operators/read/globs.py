"""Globs in paths: `*`, `?`, `[...]` and `**`, on any file system."""

import re


def is_glob(path: str) -> bool:
    """Whether a path has a wildcard."""
    return re.search(r"[*?\[]", path) is not None


def fixed_part(path: str) -> str:
    """The folder before the first wildcard; `path` itself if it has none."""
    match = re.search(r"[*?\[]", path)
    return path if match is None else path[: match.start()].rpartition("/")[0]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The glob as a pattern: `**/` matches any number of folders, `*` and `?` match within one name."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(part) or (part.replace("[!", "[^", 1) if part.startswith("[") else re.escape(part))
            for part in parts
        )
    )
