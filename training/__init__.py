"""Makes what ships for a target: training data, a distilled draft, early exits, a draft head, and the figures they reach."""
