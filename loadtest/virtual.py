"""The cores of edge and verifier in virtual time, with the real drafts of what ships: `scripts/bench virtual`.

What a rule of the speculation core is worth, in seconds and without noise: passes, draft steps, the link and commits
take the times that are set, the drafts are those of the real draft model and of the target's draft head along what the
real target says (recorded once, which takes minutes; `--record FILE` keeps them). One session, no exits. It predicts;
`scripts/bench compare` measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from loadtest.compare import PROMPTS, Question, questions
from loadtest.virtual_world import Outcome, Recorded, Timings, VirtualAnswer
from services.draft_gateway.drafting.engine import Draft, DraftRequest
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


@dataclass(frozen=True, slots=True)
class Row:
    """Means over the answers, each answer's time against that of passes of one row one after the other."""

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
    parser.add_argument("--rtt", default="5,50,200", help="round trips, ms (default: 5,50,200)")
    parser.add_argument("--policies", default="latency,cost", help="(default: latency,cost)")
    parser.add_argument("--gamma", type=int, default=5, help="longest block (default: 5)")
    for name, told in (
        ("message", "what a message takes beside the link"),
        ("fixed", "a pass without its rows"),
        ("row", "a row of a pass"),
        ("step", "a draft step"),
        ("lane", "a further lane of a draft step"),
        ("head", "the target's draft head behind a pass"),
    ):
        value = getattr(timings, name)
        parser.add_argument(
            f"--{name}-ms", type=float, default=value, help=f"{told}, ms (default: {value:g})"
        )
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Record what is not recorded yet, play, print."""
    try:
        rtts = [float(each) for each in arguments.rtt.split(",")]
        policies = [Policy(each) for each in arguments.policies.split(",")]
    except ValueError as error:
        raise InvalidRequest(
            f"--rtt takes numbers and --policies latency or cost, with commas: {error}"
        ) from None
    if arguments.count < 1 or arguments.max_tokens < LEAST:
        raise InvalidRequest(f"--count has to be at least 1 and --max-tokens at least {LEAST}")
    texts, foresight = recorded(arguments, lambda line: print(line, flush=True))
    base = Timings(
        message=arguments.message_ms,
        fixed=arguments.fixed_ms,
        row=arguments.row_ms,
        step=arguments.step_ms,
        lane=arguments.lane_ms,
        head=arguments.head_ms,
    )
    rows = []
    print("   RTT policy   × AR  tokens/block  floor  passes/token  taken  forwards/token")
    for rtt in rtts:
        for policy in policies:
            row = play(texts, replace(base, rtt=rtt), policy, arguments.gamma, foresight)
            rows.append(row)
            print(
                f"{rtt:6g} {policy.value:8} {row.times_ar:.3f}  {row.tokens_per_block:12.2f}  {row.floor_share:5.2f}  "
                f"{row.passes_per_token:12.2f}  {row.taken:5.2f}  {row.forwards_per_token:14.2f}"
            )
    if arguments.out is not None:
        held = {"timings": asdict(base), "prompts": len(texts), "rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return 0


def play(
    texts: Sequence[Recorded], timings: Timings, policy: Policy, gamma: int, foresight: Foresight
) -> Row:
    """All answers, one after the other; what one teaches, the next one knows."""
    settings = GatewaySettings()
    common, passes = Common(), Passes()
    outcomes: list[Outcome] = []
    played: list[EdgeStatistics] = []
    for text in texts:
        config = EdgeConfig(
            gateway="g",
            max_tokens=len(text.said),
            block_length=gamma,
            adaptive=True,
            policy=policy,
            hints=False,
            guesses=True,
            forwards=True,
            lane_threshold=settings.lane_threshold,
            max_lanes=settings.max_lanes,
            forwards_per_token=settings.forwards_per_token,
            foresight=foresight,
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
        policy=policy.value,
        times_ar=statistics.mean(each.ms_per_token for each in outcomes) / timings.pass_of(1),
        tokens_per_block=(tokens - floor_tokens) / max(1, blocks),
        floor_share=floor_tokens / tokens,
        passes_per_token=(blocks + sum(each.floors for each in outcomes)) / tokens,
        taken=sum(each.taken for each in played) / rounds,
        forwards_per_token=sum(each.forwards for each in played) / tokens,
    )


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
