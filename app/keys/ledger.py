"""Lets requests in within their keys' limits, over all gateways: `budget.py` with etcd beneath it.

A request is let in on what this gateway has in hand, without waiting; slices are taken behind its back. Only where that
does not suffice it waits for etcd, for `_PATIENCE_S` at most.

| etcd           | a request that needs more than is in hand                                                       |
|----------------|-------------------------------------------------------------------------------------------------|
| answers        | waits for one transaction, and gets it or is told 429                                             |
| is away, slow  | is decided by what this gateway knows: each gateway by itself keeps to the limit, and tells later |

What etcd holds is `Budget` by account (`budgets/{account}`), replaced only by whoever has read it.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
import structlog

from app.auth import TooManyConcurrent
from app.keys.budget import NAMES, SECONDS, Budget, Need, Share, Shortage, Taking, needed
from app.keys.tenant import Tenant
from app.metrics import Gauge, Total
from planes.control import ControlPlaneUnavailable
from planes.entries import NEW, Entries, OpenEntries
from planes.wire.errors import InvalidRequest, Rejected
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()

KIND: Final = "budgets"
"""Of the entries in etcd."""
_PATIENCE_S: Final = 1.0
_TICK_S: Final = 1.0
_RENEW_S: Final = 5.0
_FORGET_S: Final = 120.0
_NUM_TALKING: Final = 8
_LAST_WORDS_S: Final = 2.0

Headers = list[tuple[str, str]]


class RateLimited(Rejected):
    """The key's limit leaves no room for this request now."""

    code = "rate_limit_exceeded"

    def __init__(self, tenant: str, need: Need, shortage: Shortage, dimension: int) -> None:
        super().__init__(
            f"The key of '{tenant}' allows {shortage.limit} {NAMES[dimension]}; {shortage.left} are left and this "
            f"request needs {need.amounts[dimension]}. Try again in {duration(shortage.resets_in_s)}.",
            retry_after_s=shortage.resets_in_s,
        )


class PromptOverLimit(InvalidRequest):
    """A prompt of more tokens than the key allows in a whole minute or day."""

    code = "request_too_large"

    def __init__(self, tenant: str, prompt_tokens: int, limit: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the key of '{tenant}' allows {limit} tokens in its window; "
            "send a shorter one."
        )


class Reservation:
    """What one request may use, from when it is let in until `close`; the rest is given back then.

    What it has used may still be told afterwards: of a cancelled stream the worker knows it last.
    """

    __slots__ = ("_account", "_is_closed", "_ledger", "_need", "_tokens")

    def __init__(self, ledger: "Ledger", account: "_Account", need: Need) -> None:
        self._ledger = ledger
        self._account = account
        self._need = need
        self._tokens = 0
        self._is_closed = False

    def spent(self, num_tokens: int) -> None:
        """So many tokens of prompt and answer."""
        self._tokens += num_tokens
        if self._is_closed:
            self._account.share.give_back((0, 0, -num_tokens, -num_tokens), self._need)

    def headers(self) -> Headers:
        return self._ledger.headers_of(self._account.share)

    def close(self) -> None:
        """Once."""
        self._is_closed = True
        _, _, per_minute, per_day = self._need.amounts
        share = self._account.share
        share.give_back((0, 0, per_minute - self._tokens, per_day - self._tokens), self._need)
        share.slots_used -= self._need.slots
        self._account.num_open -= 1


class _Waiter:
    """A request that waits for etcd."""

    __slots__ = ("future", "need")

    def __init__(self, need: Need) -> None:
        self.need = need
        self.future: asyncio.Future[Shortage | None] = asyncio.get_running_loop().create_future()


class _Account:
    """A key's budget here."""

    __slots__ = ("is_low", "is_queued", "last_used", "name", "num_open", "share", "told_at", "unanswered", "waiting")

    def __init__(self, name: str, share: Share) -> None:
        self.name = name
        self.share = share
        self.waiting: list[_Waiter] = []
        self.is_queued = False
        self.is_low = False
        """It shall have a slice, though nobody waits for one."""
        self.num_open = 0
        self.last_used = 0.0
        self.told_at = 0.0
        self.unanswered: Taking | None = None
        """What etcd was asked for last; it stays where no answer came."""


