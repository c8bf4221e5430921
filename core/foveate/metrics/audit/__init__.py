"""Which numbers of a table of attention statistics are mathematically impossible."""
