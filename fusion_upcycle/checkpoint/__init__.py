"""Checkpoint folders: lazy reading, sharded atomic writing."""