class Ledger:
    """The budgets of one gateway.

    gateway: its name, which no other one has, nor this one after its next start.  wall_clock: seconds since 1970, for
    windows.  clock: a monotonic one, for how long ago something was.
    """

    def __init__(
        self,
        entries: Entries,
        *,
        gateway: str,
        wall_clock: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries = entries
        self._gateway = gateway
        self._num_changes = 0
        self._wall_clock, self._clock = wall_clock, clock
        self._accounts: dict[str, _Account] = {}
        self._queue: asyncio.Queue[_Account] = asyncio.Queue()
        self._is_connected = False
        self._has_tried = False
        """Whether etcd has answered, or a request has waited for it in vain."""
        self.num_refused = 0
        self.num_waited = 0
        self.num_alone = 0
        """Requests decided without etcd."""

    async def reserve(
        self, tenant: Tenant, *, prompt_tokens: int, answer_tokens: int, slots: int
    ) -> Reservation | None:
        """Let a request in; None: nothing limits it.

        Args:  answer_tokens: of all `slots` choices at most.
        Raises:  RateLimited, TooManyConcurrent, PromptOverLimit.
        """
        if not is_limited(tenant):
            return None
        limits = tenant.limits
        for limit in (limits.tokens_per_minute, limits.tokens_per_day):
            if limit is not None and prompt_tokens > limit:
                raise PromptOverLimit(tenant.name, prompt_tokens, limit)
        account = self._account(tenant)
        need = needed(limits, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, slots=slots)
        account.num_open += 1
        try:
            if account.waiting or not account.share.reserve(need, self._wall_clock()):
                self._check(tenant, need, await self._more(account, need))
            elif account.share.is_low():
                account.is_low = True
                self._ask(account)
        except BaseException:
            account.num_open -= 1
            raise
        return Reservation(self, account, need)

    def _check(self, tenant: Tenant, need: Need, shortage: Shortage | None) -> None:
        if shortage is None:
            return
        self.num_refused += 1
        if shortage.dimension is None:
            raise TooManyConcurrent(tenant.name, shortage.limit - shortage.left, need.slots, shortage.limit)
        raise RateLimited(tenant.name, need, shortage, shortage.dimension)

    def headers(self, tenant: Tenant) -> Headers:
        """`x-ratelimit-*` for a key's answers; none if nothing limits it by time."""
        return self.headers_of(self._account(tenant).share) if is_limited(tenant) else []

    def headers_of(self, share: Share) -> Headers:
        now = self._wall_clock()
        share.advance(now)
        told: Headers = []
        for what, windows in (("requests", (0, 1)), ("tokens", (2, 3))):
            at = next((at for at in windows if share.limit[at] is not None), None)
            if at is not None:
                told += [
                    (f"x-ratelimit-limit-{what}", str(share.limit[at])),
                    (f"x-ratelimit-remaining-{what}", str(share.left(at))),
                    (f"x-ratelimit-reset-{what}", duration(SECONDS[at] - now % SECONDS[at])),
                ]
        return told

    def gauges(self) -> Iterator[Gauge]:
        yield Total("limited_requests", "Requests refused by a limit of their key.", self.num_refused)
        yield Total("limits_waited", "Requests that waited for etcd to be let in.", self.num_waited)
        yield Total("limits_alone", "Requests let in or refused without etcd.", self.num_alone)

    async def run(self) -> None:
        """Talk to etcd until cancelled."""
        await self._entries.keep(self._talk)

    async def stop(self) -> None:
        """Give everything back that is in hand, if etcd can be reached."""
        if not self._accounts:
            return
        try:
            async with asyncio.timeout(_LAST_WORDS_S), self._entries.opened() as entries:
                for account in self._accounts.values():
                    if account.share.put_aside(is_last=True):
                        await self._tell(entries, account)
        except (ControlPlaneUnavailable, TimeoutError) as exc:
            _log.warning("budgets.not_returned", reason=str(exc))

    # --- with etcd -------------------------------------------------------------------------------------------------

    async def _talk(self, entries: OpenEntries, healthy: Callable[[], None]) -> None:
        await entries.find("")  # whether it answers
        healthy()
        self._is_connected = self._has_tried = True
        for account in self._accounts.values():
            if account.waiting or any(account.share.owed):
                self._ask(account)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tick())
                for _ in range(_NUM_TALKING):
                    tasks.create_task(self._serve(entries))
        except BaseExceptionGroup as group:  # the session knows the client's errors, and no groups
            raise group.exceptions[0] from None
        finally:
            self._is_connected = False
            for account in self._accounts.values():
                account.is_queued = False
                self._decide_alone(account)
            self._queue = asyncio.Queue()

    async def _serve(self, entries: OpenEntries) -> None:
        while True:
            account = await self._queue.get()
            await self._tell(entries, account)
            account.is_queued = False
            if account.waiting:
                self._ask(account)

    async def _tell(self, entries: OpenEntries, account: _Account) -> None:
        """Give back what is owed, take what is needed and a slice: one transaction, unless somebody is faster."""
        share = account.share
        while True:
            found = await entries.find(account.name)
            now, waiting = self._wall_clock(), list(account.waiting)
            share.advance(now)
            known = Budget() if found is None else _decoded(found.value)
            if account.unanswered is not None and known.last == account.unanswered.budget.last:
                share.took_unanswered(account.unanswered)
            is_taking = bool(waiting) or account.is_low
            self._num_changes += 1
            change = f"{self._gateway}/{self._num_changes}"
            needs = [each.need for each in waiting]
            taking = share.take(known, needs, now, has_slice=is_taking, change=change)
            revision = NEW if found is None else found.revision
            account.unanswered = taking
            is_done = await entries.swap(account.name, msgspec.json.encode(taking.budget), revision=revision)
            account.unanswered = None
            if is_done:
                break
        share.took(taking)
        account.is_low, account.told_at = False, self._clock()
        self._answer(account, waiting, taking.shortages)

    def _answer(self, account: _Account, waiting: Sequence[_Waiter], shortages: Sequence[Shortage | None]) -> None:
        for waiter, shortage in zip(waiting, shortages, strict=True):
            if waiter in account.waiting:  # else it has gone, and what was taken for it is in hand
                account.waiting.remove(waiter)
                if shortage is None:
                    account.share.use(waiter.need)
                waiter.future.set_result(shortage)

    async def _tick(self) -> None:
        """Give back what is not used, and say which slots are held, now and then."""
        while True:
            await asyncio.sleep(_TICK_S)
            self._look_through()

    def _look_through(self) -> None:
        wall_now, now = self._wall_clock(), self._clock()
        for account in list(self._accounts.values()):
            account.share.advance(wall_now)
            is_due = account.share.slots_held > 0 and now - account.told_at > _RENEW_S
            if not account.is_queued and (account.share.put_aside() or is_due):
                self._ask(account)
            elif not account.num_open and now - account.last_used > _FORGET_S:
                del self._accounts[account.name]

    # --- without it ------------------------------------------------------------------------------------------------

    async def _more(self, account: _Account, need: Need) -> Shortage | None:
        """Wait until etcd has been asked.  Returns:  why there is no more; None: the request has what it needs."""
        self.num_waited += 1
        waiter = _Waiter(need)
        account.waiting.append(waiter)
        if self._has_tried and not self._is_connected:
            self._decide_alone(account)
        self._ask(account)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.shield(waiter.future)
        except TimeoutError:
            self._has_tried = True
            if not waiter.future.done():
                self._decide_alone(account, waiter)
            return waiter.future.result()
        except asyncio.CancelledError:
            if waiter in account.waiting:
                account.waiting.remove(waiter)
            elif waiter.future.done() and waiter.future.result() is None:
                account.share.give_back(need.amounts, need)
                account.share.slots_used -= need.slots
            raise

    def _decide_alone(self, account: _Account, only: _Waiter | None = None) -> None:
        """By what this gateway knows."""
        waiting = list(account.waiting) if only is None else [only]
        if not waiting:
            return
        share, now = account.share, self._wall_clock()
        share.advance(now)
        taking = share.take(share.budget, [each.need for each in waiting], now)
        share.took(taking, is_told=False)
        self.num_alone += len(waiting)
        self._answer(account, waiting, taking.shortages)

    def _ask(self, account: _Account) -> None:
        if self._is_connected and not account.is_queued:
            account.is_queued = True
            self._queue.put_nowait(account)

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.account)
        if account is None:
            share = Share(self._gateway, tenant.limits, tenant.max_concurrent)
            account = self._accounts[tenant.account] = _Account(tenant.account, share)
        account.share.limits, account.share.max_slots = tenant.limits, tenant.max_concurrent  # they may have changed
        account.last_used = self._clock()
        return account


def is_limited(tenant: Tenant) -> bool:
    limits = tenant.limits
    return (
        limits.requests_per_minute is not None
        or limits.tokens_per_minute is not None
        or limits.requests_per_day is not None
        or limits.tokens_per_day is not None
        or tenant.max_concurrent is not None
    )


def duration(seconds: float) -> str:
    """As OpenAI writes it: 1s, 6m0s, 23h59m1s; rounded up."""
    whole = max(1, -int(-seconds // 1))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _decoded(value: bytes) -> Budget:
    """One that cannot be read counts as untouched, and is replaced."""
    try:
        return msgspec.json.decode(value, type=Budget)
    except UNREADABLE as exc:
        _log.warning("budget.malformed", reason=str(exc))
        return Budget()
