"""Responses that are kept: the store, those that run in the background, and their streams."""
