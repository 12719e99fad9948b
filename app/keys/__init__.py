"""API keys: what each allows, where they are kept, how much of it is left and what has been used."""
