"""Tokens that a request resumes with are output tokens, as if this engine had generated them before it was preempted.

vLLM's front end knows prompts only. What it takes for part of the prompt has no effect on min_tokens, bad words, a
thinking budget or the state of a grammar, counts differently for the penalties, and leaves a seed at its beginning. So
the tokens travel beside the prompt, in `SamplingParams.extra_args`, and are appended where vLLM makes a request of it.
From there on vLLM's own code for preempted requests computes them, and all of the above is exact.
"""

from typing import Any, Self

import torch
from vllm.v1.engine import core
from vllm.v1.worker import gpu_input_batch, gpu_model_runner

from workers.vllm.request import RESUME


def install() -> None:
    """Replaces `Request` where `EngineCore.preprocess_add_request` makes one, and `CachedRequestState` where
    `GPUModelRunner._update_states` does; vLLM's second model runner asks the scheduler's request.
    """
    core.Request = ResumedRequest
    gpu_model_runner.CachedRequestState = ResumedState


def resumed_tokens(sampling: Any) -> list[int]:
    """sampling: vLLM's SamplingParams, or None."""
    extra = None if sampling is None else sampling.extra_args
    return extra.get(RESUME, []) if extra else []


class ResumedRequest(core.Request):  # type: ignore[misc]
    """The scheduler's side."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if resumed := resumed_tokens(self.sampling_params):
            self.append_output_token_ids(resumed)


class ResumedState(gpu_input_batch.CachedRequestState):  # type: ignore[misc]
    """The model runner's side."""

    output_token_ids: list[int]
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        super().__post_init__()
        resumed = resumed_tokens(self.sampling_params)
        if resumed:
            self.output_token_ids = [*resumed, *self.output_token_ids]
        if self.generator is None:
            return
        if self.generator.device.type == "cpu":
            self.generator = DrawPerToken(self.sampling_params.seed, self.output_token_ids)
        elif resumed:
            # By as much as vLLM itself takes a draw to be (`GPUModelRunner._bookkeeping_sync`).
            self.generator.set_offset(self.generator.get_offset() + 4 * len(resumed))


class DrawPerToken(torch.Generator):  # type: ignore[misc]
    """A seeded generator on CPU, from which `TopKTopPSampler.forward_cpu` takes one number for each token.

    vLLM draws in every step, and takes a draw back where a step computes only a part of the prompt. It does so by the
    generator's offset, which torch's generator for the CPU does not have: the engine would die of it.
    """

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls, device="cpu")  # type: ignore[no-any-return]

    def __init__(self, seed: int, output_tokens: list[int]) -> None:
        """output_tokens: those of the request, which grow as it goes on."""
        self._seed = seed
        self._output_tokens = output_tokens
        self.set_offset(0)

    def get_offset(self) -> int:
        return 4

    def set_offset(self, _: int) -> None:
        """As if it had been asked once for each token that there is."""
        self.manual_seed(self._seed)
        for _ in self._output_tokens:
            torch.randint(0, 2**31, (1,), generator=self, dtype=torch.long)
