"""Mutated input for every reader of foreign bytes: it is accepted, or refused in one line, and nothing else happens.

The quick suite takes a few examples that are the same every time; `make fuzz MINUTES=10` takes new ones until then.
"""
