"""Generations and the capture interval behind one small interface; one machine has the embedded
implementation.
"""
