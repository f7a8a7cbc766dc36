"""What a model is worth: tagged perplexity, exact bits per byte, tasks of lm-eval, generated text."""
