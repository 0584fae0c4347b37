"""Drawing tokens at random so that everyone who draws the same token draws alike.

* `rules`   what is asked for: a session's sampling parameters, and what stands before a row of logits.
* `noise`   the randomness: a function of seed, answer, position and token, the same number on every machine.
* `logits`  what vLLM's sampling parameters do to a row of logits, and the draw: the largest of logits plus noise.

Target, draft and early exits all draw with these, so that verification is equality of tokens at any temperature.
"""
