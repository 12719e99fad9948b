import pytest

from workers.engine.base import EngineStartError
from workers.vllm.config import check_library


def test_a_missing_library_is_named_with_the_package_that_has_it():
    check_library("libc.so.6", package="libc6")
    with pytest.raises(EngineStartError, match=r"needs libmill\.so\.1: apt-get install libmill1"):
        check_library("libmill.so.1", package="libmill1")
