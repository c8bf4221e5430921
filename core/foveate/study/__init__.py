"""The long jobs behind the verbs: each reads a run or samples, works in batches, writes a product."""
