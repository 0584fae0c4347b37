"""The speculation core: the algorithm without I/O.

Two state machines, one for each side of a session. Neither knows a clock, a socket, Kafka, Redis, torch or vLLM: an
event goes in with the time at which it happened, actions come out, and the service around it carries them out. Nothing
else in the project decides what is drafted, sent, verified, committed or shown.

* `edge.EdgeSession`      drafts blocks, starts lanes from guesses and hints, forwards them, shows what was committed.
* `verifier.VerifierSession`  claims a session, verifies blocks and forwards, commits, answers, and goes on by itself.
* `outcomes`   what a verification may yield, ranked: from a draft's figures, from an exit's, from both.
* `pace`       what a session learns of its clocks, and what follows: block lengths, lanes at a time.

One round and the beginning of the next, as a dialogue::

    edge                                              verifier
    SendBlock(round 7, base 20, tokens d1…d5)  ─────▶ Received → Verify(base 20, d1…d5)
    StartDraft(lanes 8, 9, 10: likely outcomes)
    Drafted(lane 9, e1…e5)
    SendForward(round 8, if 7 ends with 3, t)  ─────▶ Received: kept
    HintArrived(layer 24: 3 accepted, then t)  ◀───── ExitSeen → Publish(Hint)          the pass still runs
                                                      EngineAnswered(d1 d2 d3 t) → Verify(round 8: e1…e5), Commit
    VerdictArrived(3, d1 d2 d3 t; took 8)      ◀───── Committed → Publish(Verdict)      while round 8 runs
    hit: lanes for what may follow round 8

Had no forward come true, the verifier would have gone on token by token (the AR floor) until a block arrives, less what
was said meanwhile; under the policy `cost` it would wait.

Two rules hold everywhere. *Tokens only come from verdicts* (or from Redis, which holds what verdicts said): hints and
lanes change when something happens, never what. *Positions decide, not messages*: every message says on how many
committed tokens it builds, so a lost, repeated or late one is recognised by its base and changes nothing.
"""
