"""The callback that evaluates a run, under the name that levanter's users look for; see `grug_native.evaluation`."""

from grug_native.evaluation.perplexity import build_tagged_eval_callback

__all__ = ["build_tagged_eval_callback"]
