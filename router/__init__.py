"""Pure routing decisions: no clock, no socket, no event loop; time is an argument."""
