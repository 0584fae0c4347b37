"""The speculation core: the algorithm without I/O.

Two state machines, one for each side of a session. Neither knows a clock, a socket, Kafka, Redis, torch or vLLM: an
event goes in with the time at which it happened, actions come out, and the service around it carries them out. Nothing
else in the project decides what is drafted, sent, verified, committed or shown.

* `edge.EdgeSession`      drafts blocks, starts lanes from hints, shows what was committed.
* `verifier.VerifierSession`  claims a session, verifies its blocks one at a time, commits, then answers.

One round, as a dialogue::

    edge                                              verifier
    SendBlock(round 7, base 20, tokens d1…d5)  ─────▶ Received → Verify(base 20, d1…d5)
    HintArrived(layer 24: 3 accepted, then t)  ◀───── ExitSeen → Publish(Hint)          the pass still runs
    StartDraft(lane 9, assuming d1 d2 d3 t)
    Drafted(lane 9, e1…e5)
    VerdictArrived(accepted 3, d1 d2 d3 t)     ◀───── EngineAnswered → Commit → Committed → Publish(Verdict)
    hit: SendBlock(round 8, base 24, e1…e5)    ─────▶

Two rules hold everywhere. *Tokens only come from verdicts* (or from Redis, which holds what verdicts said): hints and
lanes change when something happens, never what. *Positions decide, not messages*: every message says on how many
committed tokens it builds, so a lost, repeated or late one is recognised by its base and changes nothing.
"""
