"""headrace against other rules in every regime: `python -m loadtest.grid --help`.

    axes → sample of cells → a load, a fleet and an SLO each → a run per policy → losses, summary, picture

A cell is one value of every axis (`axes.py`). What it comes to is drawn from its seed: prompts, answers and arrivals
(`loads.py`) at a share of what the fleet bears by a simple formula (`capacity.py`). `named.py` has the regimes that
were found outside the grid. `verdict.py` says where `headrace` is behind.
"""
