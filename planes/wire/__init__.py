"""What is said between processes: values, no I/O."""
