"""The cores of edge and verifier in virtual time, with the real drafts of what ships: `scripts/bench virtual`.

What a rule of the speculation core is worth, in seconds and without noise: passes, draft steps, the link and commits
take the times that are set, the drafts are those of the real draft model and of the target's draft head along what the
real target says (recorded once, which takes minutes; `--record FILE` keeps them). One session, no exits. It predicts;
`scripts/bench compare` measures. With `--paper` the drafts are those that `scripts/bench compare --paper` replays, in its
timings, and times are told beside those of sync speculative decoding: synthetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from loadtest.compare import (
    HEAD_ACCEPTANCE,
    PAPER_DRAFT_MS,
    PAPER_GAMMA,
    PAPER_PASS_MS,
    PAPER_RTT_MS,
    PROMPTS,
    Question,
    questions,
)
from loadtest.replay_head import NONE as NO_HEAD
from loadtest.replay_head import HeadOptions, head_drafts, parse_head
from loadtest.virtual_world import Outcome, Recorded, Timings, VirtualAnswer
from services.draft_gateway.drafting.engine import Draft, DraftRequest
from services.draft_gateway.drafting.replay import ReplayDraft, Replayed, ReplayOptions
from services.draft_gateway.settings import GatewaySettings
from services.verifier.session_shell import Passes
from shared.errors import InvalidRequest
from shared.pair import read_foresight, shipped_draft, shipped_head
from shared.protocol import Policy
from shared.speculation.edge import EdgeConfig, EdgeStatistics
from shared.speculation.outcomes import Foresight
from shared.speculation.pace import Common

LENGTH: Final = 8
"""Tokens that are recorded from each position on; a longer draft goes on with what was recorded where it ends."""
LEAST: Final = 12
"""An answer of fewer tokens says little of how fast tokens come."""
Say = Callable[[str], None]


PAPER: Final = Timings(
    rtt=PAPER_RTT_MS,
    message=3.0,
    fixed=PAPER_PASS_MS,
    row=0.0,
    step=PAPER_DRAFT_MS,
    lane=0.1 * PAPER_DRAFT_MS,
    head=40.0,
)
"""The paper's timings. A further lane adds what it adds to a replayed step."""
SYNC: Final = "sync"
TIMES: Final = {
    "message": "what a message takes beside the link",
    "fixed": "a pass without its rows",
    "row": "a row of a pass",
    "step": "a draft step",
    "lane": "a further lane of a draft step",
    "head": "the target's draft head behind a pass",
}
"""Timings that are options, and what they say."""


