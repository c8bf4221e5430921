"""Layer-wise relevance propagation through any model: its forward as operations, and a rule for each kind.

recording.py     what ran: torch's elementary operations, with the tensors that they took and gave
rules.py         one relevance rule a function, from the paper
operations.py    which rule serves which operation
propagation.py   the sweep from the score down to the lowest attention
"""
