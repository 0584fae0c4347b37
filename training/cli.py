"""`outrider train data|draft|exits` and `outrider evaluate`: arguments in, runs out.

What the commands do is in the modules beside this one, imported when they are needed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidRequest, ModelFilesError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import device as Device

    from training.draft import DraftModel, DraftTrainer
    from training.draft_head import HeadTrainer
    from training.exits import ExitTrainer
    from training.llama import Target

Subparsers = Any  # argparse keeps the type of what add_subparsers returns private
DEFAULT_DEPTHS = (0.6, 0.7, 0.8)


def add_commands(commands: Subparsers) -> None:
    """Adds `train` and `evaluate`; each parser's default `command` takes the parsed arguments, returns a status."""
    train = commands.add_parser(
        "train", help="make training data, a draft model or exit modules for a target"
    )
    steps = train.add_subparsers(title="commands", required=True, metavar="COMMAND")
    data = steps.add_parser("data", help="let the target talk to itself", description=_data.__doc__)
    _target(data)
    data.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the shards go; resumes there"
    )
    data.add_argument("--tokens", type=_count, default=1_000_000, help="how many in all (default: 1000000)")
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--streams", type=_count, default=64, help="streams sampled at a time (GPU: 4096)")
    data.add_argument("--length", type=_count, default=512, help="tokens a stream (default: 512)")
    data.add_argument("--long-length", type=_count, default=1536, help="the same with long documents")
    data.add_argument(
        "--long-every", type=int, default=4, help="every n-th shard holds long documents; 0: none"
    )
    _run_options(data)
    data.set_defaults(command=_data)

    draft = steps.add_parser("draft", help="distil a small draft model", description=_draft.__doc__)
    _target(draft)
    _training_options(draft)
    draft.add_argument("--layers", help="target layers it starts from, counted from 0, such as 0,1,2,29")
    draft.add_argument(
        "--depth", type=_count, default=8, help="how many layers, without --layers (default: 8)"
    )
    draft.add_argument("--vocabulary", type=_count, default=12_288, help="output tokens (default: 12288)")
    draft.set_defaults(command=_draft)

    exits = steps.add_parser("exits", help="train early exits on a frozen target", description=_exits.__doc__)
    _target(exits)
    _training_options(exits)
    exits.add_argument(
        "--draft", type=Path, required=True, metavar="DIR", help="the draft whose blocks they judge"
    )
    exits.add_argument("--layers", help="exits after these layers, counted from 1, such as 18,21,24")
    exits.add_argument(
        "--width", type=_count, help="width of the adapters; by default 4 %% of the target in all"
    )
    exits.add_argument(
        "--calibration-texts", type=_count, default=96, help="texts played to calibrate (default: 96)"
    )
    exits.set_defaults(command=_exits)

    head = steps.add_parser(
        "head", help="train a draft head for the verifier's own floor", description=_head.__doc__
    )
    _target(head)
    _training_options(head)
    head.add_argument(
        "--layers",
        help="it reads the states after these, counted from 1, such as 10,20,30; the last included",
    )
    head.add_argument("--window", type=int, default=128, help="places it attends to; 0: none (default: 128)")
    head.add_argument("--width", type=_count, default=1024, help="of its first MLP (default: 1024)")
    head.add_argument("--further-width", type=_count, default=768, help="of its second (default: 768)")
    head.add_argument("--rate", type=float, default=4e-3, help="learning rate (default: 0.004)")
    head.add_argument("--start", type=Path, metavar="FILE", help="a written head to go on from")
    head.set_defaults(command=_head)

    fit = steps.add_parser(
        "calibration", help="fit what draft and exits promise to what happens", description=_fit.__doc__
    )
    _target(fit)
    fit.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="shards that were not trained on"
    )
    fit.add_argument("--draft", type=Path, required=True, metavar="DIR", help="gets foresight.json")
    fit.add_argument("--exits", type=Path, required=True, metavar="FILE", help="gets a calibration")
    fit.add_argument("--texts", type=_count, default=96, help="texts played (default: 96)")
    fit.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    fit.set_defaults(command=_fit)

    evaluate = commands.add_parser(
        "evaluate", help="measure draft and exits on prompts", description=_evaluate.__doc__
    )
    _target(evaluate)
    evaluate.add_argument("--draft", type=Path, metavar="DIR", help="by default the one that ships")
    evaluate.add_argument("--exits", type=Path, metavar="FILE", help="by default those that ship")
    evaluate.add_argument("--no-exits", action="store_true", help="measure drafts only")
    evaluate.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="JSON lines, as Spec-Bench's"
    )
    evaluate.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where results go; resumes there"
    )
    evaluate.add_argument("--limit", type=_count, help="so many prompts, evenly spread")
    evaluate.add_argument(
        "--round-texts", type=_count, help="play rounds with exits on so many (default: all)"
    )
    evaluate.add_argument(
        "--max-tokens", type=_count, default=256, help="length of a continuation (default: 256)"
    )
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    evaluate.add_argument("--threads", type=_count, default=1, help="CPU threads (default: 1)")
    evaluate.set_defaults(command=_evaluate)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", type=Path, metavar="DIR", help="Hugging Face directory; by default the one that ships"
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--max-seconds", type=float, help="end in time; without, a seed reproduces the result"
    )


