"""The serving process: one engine, its formatter, its events, its streams."""
