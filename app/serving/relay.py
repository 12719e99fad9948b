"""The life of a request behind the parser: route, legs, migration, one answer.

    routed ─┬─ no prefill worker ────────────────────────────► local leg ──┐
            ├─ pull: prefill leg ── ticket ──► decode leg ─────────────────┼──► answered
            │                   └─ no ticket: the first token ended it ────┤
            └─ push: prefill leg and decode leg at once ───────────────────┘

    a leg is refused or lost ──► routed again without its worker; from the tokens that the client has, if it has any
    nobody left to go on     ──► waits for a worker, if there are tokens; else the client is told, and may ask again
    client gone              ──► legs cancelled, reservation released
    deadline, shutdown       ──► the same, and the client is told

What the client has got is never sent again: a resumed leg is given those tokens and its formatter folds them silently.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog

from app.http.response import Answer, Headers
from app.metrics import Metrics
from app.openai import errors
from app.serving.binding import Clock, Dispatcher
from app.serving.course import Course, Job, drop, worker_of
from app.serving.prefill_queue import NotQueued, Prefilled
from app.serving.worker_stream import Leg, WorkerFailed, WorkerRefused
from planes.streams.client import WorkerConnection, WorkerLost, WorkerUnreachable
from planes.wire.errors import HeadraceError, Interrupted, Rejected
from planes.wire.frames import DecodeLeg, Done, Generate, LocalLeg, PrefillLeg, StreamId, pack_tokens
from planes.wire.frames import Leg as LegKind
from planes.wire.messages import HandoverEndpoint, HandoverMode, Registration, WorkerId
from router.errors import NoWorker
from router.request import Failure, Outcome

_log = structlog.get_logger()

_LegLost = (WorkerUnreachable, WorkerLost, WorkerRefused, WorkerFailed)
"""How a leg can end that may be run elsewhere. All of them name their `worker`."""

_JSON = ("content-type", "application/json")
_LAST_WORDS_S = 5.0
"""How long a client may take to read the error that ends its request."""


class DeadlinePassed(Rejected):
    """Time is up. Not `Interrupted`: continuing elsewhere would not give more of it."""

    status, code = 504, "deadline"

    def __init__(self, timeout_s: float, num_tokens: int) -> None:
        super().__init__(f"the request's limit of {timeout_s:g} s passed after {num_tokens} tokens")


class GatewayStopping(Interrupted):
    """This gateway stops and the request did not end in time."""

    code = "gateway_stopping"

    def __init__(self) -> None:
        super().__init__("the gateway is stopping; send the request again")


class NotResumable(Interrupted):
    """A worker was lost after the client had got a part of several choices."""

    code = "not_resumable"

    def __init__(self, n: int, reason: str) -> None:
        super().__init__(f"an answer of n = {n} choices cannot be continued on another worker: {reason}")


class TicketExpired(WorkerFailed):
    """A prefill worker's KV cache was not taken within its lease."""

    def __init__(self, worker: WorkerId, age_s: float, lease_s: float) -> None:
        super().__init__(worker, "ticket_expired", f"its ticket is {age_s:.1f} s old and was good for {lease_s:.1f} s")


class Workers(Protocol):
    """Where to find a worker. The first two raise WorkerUnreachable if it is not there (any more)."""

    def connection(self, worker: WorkerId) -> WorkerConnection: ...
    def registration(self, worker: WorkerId) -> Registration: ...

    @property
    def num_joined(self) -> int:
        """How often a worker has come up for routing."""

    async def joined(self, since: int) -> None:
        """Returns when `num_joined` exceeds `since`."""


class Prefills(Protocol):
    """What `app.serving.prefill_queue.QueuedPrefills` does."""

    async def prefill(self, model: str, request: Generate) -> Prefilled: ...
    def release(self, model: str, given: Prefilled) -> None: ...


