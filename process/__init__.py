"""What every process of ours has: settings, logs, folders."""
