"""Pure decisions: events and facts in, decisions with reasons out. No I/O, clock, randomness, threads or
environment.
"""
