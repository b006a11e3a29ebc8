"""Each claim of the README as one command: `python -m benchmarks.NAME`, whose last line is one JSON object."""
