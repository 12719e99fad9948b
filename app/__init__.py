"""The gateway process: OpenAI HTTP in, SSE out."""
