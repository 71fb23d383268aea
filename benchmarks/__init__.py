"""What peftjax costs and learns: each module is a program, ``python -m benchmarks.NAME``."""
