"""How long things take, learned online."""

from planes.messages import LatencyPrior


class LatencyModel:
    """Prefill and decode seconds of one worker."""

    def __init__(self, prior: LatencyPrior) -> None:
        self._prior = prior

    def prefill_s(self, uncached_tokens: int, prompt_tokens: int) -> float:
        """Seconds to compute the last `uncached_tokens` of `prompt_tokens`."""
        pairs = uncached_tokens * (prompt_tokens - uncached_tokens / 2)
        p = self._prior
        return p.prefill_fixed_s + p.prefill_per_token_s * uncached_tokens + p.prefill_per_pair_s * pairs

    def step_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step for `batch` sequences with `kv_tokens` of context in all."""
        return (
            self._prior.step_fixed_s
            + self._prior.step_per_sequence_s * batch
            + (self._prior.step_per_kv_token_s * kv_tokens)
        )


class LinkModel:
    """Handover seconds between one prefill and one decode worker."""

    def __init__(self, prior: LatencyPrior) -> None:
        self._prior = prior

    def handover_s(self, num_bytes: int) -> float:
        return self._prior.handover_fixed_s + num_bytes / self._prior.handover_bytes_per_s
