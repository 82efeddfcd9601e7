"""Small tests work as large inputs do: windows move in small steps, and no call takes all tiles or tokens."""

import pytest


@pytest.fixture
def small_steps(monkeypatch):
    """A window that moves every 16 queries, tiles of 16 queries, a few tiles a call, 64 tokens hashed at a time."""
    monkeypatch.setattr("kernels.hyper_attention.plan.causal_local._STEP", 16)
    monkeypatch.setattr("kernels.hyper_attention.plan.tiles.TILE", 16)
    monkeypatch.setattr("kernels.hyper_attention.plan.lsh._PIECE", 64)
    for path in ("band", "level", "lookback"):
        monkeypatch.setattr(f"kernels.hyper_attention.cpu.{path}._CACHED_ROWS", 128)
