"""Drawing tokens at random so that everyone who draws the same token draws alike.

`noise` is the randomness: a function of seed, answer, position and token, the same number on every machine. `logits` is
what vLLM's sampling parameters do to a row of logits, and the draw itself: the largest of the processed logits plus noise.
Target, draft and early exits all draw with it, so that verification is equality of tokens at any temperature.
"""