def _training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="shards of `outrider train data`"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results and checkpoints; resumes there"
    )
    parser.add_argument("--steps", type=_count, default=2_000)
    parser.add_argument("--batch-tokens", type=_count, default=36_864)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-every", type=_count, default=500, help="steps between checkpoints (default: 500)"
    )
    parser.add_argument("--say-every", type=_count, default=50, help="steps between figures (default: 50)")
    _run_options(parser)


def _directory(arguments: argparse.Namespace) -> Path:
    from shared.models import fetch

    return arguments.target if arguments.target is not None else fetch()


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("--device cuda: this PyTorch sees no GPU; use --device cpu")
    return name


def _load(arguments: argparse.Namespace) -> tuple[Path, Target, Tokenizer, bool]:
    """Target directory, target (bfloat16 on a GPU), tokenizer, and whether to compile."""
    import torch
    from tokenizers import Tokenizer

    from training.llama import load_target

    directory, device = _directory(arguments), _device(arguments.device)
    cuda = device == "cuda"
    target = load_target(directory, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelFilesError(f"{directory} holds no tokenizer.json")
    return directory, target, Tokenizer.from_file(str(path)), cuda


def _header(directory: Path, **more: object) -> dict[str, str]:
    from shared.models import target_sha256, tokenizer_sha256

    made_for = {
        "target": directory.name,
        "target_sha256": target_sha256(directory),
        "tokenizer_sha256": tokenizer_sha256(directory),
    }
    return made_for | {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in more.items()
    }


def _data(arguments: argparse.Namespace) -> int:
    """Samples training text from the target itself, shard by shard; run again to go on."""
    from shared.models import target_sha256
    from training.data import DataPlan, make_data

    directory, target, tokenizer, _ = _load(arguments)
    plan = DataPlan(
        seed=arguments.seed,
        tokens=arguments.tokens,
        streams=arguments.streams,
        length=arguments.length,
        long_length=arguments.long_length,
        long_every=arguments.long_every,
        max_seconds=arguments.max_seconds,
    )
    made = make_data(target, tokenizer, plan, arguments.out, target_sha256=target_sha256(directory))
    print(f"{made:,} tokens in {arguments.out}")
    return 0


def _layers(text: str | None, default: tuple[int, ...], least: int, most: int) -> tuple[int, ...]:
    if text is None:
        return default
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(f"--layers {text} is no list such as 18,21,24") from None
    if not all(least <= layer <= most for layer in layers) or list(layers) != sorted(set(layers)):
        raise InvalidRequest(f"--layers {text}: rising numbers from {least} to {most} are needed")
    return layers


def spread(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` layers to start a draft from: the first ones, the last two, the rest evenly between."""
    count = min(count, depth)
    if count <= 4:
        return tuple(sorted({*range(count - 1), depth - 1}))
    ends = [0, 1, 2, depth - 2, depth - 1]
    between = [3 + round((depth - 5) * (step + 1) / (count - 4)) for step in range(count - 5)]
    return tuple(sorted({*ends, *between}))[:count]


def _train(trainer: DraftTrainer | ExitTrainer | HeadTrainer, name: str, out: Path, device: Device) -> None:
    """Go on from the checkpoint `name`.pt in `out`, if there is one, until the plan is met; save on the way and after."""
    import torch

    from training.draft import save_checkpoint
    from training.progress import Journal

    checkpoint = out / f"{name}.pt"
    if checkpoint.exists():
        trainer.load_state(torch.load(checkpoint, map_location=device, weights_only=True))
        print(f"{name}: going on from step {trainer.step}")

    def save() -> None:
        save_checkpoint(checkpoint, trainer.state())

    trainer.run(Journal(out / "training.jsonl", print), save)
    save()


def _draft(arguments: argparse.Namespace) -> int:
    """Distils a draft from the target; run again to go on from the last checkpoint."""

    from training.data import load_groups
    from training.draft import (
        DraftModel,
        DraftPlan,
        DraftTrainer,
        common_tokens,
        write_draft,
    )

    directory, target, _, cuda = _load(arguments)
    depth = target.config.num_hidden_layers
    plan = DraftPlan(
        layers=_layers(arguments.layers, spread(depth, arguments.depth), 0, depth - 1),
        vocabulary=arguments.vocabulary,
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        max_seconds=arguments.max_seconds,
        save_every=arguments.save_every,
        say_every=arguments.say_every,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens, roles = load_groups(arguments.data, target.embedding.device)
    vocabulary = common_tokens(tokens, roles, plan.vocabulary, target.config.vocab_size)
    draft: DraftModel = DraftModel.from_target(target, vocabulary, plan.layers, seed=plan.seed)
    draft = draft.to(target.embedding.device)
    trainer = DraftTrainer(target, draft, plan, tokens, roles, compiled=cuda)
    _train(trainer, "draft", arguments.out, target.embedding.device)
    figures = trainer.held_out()
    header = _header(
        directory,
        start_layers=list(plan.layers),
        data_tokens=sum(part.numel() for part in tokens),
        steps=trainer.step,
        seed=plan.seed,
        figures=figures,
    )
    size = write_draft(arguments.out / "draft", draft, header)
    print(
        f"{arguments.out / 'draft'}: {size / 1e6:.1f} MB, agreement on held-out text {figures['held_out_agreement']:.3f}"
    )
    return 0


def _exits(arguments: argparse.Namespace) -> int:
    """Trains exit modules and calibrates them; run again to go on from the last checkpoint."""
    import torch

    from training.calibrate import Files, answers, calibrate, held_out
    from training.data import load_groups
    from training.draft import common_tokens, read_draft
    from training.exits import ExitPlan, ExitTrainer, fitting_width, write_exits

    directory, target, _, cuda = _load(arguments)
    config = target.config
    depth = config.num_hidden_layers
    default = tuple(sorted({max(1, round(share * depth)) for share in DEFAULT_DEPTHS}))
    layers = _layers(arguments.layers, default, 1, depth - 1)
    plan = ExitPlan(
        layers=layers,
        width=arguments.width or fitting_width(target, len(layers)),
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        max_seconds=arguments.max_seconds,
        save_every=arguments.save_every,
        say_every=arguments.say_every,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens, roles = load_groups(arguments.data, target.embedding.device)
    vocabulary = common_tokens(tokens, roles, plan.vocabulary, config.vocab_size)
    draft = read_draft(arguments.draft).to(target.embedding.device)
    trainer = ExitTrainer(target, draft, plan, vocabulary, tokens, roles, compiled=cuda)
    _train(trainer, "exits", arguments.out, target.embedding.device)
    header = _header(
        directory,
        hidden_size=config.hidden_size,
        data_tokens=sum(part.numel() for part in tokens),
        steps=trainer.step,
        seed=plan.seed,
    )
    path = arguments.out / "exits.safetensors"
    size = write_exits(path, trainer.exits, vocabulary, header, torch.bfloat16)
    texts = answers(held_out(tokens), held_out(roles), arguments.calibration_texts)
    calibrate(Files(directory, arguments.draft, path), texts, target.embedding.device, print)
    print(f"{path}: {size / 1e6:.1f} MB, exits after layers {', '.join(map(str, layers))}")
    return 0


def _head(arguments: argparse.Namespace) -> int:
    """Trains a draft head; run again to go on from the last checkpoint."""
    import torch

    from services.verifier.engine.draft_head import HeadShape
    from services.verifier.engine.draft_head_files import read_head, write_head
    from services.verifier.engine.exit_files import TargetFacts
    from training.data import load_groups
    from training.draft import common_tokens
    from training.draft_head import HeadPlan, HeadTrainer

    directory, target, _, cuda = _load(arguments)
    config = target.config
    depth = config.num_hidden_layers
    thirds = tuple(sorted({max(1, round(depth / 3)), max(1, round(2 * depth / 3)), depth}))
    layers = _layers(arguments.layers, thirds, 1, depth)
    if layers[-1] != depth:
        raise InvalidRequest(f"--layers {arguments.layers}: the last one has to be the target's, {depth}")
    shape = HeadShape(
        hidden_size=config.hidden_size,
        layers=layers,
        window=arguments.window,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        width=arguments.width,
        further_width=arguments.further_width,
        rope_theta=config.rope_theta,
        eps=config.rms_norm_eps,
    )
    plan = HeadPlan(
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        matrix_rate=arguments.rate,
        seed=arguments.seed,
        max_seconds=arguments.max_seconds,
        save_every=arguments.save_every,
        say_every=arguments.say_every,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens, roles = load_groups(arguments.data, target.embedding.device)
    vocabulary = common_tokens(tokens, roles, plan.vocabulary, config.vocab_size)
    trainer = HeadTrainer(target, shape, plan, vocabulary, tokens, roles, compiled=cuda)
    if arguments.start is not None:
        facts = TargetFacts(
            directory, config.hidden_size, config.vocab_size, config.rms_norm_eps, torch.float32
        )
        begun = read_head(arguments.start, facts, depth)
        if replace(begun.shape, window=shape.window) != shape:
            raise InvalidRequest(f"--start {arguments.start} has other sizes: {begun.shape}")
        trainer.head.load_state_dict(begun.state_dict())
    _train(trainer, "head", arguments.out, target.embedding.device)
    right = trainer.held_out()
    header = _header(
        directory,
        data_tokens=sum(part.numel() for part in tokens),
        steps=trainer.step,
        seed=plan.seed,
        figures={f"held_out_right_{place}": round(share, 4) for place, share in enumerate(right, 1)},
    )
    path = arguments.out / "head.safetensors"
    size = write_head(path, trainer.head, header)
    shown = ", ".join(f"{share:.3f}" for share in right)
    print(f"{path}: {size / 1e6:.1f} MB, all right up to each place on held-out text: {shown}")
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    """Plays rounds on text that was not trained on and fits the confidences of draft and exits to what happens."""
    import torch

    from training.calibrate import Files, answers, calibrate
    from training.data import load_groups

    directory, device = _directory(arguments), torch.device(_device(arguments.device))
    texts = answers(*load_groups(arguments.data, device), arguments.texts)
    calibrate(Files(directory, arguments.draft, arguments.exits), texts, device, print)
    print(f"{arguments.exits} and {arguments.draft / 'foresight.json'}: fitted on {len(texts)} texts")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    """Measures draft, prompt lookup, both together and the exits; writes evaluate.json, a table and charts."""
    from shared.pair import shipped_draft, shipped_exits
    from training.evaluate import EvaluatePlan, evaluate, table

    target = _directory(arguments)
    exits = None if arguments.no_exits else arguments.exits or shipped_exits(target)
    result = evaluate(
        EvaluatePlan(
            target=target,
            draft=arguments.draft or shipped_draft(target),
            exits=exits,
            prompts=arguments.prompts,
            out=arguments.out,
            most_tokens=arguments.max_tokens,
            limit=arguments.limit,
            round_texts=arguments.round_texts,
            device=_device(arguments.device),
            threads=arguments.threads,
        )
    )
    print(table(result))
    return 0
