"""What is said of finished runs, of any harness: files are read, and no model.

`view` is what differs between harnesses; `load` finds, reads and groups results; `stats` computes; `compare` and
`report` are two readings of the same runs; `tables` and `figures` show them; `published` is what others have measured.
"""
