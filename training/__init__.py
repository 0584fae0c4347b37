"""Makes the pair for a target: training data, a distilled draft, early exits, and the figures that they reach."""
