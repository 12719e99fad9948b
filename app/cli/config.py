"""`headrace config`: the settings that all gateways of a namespace follow while they run
(`app/fleet/routing_config.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import msgspec
from cyclopts import Parameter

from app.fleet.routing_config import RANGES, RoutingConfig, routing_setup
from app.settings import GatewaySettings
from planes.control import Etcd, delete_config, get_config, put_config
from planes.wire.errors import HeadraceError
from planes.wire.unreadable import UNREADABLE
from process.logging import printable
from process.settings import EtcdSettings
from router.settings import ModelSlos, RouterSettings

_OF_MODELS = tuple(f"models.MODEL.{name}" for name in ModelSlos.__struct_fields__)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
NAMES = (*(name for name in RoutingConfig.__struct_fields__ if name != "models"), *_OF_MODELS)


class UnusableConfig(HeadraceError):  # noqa: N818 - names what is wrong
    """Settings that gateways would refuse."""

    code = "unusable_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSettings(EtcdSettings):
    """Where the settings are, and whether to take them away."""

    clear: Annotated[
        bool, Parameter(help="Remove all: gateways go back to what they were started with.", negative="")
    ] = False


@dataclass(frozen=True, slots=True)
class LiveSetting:
    """`otherwise`: what counts where it is not set, a value or the gateway's flag."""

    name: str
    otherwise: str
    meaning: str


def live_settings() -> Iterator[LiveSetting]:
    """All that `headrace config` can change, as the router's and the gateway's settings tell it."""
    flags = {field.name for field in fields(GatewaySettings)}
    defaults = {field.name: field.default for field in fields(RouterSettings)}
    hints = get_type_hints(GatewaySettings, include_extras=True) | get_type_hints(RouterSettings, include_extras=True)
    for name in RoutingConfig.__struct_fields__:
        if name == "models":
            continue
        told = hints[name].__metadata__[0]
        otherwise = f"--{name.replace('_', '-')}" if name in flags else str(defaults[name])
        meaning = told if isinstance(told, str) else told.help
        if name in ("policy", "shadow_policy"):
            meaning += f" Here by name; a class of your own only where {otherwise} names it."
        yield LiveSetting(name, otherwise, meaning + _range(name))
    of_model = get_type_hints(ModelSlos, include_extras=True)
    for name, full in zip(ModelSlos.__struct_fields__, _OF_MODELS, strict=True):
        yield LiveSetting(full, name, of_model[name].__metadata__[0] + _range(name))


def _range(name: str) -> str:
    if name not in RANGES:
        return ""
    least, most = RANGES[name]
    return f" Here {least:g} to {most:g}."


async def change_config(changes: tuple[str, ...], settings: ConfigSettings) -> str:
    """Make the changes, each `name=value`.

    Returns:  what etcd holds now, as JSON.  Raises:  UnusableConfig; ControlPlaneUnavailable.
    """
    etcd, namespace = Etcd(settings.etcd, security=settings.etcd_security), settings.namespace
    if settings.clear and changes:
        raise UnusableConfig(f"--clear takes no settings, and there is {changes[0]!r}")
    if settings.clear:
        await delete_config(etcd, namespace)
        return "{}"
    changed(None, changes)  # whoever misspells is told even without etcd
    content = await get_config(etcd, namespace)
    if changes:
        content = changed(content, changes)
        await put_config(etcd, namespace, content)
    return shown(content)


def shown(content: bytes | None) -> str:
    """What etcd holds, for a terminal: anybody may have written it."""
    return "{}" if content is None else printable(content.decode(errors="replace"))


def changed(content: bytes | None, changes: tuple[str, ...]) -> bytes:
    """The settings with the changes, fit for every gateway.  Raises:  UnusableConfig naming what is wrong."""
    try:
        current = RoutingConfig() if content is None else msgspec.json.decode(content, type=RoutingConfig)
    except UNREADABLE as exc:
        raise UnusableConfig(
            f"what etcd holds is refused by gateways ({exc}); headrace config --clear removes it"
        ) from exc
    named = msgspec.to_builtins(current)
    for change in changes:
        name, equals, value = change.rpartition("=")  # a model's name may have one, too
        if not equals:
            raise UnusableConfig(f"{change!r} must look like name=value, e.g. policy=dynamo")
        place, owner, field = _place(named, name)
        place.pop(field, None)
        if value != "null":
            place[field] = _converted(owner, name, field, value)
    named["models"] = {model: slos for model, slos in named.get("models", {}).items() if slos}
    if not named["models"]:
        del named["models"]
    try:
        config = msgspec.convert(named, RoutingConfig)
        routing_setup(GatewaySettings(), config)
    except ValueError as exc:
        raise UnusableConfig(str(exc)) from exc
    return msgspec.json.encode(config)


def _place(named: dict[str, Any], name: str) -> tuple[dict[str, Any], type[msgspec.Struct], str]:
    """Where a setting stands, in which struct, and its name there.  Raises:  UnusableConfig if there is none such."""
    if name in RoutingConfig.__struct_fields__ and name != "models":
        return named, RoutingConfig, name
    prefix, _, rest = name.partition(".")
    model, _, field = rest.rpartition(".")  # a model's name may have points
    if prefix != "models" or not model or field not in ModelSlos.__struct_fields__:
        raise UnusableConfig(f"{name!r} is no live setting; there are {', '.join(NAMES)}")
    return named.setdefault("models", {}).setdefault(model, {}), ModelSlos, field


def _converted(owner: type[msgspec.Struct], name: str, field: str, value: str) -> Any:
    """The value as the field's type.  Raises:  UnusableConfig."""
    try:
        return getattr(msgspec.convert({field: value}, owner, strict=False), field)
    except msgspec.ValidationError as exc:
        kinds = (words for word, words in _KINDS.items() if f"`{word} | null`" in str(exc))
        kind = next(kinds, "a smaller number")
        raise UnusableConfig(f"{name} is {value[:100]!r} and must be {kind}, or null, which takes it away") from exc
