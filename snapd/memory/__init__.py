"""The node's shared memory: folders, segments, hashing, and the index beside them."""
