from pathlib import Path

from app.settings import GatewaySettings


def test_tokenizer_files_are_kept_where_everything_else_is(monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", "/elsewhere")
    assert GatewaySettings().assets_dir == Path("/elsewhere/assets")
    assert GatewaySettings(cache_dir=Path("~/mine")).assets_dir == Path.home() / "mine"
