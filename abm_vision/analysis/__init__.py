"""What is said of finished runs, of any harness: files are read, and no model.

What differs between harnesses is in their `runs.view.View`. `load` finds, reads and groups results; `stats` computes;
`compare` (of runs that are `comparable`) and `report` (in `sections`) are two readings of the same runs; `tables` and
`figures` show them; `published` is what others have measured.
"""
