import msgspec
import pytest

from planes.adapters import read_adapter
from planes.wire.messages import Adapter


def test_what_stands_in_etcd_is_read():
    adapter = Adapter("poet", "sim", "/adapters/poet", 7, 1)
    assert read_adapter("poet", msgspec.json.encode(adapter)) == adapter


@pytest.mark.parametrize("value", [None, b"", b"{}", b"\xff\xfe", b'{"name": 1}'])
def test_what_is_none_is_none(value):
    assert read_adapter("poet", value) is None
