"""Coordinators: each owns the sequences of one request and says after every step what each does next.

Their modules are imported one by one, when there is such a request.
"""
