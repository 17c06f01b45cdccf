"""Contracts between the rooms: sequences, verbs, wants, step plans, events, parameters, outputs and errors."""
