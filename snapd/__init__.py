"""snapd: the daemon that keeps a training job's state safe. It never imports torch."""

__version__ = "0.1.0"
