"""The user's state as a typed tree: read at each capture, laid out once, written back in place.

`tree` binds names and walks; `layout` decides which byte goes where; `apply` writes a snapshot back. Nothing
here knows of daemons, lanes or files, and nothing is ever pickled or unpickled.
"""
