"""Writing a snapshot out of the arena as files that need no snapd to be read.

Owns the exported form: per rank one safetensors file and one JSON file, and one JSON file for the snapshot.
What is exported is a copy for people and other programs; snapd itself never restores from it. Every byte is
checked against its chunk's hash on the way. Must not know of torch, of the command line, or of how the
records were fetched.
"""
