"""The console: a page that shows the fleet live, and what it is told."""
