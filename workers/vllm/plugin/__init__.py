"""What of ours runs inside vLLM 0.32's engine process. vLLM asks for it by the names below, nobody else imports it.

| name                                     | asked for by                             | when                       |
|------------------------------------------|------------------------------------------|----------------------------|
| `BeforeLoading`                          | `WorkerWrapperBase.init_worker`          | before the model is loaded |
| `NixlPullConnector`, `NixlPushConnector` | `KVConnectorFactory.get_connector_class` | with the KV cache          |
| `Scheduler`, `AsyncScheduler`            | `SchedulerConfig.get_scheduler_cls`      | last                       |

Importing a module of this package changes nothing. Whichever name vLLM asks for first, `install` comes before it: NIXL
must be there under the name that vLLM knows before vLLM's connectors are imported, and embeddings are packed while the
model is loaded.
"""

import importlib
from typing import Any

_MODULES = {
    "BeforeLoading": "process",
    "NixlPullConnector": "connectors",
    "NixlPushConnector": "connectors",
    "Scheduler": "scheduler",
    "AsyncScheduler": "scheduler",
}


def install() -> None:
    """Put everything of ours in vLLM's places, in this process. Again is the same as once."""
    from workers.vllm.plugin import nixl, process  # noqa: PLC0415

    process.install()
    nixl.install()
    # These import vLLM's connectors and layers, which look for NIXL while they are imported.
    from workers.vllm.plugin import connectors, embeddings, grammars, resume  # noqa: PLC0415

    connectors.install()
    embeddings.install()
    resume.install()
    grammars.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        install()
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except AttributeError as exc:  # it would be taken to mean that there is no such name
        raise ImportError(f"{__name__}.{name} cannot be had with this vLLM: {exc}") from exc
