"""Erasure codes: one Protocol (base.py), pyeclib behind it."""
