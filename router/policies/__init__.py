"""Routing policies, one per file; each cites where its rule comes from."""
