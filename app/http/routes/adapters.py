"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them, for the whole fleet."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.fleet.adapters import AdapterRefused
from app.gateway import Gateway
from app.http.admin import authenticate_admin
from app.http.body import read_body
from app.openai.decode import decode

_MAX_BODY_BYTES = 1 << 16


class LoadAdapterBody(msgspec.Struct, frozen=True):
    """base_model_name: the model that it changes; it may be left out where there is one.

    load_inplace: in the place of one that has this name.
    """

    lora_name: str
    lora_path: str
    base_model_name: str | None = None
    load_inplace: bool = False


class UnloadAdapterBody(msgspec.Struct, frozen=True):
    """Which one."""

    lora_name: str


_load = msgspec.json.Decoder(LoadAdapterBody)
_unload = msgspec.json.Decoder(UnloadAdapterBody)


def adapter_routes(gateway: Gateway) -> list[Route]:
    """Both routes."""

    async def load(request: Request) -> Response:
        """Have every worker of a model load a LoRA adapter, from a directory there. As `/metrics`: for operators."""
        authenticate_admin(gateway, request)
        asked = decode(await read_body(request, _MAX_BODY_BYTES), _load)
        if asked.lora_name in gateway.fleet.models():
            raise AdapterRefused(f"{asked.lora_name[:100]!r} is the name of a model.", param="lora_name")
        parent = asked.base_model_name or gateway.models.only()
        await gateway.adapters.load(asked.lora_name, asked.lora_path, parent, in_place=asked.load_inplace)
        return _said(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(request: Request) -> Response:
        """Serve a LoRA adapter no more; requests that run with it end as they would. As `/metrics`: for operators."""
        authenticate_admin(gateway, request)
        asked = decode(await read_body(request, _MAX_BODY_BYTES), _unload)
        await gateway.adapters.unload(asked.lora_name)
        return _said(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return [
        Route("/v1/load_lora_adapter", load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
    ]


def _said(text: str) -> Response:
    return Response(text, media_type="text/plain")
