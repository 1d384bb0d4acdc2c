"""Scenes that can be drawn offline, one file each."""