@dataclass(frozen=True, slots=True)
class Row:
    """Means over the answers, each answer's time against that of passes of one row one after the other. `policy` may be
    `SYNC`: each block is drafted after the verdict, under policy cost."""

    rtt_ms: float
    policy: str
    times_ar: float
    tokens_per_block: float
    floor_share: float
    passes_per_token: float
    taken: float
    forwards_per_token: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    timings = Timings()
    parser.add_argument("--count", type=int, default=12, help="prompts, balanced over families (default: 12)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON Lines of category and turns")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer (default: 48)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the drafts there, and reuse them")
    parser.add_argument("--rtt", help="round trips, ms (default: 5,50,200; 96 with --paper)")
    parser.add_argument("--policies", default="latency,cost", help="(default: latency,cost)")
    parser.add_argument("--gamma", type=int, help="longest block (default: 5; 4 with --paper)")
    parser.add_argument(
        "--paper", action="store_true", help="the paper's own timings, drafts that are replayed (synthetic)"
    )
    parser.add_argument(
        "--head-acceptance",
        default=HEAD_ACCEPTANCE,
        help=f"of the draft head in --paper; 0 or none is no head (default: {HEAD_ACCEPTANCE})",
    )
    for name, told in TIMES.items():
        value = getattr(timings, name)
        parser.add_argument(
            f"--{name}-ms",
            type=float,
            help=f"{told}, ms (default: {value:g}; {getattr(PAPER, name):g} with --paper)",
        )
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Record what is not recorded yet, play, print."""
    usual = PAPER if arguments.paper else Timings()
    try:
        rtts = [
            float(each)
            for each in (arguments.rtt or (f"{PAPER.rtt:g}" if arguments.paper else "5,50,200")).split(",")
        ]
        policies = [Policy(each) for each in arguments.policies.split(",")]
    except ValueError as error:
        raise InvalidRequest(
            f"--rtt takes numbers and --policies latency or cost, with commas: {error}"
        ) from None
    if arguments.count < 1 or arguments.max_tokens < LEAST:
        raise InvalidRequest(f"--count has to be at least 1 and --max-tokens at least {LEAST}")
    gamma = arguments.gamma if arguments.gamma is not None else PAPER_GAMMA if arguments.paper else 5
    if arguments.paper:
        head = (
            None
            if arguments.head_acceptance in NO_HEAD
            else parse_head(f"acceptance={arguments.head_acceptance}")
        )
        texts = [replayed(number, arguments.max_tokens, gamma, head) for number in range(arguments.count)]
        foresight = Foresight()
    else:
        texts, foresight = recorded(arguments, lambda line: print(line, flush=True))
    given = {name: getattr(arguments, f"{name}_ms") for name in TIMES}
    base = replace(usual, **{name: value for name, value in given.items() if value is not None})
    rows = []
    print("   RTT policy   × AR  tokens/block  floor  passes/token  taken  forwards/token")
    for rtt in rtts:
        for policy in policies if not arguments.paper else (SYNC, *policies):
            row = play(texts, replace(base, rtt=rtt), policy, gamma, foresight)
            rows.append(row)
            print(
                f"{rtt:6g} {row.policy:8} {row.times_ar:.3f}  {row.tokens_per_block:12.2f}  {row.floor_share:5.2f}  "
                f"{row.passes_per_token:12.2f}  {row.taken:5.2f}  {row.forwards_per_token:14.2f}"
                + (f"  {rows[0].times_ar / row.times_ar:.2f} x faster than sync" if arguments.paper else "")
            )
    if arguments.out is not None:
        held = {"timings": asdict(base), "prompts": len(texts), "rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return 0


def play(
    texts: Sequence[Recorded], timings: Timings, policy: Policy | str, gamma: int, foresight: Foresight
) -> Row:
    """All answers, one after the other; what one teaches, the next one knows. `policy` may be `SYNC`."""
    settings = GatewaySettings()
    ahead = policy != SYNC
    common, passes = Common(), Passes()
    outcomes: list[Outcome] = []
    played: list[EdgeStatistics] = []
    for text in texts:
        config = EdgeConfig(
            gateway="g",
            max_tokens=len(text.said),
            block_length=gamma,
            adaptive=ahead,
            policy=Policy(policy) if ahead else Policy.COST,
            hints=False,
            guesses=ahead,
            forwards=ahead,
            lane_threshold=settings.lane_threshold,
            max_lanes=settings.max_lanes,
            forwards_per_token=settings.forwards_per_token,
            foresight=foresight,
            round_trip_ms=timings.rtt + 2 * timings.message,
            common=common,
        )
        answer = VirtualAnswer(text, timings, config, common, passes)
        outcomes.append(answer.play())
        played.append(answer.edge.statistics)
    tokens = sum(each.tokens for each in played)
    floor_tokens = sum(each.floor_tokens for each in outcomes)
    rounds = max(1, sum(each.rounds for each in played))
    blocks = sum(each.blocks for each in outcomes)
    return Row(
        rtt_ms=timings.rtt,
        policy=str(policy),
        times_ar=statistics.mean(each.ms_per_token for each in outcomes) / timings.pass_of(1),
        tokens_per_block=(tokens - floor_tokens) / max(1, blocks),
        floor_share=floor_tokens / tokens,
        passes_per_token=(blocks + sum(each.floors for each in outcomes)) / tokens,
        taken=sum(each.taken for each in played) / rounds,
        forwards_per_token=sum(each.forwards for each in played) / tokens,
    )


# --- replaying ----------------------------------------------------------------------------------------------------


def replayed(number: int, most: int, gamma: int, head: HeadOptions | None) -> Recorded:
    """An answer of `most` tokens in which nothing can be looked up, the replayed draft of it and the replayed head's.
    Answers of other numbers are other ones."""
    prompt, said = tuple(range(1, 2 + number)), tuple(range(1000, 1000 + 8 * most, 8))
    engine = ReplayDraft([Replayed(prompt, said)], ReplayOptions())
    drafts = tuple(
        engine.draft([DraftRequest("s", 0, (*prompt, *said[:at]), 2 * gamma, True)])[0]
        for at in range(1, most)
    )
    headed = () if head is None else tuple(head_drafts(head, len(prompt), said, at) for at in range(1, most))
    return Recorded("synthetic", prompt, said, drafts, headed)


# --- recording ----------------------------------------------------------------------------------------------------


def recorded(arguments: argparse.Namespace, say: Say) -> tuple[list[Recorded], Foresight]:
    """What target and draft model say, from the file if it holds that; and what the draft's words are worth."""
    from shared.models import fetch

    target = fetch()
    draft = shipped_draft(target)
    asked = questions(arguments.prompts, target, arguments.count, 256)
    texts: list[Recorded] = []
    if arguments.record is not None and arguments.record.exists():
        texts = _read(arguments.record)
    prompts = [text.prompt for text in texts]
    if prompts != [question.tokens for question in asked] or any(
        len(text.said) > arguments.max_tokens for text in texts
    ):
        texts = list(_record(asked, target, draft, arguments.max_tokens, say))
        if arguments.record is not None:
            arguments.record.write_text(json.dumps([asdict(text) for text in texts]), encoding="utf-8")
    return [text for text in texts if len(text.said) >= LEAST], read_foresight(draft)


