"""The ways in and out: files, JSON, other processes, and text of strangers.

Each has one door, and all others go through it.
"""
