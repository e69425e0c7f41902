"""The version of the installed distribution."""

from importlib import metadata

try:
    VERSION = metadata.version("snapd")
except metadata.PackageNotFoundError:  # run from a source tree
    VERSION = "0.0.0"
