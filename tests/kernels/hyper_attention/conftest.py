"""Make small inputs take the paths of large ones: windows move in small steps, and work is split into several calls."""

import pytest


@pytest.fixture
def small_steps(monkeypatch):
    """Move windows every 16 queries, in tiles of 16 queries, a few tiles per call, and hash 64 tokens at a time."""
    monkeypatch.setattr("kernels.hyper_attention.plan.causal_local._STEP", 16)
    monkeypatch.setattr("kernels.hyper_attention.plan.tiles.TILE", 16)
    monkeypatch.setattr("kernels.hyper_attention.plan.lsh._PIECE", 64)
    for path in ("band", "level", "lookback"):
        monkeypatch.setattr(f"kernels.hyper_attention.cpu.{path}._CACHED_ROWS", 128)
