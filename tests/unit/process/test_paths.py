from pathlib import Path

import pytest

from process.paths import UnusableCache, cache_dir, is_hub_id


def test_a_variable_moves_the_cache():
    assert cache_dir({"HEADRACE_CACHE": "/elsewhere"}) == Path("/elsewhere")
    assert cache_dir({"HEADRACE_CACHE": "~/mine"}) == Path.home() / "mine"


@pytest.mark.parametrize("environ", [{}, {"HEADRACE_CACHE": ""}])
def test_without_it_the_cache_is_in_the_home_folder(environ):
    assert cache_dir(environ) == Path.home() / ".cache" / "headrace"


def test_a_cache_that_depends_on_the_current_folder_is_refused():
    with pytest.raises(UnusableCache, match="HEADRACE_CACHE is 'run/cache': it must be an absolute path"):
        cache_dir({"HEADRACE_CACHE": "run/cache"})


def test_a_cache_in_the_home_of_nobody_is_refused():
    with pytest.raises(UnusableCache, match="HEADRACE_CACHE is '~no-such-user/c': there is no home folder"):
        cache_dir({"HEADRACE_CACHE": "~no-such-user/c"})


@pytest.mark.parametrize(
    ("model", "is_id"),
    [
        ("org/name", True),
        ("Org-1/na.me_2", True),
        ("/org/name", False),
        ("./org", False),
        ("a/b/c", False),
        ("a", False),
    ],
)
def test_ids_have_an_organisation_and_a_name(model, is_id):
    assert is_hub_id(model) is is_id


def test_a_directory_goes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("org/name")
