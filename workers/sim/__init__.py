"""The simulated engine: real protocol, virtual model."""
