"""How connections of the planes are secured: which files an operator named, and what is made of them (ADR 35)."""
