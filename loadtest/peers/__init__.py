"""Headrace beside other gateways, each from PyPI, before equal workers, in one run: `make bench-peers`.

    gateways (what they are, how they are installed and started) → running (until each answers) → measure → table

Headrace stands before two simulated workers; Dynamo, whose workers speak its own protocol, before two of its mocker;
all others before two simulated workers that speak plain HTTP (`workers/sim/plain.py`), same engine, same settings.
"""
