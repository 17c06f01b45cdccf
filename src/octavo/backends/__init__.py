"""Backends: each gives the ops their meaning."""
