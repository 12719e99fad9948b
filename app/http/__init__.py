"""The HTTP side: the connection, the streamed response, the routes."""
