"""Traces of requests, for whoever collects them: made from timelines, at the end (ADR 37)."""
