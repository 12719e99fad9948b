"""How many workers of which role a load needs: `headrace plan --help` (ADR 31).

trace, or rate and lengths → a sample (`sample.py`) → trials of fleets (`trial.py`), each the simulator with the
production router → the fewest workers that do both and the fewest that prefill and decode (`search.py`) → a table,
sentences, a picture, JSON (`report.py`)
"""
