"""Keys of refreshes: none can leave the storage, and each is refused with the pattern."""

from pathlib import Path

import pytest

from cluster.refresh_key import require_refresh_key
from cluster.storage import AssetStore, Recipe


@pytest.mark.parametrize("key", ["", ".", "..", "../../x", "2026/11/26", "/tmp/x", "a b", ".hidden", "a\n", "a" * 101])
def test_a_refresh_key_that_could_leave_the_storage_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=r"refresh: .* is not a key; give a letter or digit"):
        require_refresh_key(key)
    with pytest.raises(ValueError, match="is not a key"):
        AssetStore(str(tmp_path)).make("source", key, Recipe(dict), {})
    assert not [*tmp_path.iterdir()]


def test_a_date_and_a_date_with_a_digest_are_keys() -> None:
    assert [require_refresh_key(key) for key in ("2026-11-26", "base", "2026-11-26-0a1b")]
