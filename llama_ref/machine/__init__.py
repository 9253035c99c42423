"""What the process has of its machine: cores, memory, threads, signals."""
