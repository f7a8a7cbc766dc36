"""Configs as plain data, before they are made: keys, classes by name, earlier versions."""
