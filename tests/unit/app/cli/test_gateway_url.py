import pytest

from app.cli.gateway_url import GatewayClient, GatewayRefused, GatewayUrlSettings
from planes.wire.errors import UnusableSetting


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", ""])
def test_a_url_that_no_gateway_has_is_refused(url):
    with pytest.raises(UnusableSetting, match="--url is"):
        GatewayUrlSettings(url=url)


def test_whom_nobody_answers_is_named_without_the_password():
    client = GatewayClient(GatewayUrlSettings(url="http://me:secret@127.0.0.1:9"))
    with pytest.raises(GatewayRefused, match=r"http://.*127\.0\.0\.1:9/v1/fleet did not answer") as caught:
        client.get("/v1/fleet")
    assert "secret" not in str(caught.value)
