"""What a run tells while it runs: metrics, progress, log, traces, curves."""
