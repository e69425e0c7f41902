"""Bulk bytes between daemons: one Protocol (base.py); the side channel, and gRPC streaming as the fallback."""
