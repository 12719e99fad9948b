"""The gateway's dialect of the OpenAI HTTP API."""
