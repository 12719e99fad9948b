from pathlib import Path

from process.paths import cache_dir


def test_a_variable_moves_the_cache(monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", "/elsewhere")
    assert cache_dir() == Path("/elsewhere")
    monkeypatch.delenv("HEADRACE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "headrace"
