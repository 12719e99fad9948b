"""Traces as a collector gets them: a server that takes OTLP over HTTP."""

import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.integration.conftest import poll_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps every span that comes, with its resource."""

    def __init__(self):
        self.spans = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                    resource = {a.key: a.value.string_value for a in each.resource.attributes}
                    for scope in each.scope_spans:
                        collector.spans += [(span, resource, self.path) for span in scope.spans]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_): ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


async def test_one_tree_a_request_with_the_spans_of_two_workers(site, reach, unique, collector):
    await site.worker("prefill-1")
    await site.worker("decode-1")
    gateway = await site.gateway("--otlp-endpoint", collector.url, num_workers=2)
    async with reach(gateway) as api:
        asked = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-headrace-handover": "always"}
        answer = await api.chat(unique, headers=asked)
        assert answer.status_code == 200
        other = await api.chat(unique + "!", headers={"x-headrace-handover": "never"})
        unsampled = await api.chat(unique + "?", headers={"traceparent": f"00-{TRACE[::-1]}-{PARENT}-00"})
        assert (other.status_code, unsampled.status_code) == (200, 200)
    line = await gateway.process.says(f"trace_id={TRACE}")
    assert answer.headers["x-request-id"] in line
    gateway.process.send(signal.SIGTERM)
    assert await gateway.process.ended() == 0, "and what waited has been sent"
    await poll_until(lambda: len(collector.spans) >= 12, "all spans are there")
    trees = {}
    for span, resource, path in collector.spans:
        assert (resource["service.name"], path) == ("headrace-gateway", "/v1/traces")
        trees.setdefault(span.trace_id.hex(), []).append(span)
    assert len(trees) == 2, "one for each request that is sampled"
    tree = trees.pop(TRACE)
    roots = [span for span in tree if span.parent_span_id.hex() == PARENT]
    assert [root.name for root in roots] == ["chat sim"]
    children = [span for span in tree if span.parent_span_id == roots[0].span_id]
    assert len(children) == len(tree) - 1
    ordered = sorted(children, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    assert [span.name for span in ordered] == [
        "prepare",
        "queue",
        "wait prefill-1",
        "prefill prefill-1",
        "handover prefill-1 → decode-1",
        "decode decode-1",
    ]
    assert all(roots[0].start_time_unix_nano <= span.start_time_unix_nano for span in tree)
    assert all(span.end_time_unix_nano <= roots[0].end_time_unix_nano for span in tree)
    ((_, alone),) = trees.items()
    assert [span.parent_span_id for span in alone].count(b"") == 1
    assert not any("handover" in span.name for span in alone)


async def test_a_collector_that_is_away_costs_no_answer(site, reach, unique):
    await site.worker("decode-1")
    gateway = await site.gateway("--otlp-endpoint", "http://127.0.0.1:9", num_workers=1)
    async with reach(gateway) as api:
        assert (await api.chat(unique)).status_code == 200
    gateway.process.send(signal.SIGTERM)
    assert await gateway.process.ended() == 0
