"""A `vllm serve` of somebody else's as an engine: `headrace adopt`."""
