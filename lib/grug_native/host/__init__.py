"""The machine below a run: process, signals, terminal, and the folder on its disk."""
