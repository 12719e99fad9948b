"""Anthropic's API: Messages, as coding agents speak it."""
