"""Drawing tokens at random so that everyone who draws the same token draws alike.

* `rules`   what is asked for: a session's sampling parameters, and what stands before a row of logits.
* `noise`   the randomness: a function of seed, answer, position and token, the same number on every machine.
* `logits`  what vLLM's sampling parameters do to a row of logits, and the draw: the largest of logits plus noise.

Target, draft and early exits all draw with these, so that verification is equality of tokens at any temperature.

On request drafts are judged by the ratio of probabilities instead:

* `ratio`      the rule: accept with probability min(1, p/q), else draw from the residual.
* `sparse`     what a draft's distribution is as bytes; it is truncated and rounded before it is drawn from.
* `conformal`  how much of it is kept, row by row.
"""
