"""Hydra scans the packages below `hydra_plugins`; a folder without this file is skipped."""
