"""Where durable tiers put their objects: one Protocol (`base.py`), a directory and S3 behind it."""
