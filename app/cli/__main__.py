"""`python -m app.cli` is the `headrace` command."""

from app.cli.main import main

main()
