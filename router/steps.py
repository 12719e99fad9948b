"""What a worker has still to compute of prompts, as its engine will: in steps.

    one step = fixed + work of the prompt tokens in it         fixed: decoding beside it included
               as many tokens as the budget takes; who comes while it runs goes into a later one

So prompts that fit into one step together pay for one step, and a prompt that comes into the free part of a step that
is to begin anyway costs its own work alone. The plan runs on by itself; a worker's reports set it right.
"""

import math
from typing import Final

_MOST_BEGUN: Final = 3  # at one instant: one that was due, and those that take no time


class Pace:
    """How a worker's steps go at present.

    fixed_s: of a step that computes prompts, beside their own work.  budget: prompt tokens that one step computes at
    most, 1 or more.
    """

    __slots__ = ("budget", "fixed_s")

    def __init__(self, fixed_s: float, budget: int) -> None:
        self.fixed_s = fixed_s
        self.budget = budget


class StepPlan:
    """The step in progress, and what is ready for those after it, in the order in which it came."""

    __slots__ = (
        "_due",
        "began_at",
        "ends_at",
        "is_full",
        "num_ready",
        "num_untold",
        "ready_s",
        "ready_tokens",
        "step_s",
        "step_tokens",
        "untold_s",
    )

    def __init__(self) -> None:
        self.ends_at = 0.0
        """End of the step in progress; in the past: none is."""
        self.step_tokens = 0
        """Prompt tokens in it."""
        self.step_s = 0.0
        """How long it takes in all."""
        self.began_at = 0.0
        self.is_full = False
        """The last of its prompts may go on in the next one."""
        self.ready_tokens = 0
        self.ready_s = 0.0
        """Their work."""
        self.num_ready = 0
        """Prompts that they belong to."""
        self._due: list[float] = []
        """By when those that end in the last step planned have to be computed, in the order in which they came; inf: no
        SLO. Some before them may be computed by now."""
        self.untold_s = 0.0
        """How long the steps take that have begun and that no report has told of …"""
        self.num_untold = 0
        """… and how many they are."""

    def advance(self, now: float, pace: Pace) -> None:
        """Let the steps begin that have begun by now. As quick for a billion of them as for one."""
        if self.ends_at <= now and self.ready_tokens > pace.budget:
            step_s = pace.fixed_s + self.ready_s * pace.budget / self.ready_tokens
            due = (now - self.ends_at) / step_s if step_s > 0 else math.inf
            ended = int(min(due, self.ready_tokens // pace.budget))
            self._take(ended * pace.budget)
            self.ends_at += ended * step_s
            self.untold_s += ended * step_s
            self.num_untold += ended
        for _ in range(_MOST_BEGUN):
            if self.ends_at > now or not self.ready_tokens:
                break
            self._begin(self.ends_at, pace)

    def _begin(self, at: float, pace: Pace) -> None:
        self.began_at, self.is_full = at, self.ready_tokens >= pace.budget
        self.step_tokens = min(pace.budget, self.ready_tokens)
        self.step_s = pace.fixed_s + self._take(self.step_tokens)
        self.ends_at = at + self.step_s
        self.untold_s += self.step_s
        self.num_untold += 1

    def _take(self, tokens: int) -> float:
        """So many of those that are ready are so no longer. Returns their work."""
        if not tokens:
            return 0.0
        share = tokens / self.ready_tokens
        work_s = share * self.ready_s
        self.ready_tokens -= tokens
        self.ready_s -= work_s
        self.num_ready = self.num_ready - int(self.num_ready * share) if self.ready_tokens else 0
        return work_s

    def add(self, tokens: int, work_s: float, now: float, pace: Pace, due_at: float = math.inf) -> None:
        """A prompt is on its way there, to be computed by `due_at`. An idle worker begins with it at once."""
        self.advance(now, pace)
        last = self.ready_tokens % pace.budget
        if not last or last + tokens > pace.budget:  # it ends in a step of its own
            self._due = []
        self.ready_tokens += tokens
        self.ready_s += work_s
        self.num_ready += 1
        self._due.append(due_at)
        del self._due[: -self.num_ready]
        if self.ends_at <= now:
            self._begin(now, pace)

    def done(self, left: int, now: float, pace: Pace) -> None:
        """A prompt has been computed: its last step ended just now, and `left` tokens are not known to be computed.

        More than the plan has: it is ahead, and knows what begins now when they are equal. Less: it is behind.
        """
        self.advance(now, pace)
        surplus = self.step_tokens + self.ready_tokens - left
        if not surplus and self.step_tokens:
            self.ends_at = now + self.step_s
        if surplus <= 0:
            return
        if surplus < self.step_tokens:
            self._continue(self.step_tokens - surplus, now, pace)
            return
        surplus -= self.step_tokens
        self._end(now)
        self._take(surplus)
        self.advance(now, pace)

    def _continue(self, left: int, now: float, pace: Pace) -> None:
        """The step in progress has ended, and of its tokens `left` are not known to be computed.

        Of a full one they may be a prompt's that goes on. Others were not in it, and begin now.
        """
        if self.is_full and now >= self.began_at + pace.fixed_s:
            self.step_tokens = left
            return
        work_s = (self.step_s - pace.fixed_s) * left / self.step_tokens
        self._end(now)
        self.ready_tokens += left
        self.ready_s += max(0.0, work_s)
        self._begin(now, pace)

    def clear(self, now: float) -> None:
        """Nothing is left."""
        self._end(now)
        self.ready_tokens, self.ready_s, self.num_ready = 0, 0.0, 0

    def _end(self, now: float) -> None:
        """The step in progress is over, if one is."""
        self.untold_s -= max(0.0, self.ends_at - now)
        self.num_untold -= self.num_untold > 0 and self.began_at >= now  # it has not even begun
        self.ends_at, self.step_tokens = min(self.ends_at, now), 0

    def report(
        self, tokens: int, work_s: float, unseen_tokens: int, unseen_s: float, num_prompts: int, now: float, pace: Pace
    ) -> None:
        """What a report tells, and what was sent too late for it; num_prompts: that both belong to.

        Where the plan has a step in progress it goes on, with tokens in it that the plan does not know. Else a step's
        worth of its tokens is being computed, nobody knows since when: half of it is over.
        """
        all_tokens = tokens + unseen_tokens
        if not tokens and not (now < self.ends_at and self.step_tokens <= unseen_tokens):
            self.ends_at, self.step_tokens = now, 0
        elif not tokens:
            unseen_s *= 1 - self.step_tokens / unseen_tokens if unseen_tokens else 0.0
            unseen_tokens -= self.step_tokens
        else:
            in_step = tokens
            if self.step_tokens and now < self.ends_at:
                in_step = max(self.step_tokens, tokens + unseen_tokens - self.ready_tokens)
            self.step_tokens = min(tokens, in_step, pace.budget)
            self.step_s = pace.fixed_s + work_s * self.step_tokens / tokens
            if not now < self.ends_at <= now + self.step_s:
                self.ends_at = now + self.step_s / 2
                self.began_at, self.is_full = now - self.step_s / 2, self.step_tokens >= pace.budget
            work_s -= work_s * self.step_tokens / tokens
            tokens -= self.step_tokens
        self.ready_tokens, self.ready_s = tokens + unseen_tokens, work_s + unseen_s
        share = -(-num_prompts * self.ready_tokens // all_tokens) if all_tokens else 0
        self.num_ready = min(share, self.ready_tokens)
        self.untold_s, self.num_untold = (self.step_s, 1) if self.ends_at > now else (0.0, 0)

    def starts_in_s(self, now: float, pace: Pace) -> float:
        """Until the first step begins that has a place for a prompt sent now. `advance` first."""
        wait_s = max(0.0, self.ends_at - now)
        full = self.ready_tokens // pace.budget
        if full:
            wait_s += full * (pace.fixed_s + self.ready_s * pace.budget / self.ready_tokens)
        return wait_s

    def stall_s(self, pace: Pace, step_s: float) -> float:
        """How long streams beside it stand still in steps that no report has told of, those to come included, where a
        step without prompts takes `step_s`.
        """
        steps = -(-self.ready_tokens // pace.budget)
        return self._begun_stall_s(step_s) + self.ready_s + steps * max(0.0, pace.fixed_s - step_s)

    def past_stall_s(self, now: float, step_s: float) -> float:
        """Of that, what is over. `advance` first."""
        return max(0.0, self._begun_stall_s(step_s) - max(0.0, self.ends_at - now - step_s))

    def _begun_stall_s(self, step_s: float) -> float:
        return max(0.0, self.untold_s - self.num_untold * step_s)

    def shared(self, pace: Pace) -> tuple[int, float, int]:
        """Tokens, work and prompts that are in that step already."""
        tokens = self.ready_tokens % pace.budget
        if not tokens:
            return 0, 0.0, 0
        share = tokens / self.ready_tokens
        return tokens, share * self.ready_s, max(1, int(share * self.num_ready))

    def late_in_s(self, ends_at: float, num_sharing: int) -> float:
        """How much later the step that has a place may end than at `ends_at`, until one of its prompts is late.

        Those that are late anyway do not count. The last that came are in it, as many as `shared` says; those before
        them are being computed.
        """
        first = math.inf
        for due in self._due[-num_sharing:]:
            if ends_at <= due < first:
                first = due
        return first - ends_at
