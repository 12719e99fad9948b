"""What this gateway knows of the workers, and the routing settings it follows."""
