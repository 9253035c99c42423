"""The machine that the process runs on: cores, memory, threads, signals."""
