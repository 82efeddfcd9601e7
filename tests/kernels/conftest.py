"""Windows of small tests move in small steps."""

import pytest


@pytest.fixture
def small_steps(monkeypatch):
    """A window that moves every 16 queries instead of every 256."""
    monkeypatch.setattr("kernels.hyper_attention.plan_local._STEP", 16)
