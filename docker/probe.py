"""Whether what runs in this container answers: `probe.py HOST PORT PATH [https]`, for the images' HEALTHCHECK.

Exit status 1 and one line if not. It asks its own container, so it looks at no certificate.
"""

import http.client
import ssl
import sys


def main(host: str, port: str, path: str, scheme: str = "http") -> str:
    """What is wrong; nothing if all is well."""
    if scheme == "https":
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, int(port), timeout=4, context=trusting)
    else:
        connection = http.client.HTTPConnection(host, int(port), timeout=4)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        return f"{scheme}://{host}:{port}{path}: {exc or type(exc).__name__}"
    return "" if status == http.client.OK else f"{scheme}://{host}:{port}{path} answers {status}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
