"""What exact attention costs: ``python -m benchmarks.engine`` prints the table. Not part of the package."""
