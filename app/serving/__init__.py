"""One request between the router and its client."""
