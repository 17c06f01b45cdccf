"""Guesses of what sequences generate next: who makes them, and how many of them pay."""
