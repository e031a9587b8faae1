"""What `launch/benchmark.py` measures: one file for each kind of program, and what they share."""
