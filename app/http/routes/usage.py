"""`GET /v1/usage`: what keys have used, by day and model."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, date, datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.gateway import Gateway
from app.http.admin import authenticate
from app.http.routes.replies import json_reply
from app.keys.usage import UsageLine
from planes.control import ControlPlaneUnavailable
from planes.wire.errors import InvalidRequest, Rejected

_MOST_DAYS: Final = 366
_DEFAULT_DAYS: Final = 31


class UsageUnavailable(Rejected):
    """Usage is in etcd, which does not answer."""

    code = "usage_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "Usage is kept in etcd, which does not answer; nothing of it is lost, ask again later.", retry_after_s=5.0
        )


def usage_routes(gateway: Gateway) -> list[Route]:
    """The route of one gateway."""

    async def usage(request: Request) -> Response:
        """What your key has used, by day of UTC and model; an admin's key, and `--admin-port`: all keys."""
        tenant = authenticate(gateway, request)
        first, last = _days(request, datetime.fromtimestamp(gateway.wall_clock(), UTC).date())
        account = request.query_params.get("key") if tenant.is_admin else tenant.account
        try:
            lines = await gateway.usage.lines(first, last, account)
        except ControlPlaneUnavailable as exc:
            raise UsageUnavailable from exc
        if _is_csv(request):
            return Response(_csv(lines), media_type="text/csv")
        told = {"object": "list", "start": first.isoformat(), "end": last.isoformat()}
        return json_reply({**told, "data": [asdict(line) for line in lines]})

    return [Route("/v1/usage", usage)]


def _days(request: Request, today: date) -> tuple[date, date]:
    """Raises:  InvalidRequest."""
    last = _day(request, "end", today)
    first = _day(request, "start", last - timedelta(days=_DEFAULT_DAYS - 1))
    if not 0 <= (last - first).days < _MOST_DAYS:
        raise InvalidRequest(
            f"Invalid 'start': from {first} to {last} are {(last - first).days + 1} days, not 1 to {_MOST_DAYS}.",
            param="start",
        )
    return first, last


def _day(request: Request, name: str, default: date) -> date:
    value = request.query_params.get(name)
    if value is None:
        return default
    try:
        day = date.fromisoformat(value)
    except ValueError as exc:
        raise InvalidRequest(f"Invalid '{name}': {value[:100]!r} is no day such as 2027-01-31.", param=name) from exc
    if day.year < 1970 or day.year > 9990:
        raise InvalidRequest(f"Invalid '{name}': {value[:100]!r} is out of range.", param=name)
    return day


def _is_csv(request: Request) -> bool:
    wanted = request.query_params.get("format")
    if wanted not in (None, "csv", "json"):
        raise InvalidRequest(f"Invalid 'format': {wanted[:100]!r} is not one of csv, json.", param="format")
    return wanted == "csv" or (wanted is None and request.headers.get("accept", "").startswith("text/csv"))


def _csv(lines: Sequence[UsageLine]) -> str:
    """Cells that a spreadsheet would compute are text: names are what somebody has chosen."""
    names = [field.name for field in fields(UsageLine)]
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(names)
    for line in lines:
        cells = [getattr(line, name) for name in names]
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@\t\r" else cell for cell in cells])
    return table.getvalue()
