"""OpenAI's responses: bodies into requests, items into the messages that chat templates know."""
