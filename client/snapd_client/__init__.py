"""snapd's client: the hook in a training loop. See `Snapshotter`."""

from .errors import (
    CapacityError,
    CaptureError,
    ConfigError,
    FencedError,
    IntegrityError,
    NotRestorable,
    ProtocolError,
    RestoreMismatch,
    SnapdError,
    UnavailableError,
)
from .hook import Handle, Snapshotter
from .version import VERSION as __version__

__all__ = [
    "CapacityError",
    "CaptureError",
    "ConfigError",
    "FencedError",
    "Handle",
    "IntegrityError",
    "NotRestorable",
    "ProtocolError",
    "RestoreMismatch",
    "SnapdError",
    "Snapshotter",
    "UnavailableError",
    "__version__",
]