class Relay:
    """Runs jobs. One for each gateway process.

    clock: the event loop's.  max_attempts: failed legs in a row, without a new token, that end a request.
    replacement_s: how long a request that has tokens waits for a worker to go on when none is left.
    prefills: the queue for prompts; None: they are sent to the worker chosen.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        workers: Workers,
        metrics: Metrics,
        *,
        clock: Clock,
        max_attempts: int,
        replacement_s: float,
        prefills: Prefills | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._workers = workers
        self._metrics = metrics
        self._clock = clock
        self._max_attempts = max_attempts
        self._replacement_s = replacement_s
        self._prefills = prefills

    async def run(self, job: Job, answer: Answer) -> None:
        """Answer `job`, whatever happens. Raises nothing but CancelledError."""
        course = Course(job, answer)
        try:
            async with asyncio.timeout_at(job.deadline):
                await self._answer(course)
            course.code = "ok"
        except TimeoutError:
            await _refuse(course, DeadlinePassed(job.deadline - job.arrived_at, len(course.tokens)))
        except asyncio.CancelledError:
            course.code = "cancelled"
            if not answer.is_gone:
                await _refuse(course, GatewayStopping())
            raise
        except HeadraceError as exc:
            await _refuse(course, exc)
        except Exception as exc:  # noqa: BLE001 - our own bug: it is logged, and the client gets an answer all the same
            _log.exception("request.bug", request_id=job.request)
            await _refuse(course, exc)
        finally:
            course.ended_at = self._clock()
            if course.waits_until is not None:
                self._metrics.waited_for_worker(is_replaced=False)
            self._metrics.ended(course.summary())
            _log.info("request.finished", **course.record())

    async def _answer(self, course: Course) -> None:
        num_joined = 0
        while True:
            num_known = self._workers.num_joined
            try:
                done = await self._attempt(course)
                break
            except _LegLost as exc:
                self._lost(course, exc)
                num_joined = num_known
            except NoWorker as exc:
                await self._replaced(course, exc, num_joined)
                num_joined = self._workers.num_joined
        if not course.job.format.is_streaming:
            await course.answer.send_whole(200, [_JSON, *course.headers()], done.payload)
            return
        await course.answer.end(done.payload, () if course.answer.is_begun else course.headers())

    async def _attempt(self, course: Course) -> Done:
        """Route once and run the legs. What they return has a payload that is still to be sent.

        Raises:  one of _LegLost; Rejected by the router; InvalidRequest.
        """
        async with self._dispatcher.routed(course.routable(), course.observed) as route:
            attempt = course.bound(route, now=self._clock())
            if course.waits_until is not None:
                course.waits_until = None
                self._metrics.waited_for_worker(is_replaced=True)
            if course.fallback:
                self._metrics.fell_back(course.fallback)
            try:
                if route.prefill is None:
                    done = await self._local(course)
                else:
                    done = await self._disaggregated(course, route.prefill, route.decode)
            except HeadraceError as exc:
                attempt.failure = Failure(exc.code, worker_of(exc), str(exc))
                if isinstance(exc, _LegLost):
                    attempt.outcome = Outcome.INTERRUPTED
                raise
            except asyncio.CancelledError:
                attempt.outcome = Outcome.CANCELLED
                raise
            attempt.outcome = Outcome.FINISHED
            return done

    async def _local(self, course: Course) -> Done:
        def first() -> None:
            course.first_token(now=self._clock())
            self._dispatcher.prefilled(course.job.request)

        attempt = course.attempts[-1]
        with self._leg(course, attempt.route.decode, LocalLeg(), course.tokens, course.write, first) as leg:
            done = await self._relayed(course, leg)
        attempt.decode = done.usage
        return done

    async def _disaggregated(self, course: Course, prefill: WorkerId, decode: WorkerId) -> Done:
        endpoint = self._workers.registration(prefill).handover
        if endpoint is None:
            raise WorkerUnreachable(prefill, "it is registered without a handover endpoint")
        num_tokens = len(course.tokens)
        try:
            if endpoint.mode is HandoverMode.PUSH:
                if self._prefills is not None:
                    self._bypass(course, "push", "a handover by push needs both legs at once")
                return await self._push(course, prefill, decode, endpoint)
            return await self._pull(course, prefill, decode)
        except WorkerFailed as exc:
            if exc.worker == decode and len(course.tokens) <= num_tokens + 1:
                # A taker that fails before its first token as a rule could not get the KV cache: the giver is suspect.
                giver = course.attempts[-1].prefill_worker
                raise WorkerFailed(giver, exc.code, f"handover to {decode}: {exc}") from exc
            raise

    async def _pull(self, course: Course, prefill: WorkerId, decode: WorkerId) -> Done:
        attempt = course.attempts[-1]
        given = await self._from_queue(course, decode) or await self._asked(course, prefill)
        attempt.prefill = given.done.usage
        self._dispatcher.prefilled(course.job.request)
        ticket = given.done.ticket
        if ticket is None:
            return given.done
        age_s = self._clock() - given.ended_at
        if age_s >= ticket.lease_s:
            raise TicketExpired(given.worker, age_s, ticket.lease_s)
        if given.worker == decode:  # it took the prompt from the queue itself, and has the KV cache already
            return await self._local(course)
        return await self._decode(course, decode, DecodeLeg(ticket=ticket))

    async def _asked(self, course: Course, prefill: WorkerId) -> Prefilled:
        """The prefill leg on the worker that the router has chosen."""
        is_early = course.job.is_first_token_early
        kind = PrefillLeg(HandoverMode.PULL, emit_first=is_early)
        tokens: list[int] = course.tokens if is_early else []
        write, first = (course.write, self._first(course)) if is_early else (drop, None)
        with self._leg(course, prefill, kind, tokens, write, first) as leg:
            done = await (self._relayed(course, leg) if is_early else leg.done())
        if not is_early and done.ticket is None:
            course.take(done, now=leg.ended_at)
        elif is_early and done.ticket is not None:
            await self._say(course, done.payload)
        return Prefilled(prefill, done, leg.ended_at)

    async def _from_queue(self, course: Course, decode: WorkerId) -> Prefilled | None:
        """The prefill leg on whichever worker takes it from the queue; None if it is to be sent directly."""
        if self._prefills is None:
            return None
        is_early = course.job.is_first_token_early
        leg = self._generate(course, PrefillLeg(HandoverMode.PULL, emit_first=is_early))
        if course.excluded:
            self._bypass(course, "retried", "the queue cannot keep it from the workers that failed it")
            return None
        try:
            given = await self._prefills.prefill(course.job.model, leg)
        except NotQueued as exc:
            self._bypass(course, exc.code, str(exc))
            return None
        course.attempts[-1].prefilled_by = given.worker
        if given.worker == decode and given.done.ticket is not None:  # it need not fetch what it has
            self._prefills.release(course.job.model, given)
        if is_early or given.done.ticket is None:
            course.take(given.done, now=given.ended_at)
        if is_early and given.done.ticket is not None:
            await self._say(course, given.done.payload)
        return given

    async def _say(self, course: Course, payload: bytes) -> None:
        """Send the first token's event, which does not end the answer."""
        if payload:
            course.write(payload)
        if course.answer.has_news and not course.answer.is_begun:
            await course.answer.begin(course.headers())

    def _bypass(self, course: Course, code: str, reason: str) -> None:
        """Say that a prompt goes past the queue."""
        course.bypass = code
        self._metrics.queue_bypassed(code)
        _log.warning("prefill_queue.bypassed", request_id=course.job.request, code=code, reason=reason)

    async def _push(self, course: Course, prefill: WorkerId, decode: WorkerId, endpoint: HandoverEndpoint) -> Done:
        attempt = course.attempts[-1]
        taker = self._leg(course, decode, DecodeLeg(source=endpoint), course.tokens, course.write, self._first(course))
        giver = self._leg(course, prefill, PrefillLeg(HandoverMode.PUSH), [], drop, None)
        with taker as taking, giver as giving:

            def given(ended: asyncio.Future[Done | HeadraceError]) -> None:
                if ended.cancelled():
                    return
                outcome = ended.result()
                if isinstance(outcome, HeadraceError):
                    taking.fail(outcome)
                else:
                    attempt.prefill = outcome.usage
                    self._dispatcher.prefilled(course.job.request)

            giving.ended.add_done_callback(given)
            try:
                done = await self._relayed(course, taking)
            finally:
                giving.ended.remove_done_callback(given)
        attempt.decode = done.usage
        return done

    async def _decode(self, course: Course, decode: WorkerId, kind: DecodeLeg) -> Done:
        with self._leg(course, decode, kind, course.tokens, course.write, self._first(course)) as leg:
            done = await self._relayed(course, leg)
        course.attempts[-1].decode = done.usage
        return done

    async def _relayed(self, course: Course, leg: Leg) -> Done:
        """Let the leg speak to the client; the head goes out when there is something to say."""
        if course.job.format.is_streaming and not course.answer.is_begun:
            await leg.news
            if course.answer.has_news:
                await course.answer.begin(course.headers())
        return await leg.done()

    @contextmanager
    def _leg(
        self,
        course: Course,
        worker: WorkerId,
        kind: LegKind,
        tokens: list[int],
        write: Callable[[bytes], None],
        first: Callable[[], None] | None,
    ) -> Iterator[Leg]:
        """A leg under way; however the block ends, its worker does not go on."""
        leg = Leg(self._workers.connection(worker), tokens, write, first)
        leg.start(self._generate(course, kind))
        try:
            yield leg
        finally:
            leg.cancel()

    def _generate(self, course: Course, kind: LegKind) -> Generate:
        job = course.job
        return Generate(
            stream=StreamId(0),
            request=course.leg_request(),
            prompt=pack_tokens(job.prompt),
            sampling=job.sampling,
            format=job.format,
            leg=kind,
            resume=pack_tokens(course.tokens),
            cache_salt=job.cache_salt,
            priority=job.priority,
            timeout_s=max(0.0, job.deadline - self._clock()),
        )

    def _first(self, course: Course) -> Callable[[], None]:
        return lambda: course.first_token(now=self._clock())

    def _lost(self, course: Course, exc: HeadraceError) -> None:
        """Prepare the next attempt.  Raises:  `exc` if there shall be none, NotResumable if there cannot be."""
        if not course.job.is_resumable and course.answer.has_news:
            raise NotResumable(course.job.sampling.n, str(exc)) from exc
        is_last = course.failed(exc) >= self._max_attempts
        _log.warning(
            "request.attempt_failed",
            request_id=course.job.request,
            code=exc.code,
            reason=str(exc),
            num_tokens=len(course.tokens),
            is_last=is_last,
        )
        if is_last:
            raise exc
        self._metrics.retried(exc.code, is_migration=bool(course.tokens))

    async def _replaced(self, course: Course, exc: NoWorker, num_joined: int) -> None:
        """Wait until more than `num_joined` workers have joined, and let any of them go on.

        Raises:  `exc` when it has waited too long; at once if there is nothing to lose, or if the request may be what
        kills workers.
        """
        if not course.tokens:
            raise exc
        if course.waits_until is None:
            course.waits_until = self._clock() + self._replacement_s
            course.num_replacements += 1
        if course.num_replacements > self._max_attempts:
            raise exc
        _log.warning("request.waits_for_worker", request_id=course.job.request, num_tokens=len(course.tokens))
        try:
            async with asyncio.timeout_at(course.waits_until):
                await self._workers.joined(num_joined)
        except TimeoutError:
            raise exc from None
        course.excluded = frozenset()  # it may be a new start of who failed


async def refuse(answer: Answer, exc: Exception, headers: Headers) -> None:
    """Tell the client, in whatever shape there is still room for."""
    try:
        async with asyncio.timeout(_LAST_WORDS_S):
            if answer.is_begun:
                await answer.end(errors.sse_event(exc))
            else:
                refusal = errors.response(exc)
                await answer.send_whole(refusal.status, [*refusal.headers.items(), *headers], refusal.body)
    except TimeoutError:
        answer.abort()


async def _refuse(course: Course, exc: Exception) -> None:
    course.code = errors.code_of(exc)
    await refuse(course.answer, exc, course.headers())
