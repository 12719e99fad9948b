"""The model that runs when none is named."""
