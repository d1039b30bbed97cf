"""What a recipe does to a model, step by step: each stage is one file with its settings, checks, work and notes.

`STAGES` in `table` has their names; `base` says what a stage is made of. A light room: torch is imported by the work.
"""
