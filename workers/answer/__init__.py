"""From tokens to OpenAI's bytes."""
