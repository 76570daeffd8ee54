"""A model in memory, seen from outside: tensors by file name, identity, routers, modes."""
