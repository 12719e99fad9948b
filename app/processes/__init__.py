"""One gateway on several processes: what they tell each other, so that it looks like one (ADR 46)."""