def _record(
    asked: Sequence[Question], target: Path, directory: Path, most: int, say: Say
) -> Iterator[Recorded]:
    import torch

    from services.draft_gateway.drafting.llama import LlamaDraft
    from services.verifier.engine.draft_head_files import read_head
    from services.verifier.engine.exit_files import TargetFacts
    from services.verifier.engine.exit_head import Naming, best_head
    from services.verifier.engine.floor_head import CommittedRows, FloorHead
    from shared.text import Tokenizer
    from training.llama import load_target
    from training.rollout import Continuation, greedy

    say(f"recording {len(asked)} answers and their drafts")
    end = Tokenizer.load(target).encode("<|im_end|>")[0]
    model = load_target(target, device="cpu", dtype=torch.float32)
    config = model.config
    facts = TargetFacts(target, config.hidden_size, config.vocab_size, config.rms_norm_eps, torch.float32)
    head = read_head(shipped_head(target), facts, config.num_hidden_layers)
    naming = best_head(model.logits, model.head, Naming())
    longest = most + max(len(question.tokens) for question in asked)
    floor = FloorHead(head, model.decoder.normed, naming, model.embedding, longest=longest)
    engine = LlamaDraft.load(directory, target=target, threads=1, cache_tokens=65536)

    def headed(text: Continuation) -> Iterator[tuple[tuple[int, float], ...]]:
        """What the head says after each token of the answer but the last, fed as the engine feeds it."""
        said, kept = model.decoder.full(model.embed(torch.tensor([text.text])), head.shape.layers)
        states = {layer: kept.get(layer, said)[0] for layer in head.shape.layers}
        begin = 0
        for end in range(len(text.prompt), len(text.text) - 1):
            floor.tap.states = {layer: rows[begin:end] for layer, rows in states.items()}
            found = floor.drafts([CommittedRows("s", 0, begin, text.text[begin + 1 : end + 1], text.text)])
            yield tuple(found.get("s", ()))
            begin = end
        floor.forget(["s"])

    for question in asked:
        (text,) = greedy(model, [question.tokens], most=most, end=end)
        drafts = [
            engine.draft([DraftRequest("s", 0, (*text.prompt, *text.tokens[:at]), LENGTH, True)])[0]
            for at in range(1, len(text.tokens))
        ]
        engine.forget("s")
        say(f"  {question.family}: {len(text.tokens)} tokens")
        yield Recorded(question.family, text.prompt, text.tokens, tuple(drafts), tuple(headed(text)))


def _read(path: Path) -> list[Recorded]:
    """The file of an earlier run; `InvalidRequest` when it is none."""
    try:
        return [
            Recorded(
                each["family"],
                tuple(each["prompt"]),
                tuple(each["said"]),
                tuple(
                    Draft(
                        tuple(draft["tokens"]),
                        tuple(draft["confidences"]),
                        tuple(
                            tuple((int(token), float(share)) for token, share in place)
                            for place in draft["alternatives"]
                        ),
                    )
                    for draft in each["drafts"]
                ),
                tuple(
                    tuple((int(token), float(chance)) for token, chance in place)
                    for place in each.get("headed", ())
                ),
            )
            for each in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"--record: {path} is no record of drafts ({error!r}); name another file"
        ) from error
