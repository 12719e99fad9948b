"""The `headrace` command; the gateway never imports it."""
