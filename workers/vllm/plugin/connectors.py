"""NIXL's two connectors under vLLM's own names, by which vLLM asks for them.

The model thread's cores are restored, the seconds and bytes of every handover noted, and there is no lease for a
finished request. The pull connector's lease ends early if nobody will come. The push connector's decode side gives up
what nobody writes.
"""

import os
import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as nixl
from vllm.v1.request import RequestStatus


def install() -> None:
    """Replaces `NixlPushConnectorWorker` where `nixl.connector.NixlPushConnector.__init__` makes one."""
    nixl.NixlPushConnectorWorker = PunctualWriter


class _Handover:
    """What both NIXL connectors need; see the module's docstring."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        # NIXL's worker pins the model thread to the last core of the node: prefill and decode would share it.
        os.sched_setaffinity(0, cores)
        self._started: dict[str, tuple[float, int]] = {}
        self._finished: list[tuple[str, float, int]] = []
        self._group_bytes = [
            group.kv_cache_spec.page_size_bytes
            * (1 if hasattr(group.kv_cache_spec, "kv_cache_specs") else len(group.layer_names))
            for group in kv_cache_config.kv_cache_groups
        ]

    def take_handovers(self) -> list[tuple[str, float, int]]:
        """(engine's request id, seconds, bytes) of the KV caches that have arrived since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        is_arriving = bool(params.get("do_remote_prefill"))
        super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[misc]
        if not is_arriving:
            return
        if not num_external_tokens:  # everything is here already
            self._finished.append((request.request_id, 0.0, 0))
            return
        groups = self.connector_scheduler._reqs_need_recv[request.request_id][1]  # type: ignore[attr-defined] # noqa: SLF001
        num_bytes = sum(len(group) * size for group, size in zip(groups, self._group_bytes, strict=False))
        self._started[request.request_id] = (time.monotonic(), num_bytes)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)  # type: ignore[misc]
        for request_id in connector_output.finished_recving or ():
            started_at, num_bytes = self._started.pop(request_id, (0.0, 0))
            if started_at:
                self._finished.append((request_id, time.monotonic() - started_at, num_bytes))

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        self._started.pop(request.request_id, None)
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode") and request.status == RequestStatus.FINISHED_STOPPED and self._may_free():
            # The first token ended the answer: nobody will come for the blocks, and their lease would pin them.
            side = self.connector_scheduler  # type: ignore[attr-defined]
            side._reqs_not_processed.add(request.request_id)  # noqa: SLF001
            side._reqs_need_save.pop(request.request_id, None)  # noqa: SLF001
            return False, None
        return super().request_finished_all_groups(request, block_ids)  # type: ignore[misc]

    def _may_free(self) -> bool:
        return True

    def shutdown(self) -> None:
        side = self.connector_scheduler  # type: ignore[attr-defined]
        if side is not None:
            # A daemon that looks at the event once a second: the end need not wait for it.
            side._stop_event.set()  # noqa: SLF001
            side._nixl_handshake_listener_t = None  # noqa: SLF001
        super().shutdown()  # type: ignore[misc]


class NixlPullConnector(_Handover, nixl.NixlPullConnector):  # type: ignore[misc]
    """vLLM's pull connector, whose prefill side can be told that nobody will fetch a KV cache.

    Scheduler and worker side are two objects, in two processes where several GPUs share the model: what is released
    goes with the metadata of a step, as vLLM's own news of leases do. A decode engine that has prolonged a lease, which
    it does while it waits, is fetching or about to: that lease is left to it.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._released: set[str] = set()
        self._expiries: dict[str, float] = {}  # of leases as they were granted

    def release(self, request_id: str) -> None:
        """Scheduler side: free a finished request's blocks."""
        self._released.add(request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        meta.headrace_released, self._released = self._released, set()
        return meta

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        super().start_load_kv(*args, **kwargs)
        leases = self.connector_worker._reqs_to_send  # noqa: SLF001
        granted = self._connector_metadata.reqs_to_send
        self._expiries.update((name, leases[name]) for name in granted if name in leases)
        self._released |= self._connector_metadata.headrace_released

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results, side = super().get_transfer_results(finished_req_ids), self.connector_worker
        for name in results.finished_sending:
            self._expiries.pop(name, None)
        for name in self._released:
            granted = self._expiries.get(name)
            if granted is not None and side._reqs_to_send.get(name) == granted:  # noqa: SLF001
                del self._expiries[name], side._reqs_to_send[name]  # noqa: SLF001
                side._reqs_to_process.discard(name)  # noqa: SLF001
                side.consumer_notification_counts_by_req.pop(name, None)
                side.expected_consumer_notifications_by_req.pop(name, None)
                results.finished_sending.add(name)
        self._released.clear()
        return results


class PunctualWriter(nixl.NixlPushConnectorWorker):  # type: ignore[misc]
    """Begins no WRITE that the decode engine may have given up (`NixlPushConnector`). Runs on vLLM's writer thread."""

    def _handle_push_reg_notif(self, notif: bytes) -> None:
        super()._handle_push_reg_notif(notif)
        for name, registration in list(self._pending_d_registrations.items()):
            if _is_late(registration):
                del self._pending_d_registrations[name]

    def _do_start_push_kv(self, request_id: str, blocks: Any, registration: dict[str, Any]) -> None:
        if not _is_late(registration):  # else its lease frees the blocks
            super()._do_start_push_kv(request_id, blocks, registration)


_WRITE_UNTIL = "headrace_write_until"


def _is_late(registration: dict[str, Any]) -> bool:
    return bool(time.time() > registration.get(_WRITE_UNTIL, 0.0))


class NixlPushConnector(_Handover, nixl.NixlPushConnector):  # type: ignore[misc]
    """vLLM's push connector, whose decode side would wait for a WRITE for ever, its blocks lost.

    | seconds since the decode engine registered | up to T   | T to 2 T                      | from 2 T on      |
    |--------------------------------------------|-----------|-------------------------------|------------------|
    | prefill engine                             | may begin | may end what it has begun     | writes no more   |
    | decode engine                              | waits     | waits; the request has failed | frees the blocks |

    T is `push_timeout_s`. The registration says until when to begin, because an idle prefill engine may leave it unread
    for long: the two clocks must agree within T, less the time that a handshake and a WRITE take.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._timeout_s = float(options["push_registration_timeout"])
        self._registered_at: dict[str, float] = {}  # oldest first

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        registration = self.connector_scheduler._push_pending_registrations.get(request.request_id)  # noqa: SLF001
        if registration is not None:
            registration[_WRITE_UNTIL] = time.time() + self._timeout_s

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        super().start_load_kv(*args, **kwargs)
        now = time.monotonic()
        self._registered_at.update(dict.fromkeys(self._connector_metadata.push_registrations, now))

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        limit = time.monotonic() - 2 * self._timeout_s
        for request_id in [name for name, registered_at in self._registered_at.items() if registered_at < limit]:
            del self._registered_at[request_id]
            self.connector_worker._failed_recv_reqs.put(request_id)  # noqa: SLF001 - vLLM's way to say so
        results = super().get_transfer_results(finished_req_ids)
        for request_id in results.finished_recving:
            self._registered_at.pop(request_id, None)
        return results

    def _may_free(self) -> bool:
        return False  # the decode engine has registered already and waits for the WRITE
