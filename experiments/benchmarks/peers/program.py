"""Starts a contender of ours the way our programs start: `python -m experiments.benchmarks.peers.program JOB NAME`."""

import sys
from importlib import import_module

from grug_native.host.process import prepare_process

if __name__ == "__main__":
    prepare_process()
    import_module(f"experiments.benchmarks.peers.{sys.argv[2]}").main()
