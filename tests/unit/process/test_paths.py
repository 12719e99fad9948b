from pathlib import Path

import pytest

from process.paths import UnusableCache, cache_dir


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
