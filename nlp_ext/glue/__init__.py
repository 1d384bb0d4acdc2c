"""The T5 setting of the paper: GLUE as text to text."""
