"""Does an explanation name what the answer rests on? Perturbation curves, localisation, a leaderboard."""
