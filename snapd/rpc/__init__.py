"""The daemon's doors: the handshake socket and gRPC. Nothing is decided here."""
