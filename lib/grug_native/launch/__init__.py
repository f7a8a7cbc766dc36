"""Runs that are started by something else than a person's own loop: a cluster's job, Marin's executor, a text."""
