"""What every engine can do, and how one is made."""
