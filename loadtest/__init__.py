"""Load generators, benchmarks and the routing simulator."""
