"""A glob matches whole paths; only `**` matches more than one folder."""

import pytest

from operators.read.globs import fixed_part, glob_pattern, is_glob


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("/a/*.json", "/a/b.json", True),
        ("/a/*.json", "/a/b/c.json", False),
        ("/a/**/*.json", "/a/b.json", True),
        ("/a/**/*.json", "/a/b/c/d.json", True),
        ("/a/[!b]?.json", "/a/c1.json", True),
        ("/a/[!b]?.json", "/a/b1.json", False),
        ("/a/x.json", "/a/xxjson", False),
    ],
)
def test_a_glob_matches_whole_paths(glob: str, path: str, matches: bool) -> None:
    assert (glob_pattern(glob).fullmatch(path) is not None) == matches


def test_the_folder_before_the_first_wildcard_is_fixed() -> None:
    assert [is_glob(path) for path in ("/a/b", "/a/*", "/a/b?", "/[ab]")] == [False, True, True, True]
    assert fixed_part("/a/b*/c.json") == "/a"
    assert fixed_part("/a/b.json") == "/a/b.json"
