"""Puts this folder on the import path, so that all kinds of tests share the fakes in it."""
