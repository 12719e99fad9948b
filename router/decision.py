"""A policy's answer, checked before anything is made of it: a policy may be a user's own, and may answer anything.

A decision names workers that were offered, holds numbers that can be added up, does what the client wants, and has the
router's own seconds. Whatever else a policy does is `PolicyFailed` for the one request that it was asked about.
"""

import msgspec

from router import cost
from router.decision_log import worth_keeping
from router.errors import PolicyFailed
from router.handover_preference import enforced
from router.policies.headrace import Headrace
from router.policy import Choice, FleetView, Policy
from router.prices import MEASURED
from router.request import Candidate, RoutableRequest, Sacrifice

_MOST = 1e15  # seconds, or a rule's own unit: beyond any prediction, and thousands of them still add up exactly enough


class Decision(msgspec.Struct, frozen=True, eq=False):
    """A choice that can be carried out. `chosen` is priced by the router, whatever the policy predicts."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """All that the policy weighed. Only what a queue adds up or orders by is checked in all."""
    kept: tuple[Candidate, ...]
    """The cheapest of them, for explain: every field is checked."""
    is_held: bool
    held_because: str
    max_backlog_s: float
    lacks_room: bool
    spares_streams: bool
    makes_way_because: str


def decide(policy: Policy, name: str, request: RoutableRequest, view: FleetView) -> Decision:
    """Ask `policy`, which goes by `name`.  Raises:  PolicyFailed, whatever the policy did; NoPair."""
    is_ours = is_our_own(policy)
    try:
        choice = policy.choose(request, view)
        if not is_ours:
            _check(choice, view)
        kept = worth_keeping(choice.candidates)
        if not is_ours:
            for option in kept:
                _check_fields(option, request)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        raise PolicyFailed(name, exc) from exc
    obeyed = enforced(request, choice, view)
    return Decision(
        obeyed.chosen if is_ours else cost.judge(request, obeyed.chosen, view),
        obeyed.candidates,
        kept if obeyed is choice else worth_keeping(obeyed.candidates),
        obeyed.is_held,
        obeyed.held_because,
        float(obeyed.max_backlog_s),
        obeyed.lacks_room,
        obeyed.spares_streams,
        obeyed.makes_way_because,
    )


def is_our_own(policy: Policy) -> bool:
    """Our own rule answers with the router's own seconds, which are finite whatever workers report."""
    return type(policy) is Headrace and policy.model is MEASURED


def _check(choice: Choice, view: FleetView) -> None:
    """Raises:  TypeError or ValueError, or whatever comparing strange values raises."""
    _expect("the answer", choice, Choice)
    _expect("is_held", choice.is_held, bool)
    _expect("lacks_room", choice.lacks_room, bool)
    _expect("spares_streams", choice.spares_streams, bool)
    _expect("held_because", choice.held_because, str)
    _expect("makes_way_because", choice.makes_way_because, str)
    _expect("candidates", choice.candidates, tuple)
    _expect_number("max_backlog_s", choice.max_backlog_s, 0, _MOST)
    if not choice.candidates:
        raise ValueError("candidates is empty and must hold what was weighed, the chosen one at least")
    prefill = {None, *[worker.worker for worker in view.prefill]}
    decode = {worker.worker for worker in view.decode}
    for option in (choice.chosen, *choice.candidates):  # hundreds in a large fleet
        if type(option) is not Candidate:
            _expect("a candidate", option, Candidate)
        if option.decode not in decode or option.prefill not in prefill:
            raise ValueError(f"prefill on {option.prefill!r} and decode on {option.decode!r} were not offered")
        if not (0.0 <= option.queue_s <= _MOST and 0.0 <= option.prefill_s <= _MOST >= option.total_s >= -_MOST):
            raise ValueError(f"seconds must be 0 to {_MOST:g}, and are: {option!r}")
        if not 0.0 <= option.work_s <= _MOST:
            raise ValueError(f"work_s must be 0 to {_MOST:g}, and is {option.work_s!r}")
        if not 0.0 <= option.congestion_s <= _MOST:
            raise ValueError(f"congestion_s must be 0 to {_MOST:g}, and is {option.congestion_s!r}")
        if not 0.0 <= option.shared_s <= _MOST:
            raise ValueError(f"shared_s must be 0 to {_MOST:g}, and is {option.shared_s!r}")
        if type(option.gives_up) is not Sacrifice:
            _expect("gives_up", option.gives_up, Sacrifice)


def _check_fields(option: Candidate, request: RoutableRequest) -> None:
    """What is shown must be numbers and words, too."""
    for name in ("queue_s", "prefill_s", "handover_s", "first_step_s", "inflicted_s", "decode_s"):
        _expect_number(name, getattr(option, name), 0, _MOST)
    _expect_number("early_token_discount_s", option.early_token_discount_s, 0, _MOST)
    _expect_number("total_s", option.total_s, -_MOST, _MOST)
    _expect_number("cached_tokens", option.cached_tokens, 0, request.prompt_tokens)
    _expect_number("decode_cached_tokens", option.decode_cached_tokens, 0, request.prompt_tokens)
    _expect_number("num_passed", option.num_passed, 0, _MOST)
    _expect_number("work_s", option.work_s, 0, _MOST)
    _expect_number("congestion_s", option.congestion_s, 0, _MOST)
    _expect_number("shared_s", option.shared_s, 0, _MOST)
    _expect("is_first_early", option.is_first_early, bool)
    _expect("strains", option.strains, bool)
    _expect("delays", option.delays, bool)
    if option.waits_for_room is not None:
        _expect("waits_for_room", option.waits_for_room, str)
    _expect("decode", option.decode, str)
    if option.prefill is not None:
        _expect("prefill", option.prefill, str)


def _expect(name: str, value: object, wanted: type) -> None:
    if type(value) is not wanted:
        raise TypeError(f"{name} is {type(value).__name__} and must be {wanted.__name__}")


def _expect_number(name: str, value: float, least: float, most: float) -> None:
    if type(value) is not float and type(value) is not int:
        raise TypeError(f"{name} is {type(value).__name__} and must be a plain number")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value!r} and must be {least:g} to {most:g}")
