"""The command `bitvla`: parse, call, print. What a command does is in the module it calls.

Whatever happens, a person sees one line: exit status 0 is success, 1 a failure (`error: ...` on standard error), 2 bad
usage, 130 an interruption. Heavy modules are imported by the command that needs them, so that `--help` is immediate
and a robot never loads PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bitvla import __version__
from bitvla.errors import BitvlaError, meant
from bitvla.robot import ROBOTS

STAGES = ("align", "instruct", "localize", "pretrain", "finetune", "distill")
PACKINGS = ("2bit", "base3")
EXPERTS = ("bfloat16", "int8", "ternary")
MATRICES: dict[str, Any] = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
KINDS = ("libero", "vision-language", "vision-language-bf16-tower", "pretrained", "language", "language-bf16", "siglip")
PROTOCOLS = ("openpi", "lerobot", "gr00t")
JOININGS = ("replace", "weighted_average", "temporal_ensemble", "real_time_chunking")
GO_ON = "run the same command to go on where it stopped"
NOTHING_LEFT = "nothing half-written was left behind"


# Commands: arguments in, result out. A result is plain data; one that says `"passed": False` is a failure.


def _demo(args: argparse.Namespace) -> Any:
    from bitvla.evaluate.demo import demo

    return demo(args.policy, out=args.out, processes=args.processes)


def _record(args: argparse.Namespace) -> Any:
    from bitvla.runtime.machine import cores
    from bitvla.sim.record import record

    return record(
        env=args.env,
        suite=args.suite,
        episodes=args.episodes,
        out=args.out,
        processes=args.processes or cores(),
        image_size=args.image_size,
        seed=args.seed,
    )


def _questions(args: argparse.Namespace) -> Any:
    from bitvla import progress
    from bitvla.sim.questions import make_questions

    with progress.bar("asking") as show:
        return make_questions(
            args.out, args.images, args.test_images, seed=args.seed, image_size=args.image_size, progress=show
        )


def _data_check(args: argparse.Namespace) -> Any:
    import msgspec

    from bitvla import display, progress
    from bitvla.data.check import check, write_split
    from bitvla.data.check.report import report

    with progress.bar("checking") as show:
        checkup = check(args.dataset, horizon=args.horizon, progress=show)
    shown = msgspec.to_builtins(checkup) if args.json else display.checkup(checkup)
    written = {}
    if args.out is not None:
        written["report"] = report(checkup, args.out)
    if args.split is not None:
        try:
            written["split"] = write_split(checkup, args.split)
        except BitvlaError:
            _print(shown, args)  # what was found may be why
            raise
    return shown if args.json else shown | written


def _data_convert(args: argparse.Namespace) -> Any:
    from bitvla import progress
    from bitvla.data.convert import convert

    with progress.bar("converting") as show:
        return convert(
            args.source,
            args.out,
            cameras=dict(args.camera),
            fps=args.fps,
            rotate180=args.rotate180,
            drop_no_ops=args.drop_no_ops,
            progress=show,
        )


def _data_statistics(args: argparse.Namespace) -> Any:
    from bitvla.data.lerobot import write_statistics

    return write_statistics(args.dataset)


def _train(args: argparse.Namespace) -> Any:
    parents = {"init": args.init, "tower": args.tower, "teacher": args.teacher}
    if args.plan:
        from bitvla.train.plan import plan

        return plan(
            args.stage, args.config, data=args.data or (), devices=args.devices or 1, tflops=args.tflops, **parents
        )
    from bitvla.train.loop import run

    if args.devices is not None or args.tflops is not None:
        raise BitvlaError(
            "--devices and --tflops are of --plan; several devices train with torchrun (docs/training.md)"
        )
    if not args.data or args.out is None:
        raise BitvlaError("training needs --data and --out; --plan does without")
    result = run(args.stage, args.config, args.data, args.out, cache_bytes=args.cache_size, **parents)
    return result if os.environ.get("RANK", "0") == "0" else None  # one of several processes speaks


def _pack(args: argparse.Namespace) -> Any:
    from bitvla import progress
    from bitvla.convert.pack import pack

    with progress.bar("packing") as show:
        return pack(
            args.checkpoint,
            args.out,
            round_full_precision=args.round,
            views=args.views,
            statistics=args.statistics,
            packing=args.packing,
            control_hz=args.control_hz,
            matrix_dtype=MATRICES.get(args.matrices),
            expert=args.expert,
            progress=show,
        )


def _make_checkpoint(args: argparse.Namespace) -> Any:
    from bitvla import progress
    from bitvla.convert.make_checkpoint import make_checkpoint

    with progress.bar("writing") as show:
        return make_checkpoint(
            args.out,
            kind=args.kind,
            reduced=args.reduced,
            views=args.views,
            seed=args.seed,
            statistics=args.statistics,
            progress=show,
        )


def _chat(args: argparse.Namespace) -> Any:
    from bitvla.runtime import chat
    from bitvla.runtime.language import Sampler

    sampler = Sampler(args.temperature, args.top_p, args.seed)
    run = chat.answer if args.json else chat.chat
    return run(
        args.model,
        args.prompt,
        images=args.image,
        max_tokens=args.max_tokens,
        sampler=sampler,
        threads=args.threads,
    )


def _verify(args: argparse.Namespace) -> Any:
    from bitvla.runtime.verify import verify

    return verify(args.policy)


def _inspect(args: argparse.Namespace) -> Any:
    from bitvla import display
    from bitvla.runtime.inspect import inspect

    description = inspect(args.policy)
    return description if args.json else display.inspection(description)


def _bench(args: argparse.Namespace) -> Any:
    from bitvla.runtime.bench import bench

    return bench(
        args.policy,
        threads=args.threads,
        repeats=args.repeats,
        views=args.views,
        prune=args.prune,
        batch=args.batch,
    )


def _eval(args: argparse.Namespace) -> Any:
    from bitvla import display
    from bitvla.evaluate.rollout import evaluate
    from bitvla.sim import make_simulator

    if args.protocol and args.env != "libero":
        raise BitvlaError(f"--protocol is for --env libero: '{args.env}' has one protocol only")
    # A result is a record: it is always kept, and an interrupted evaluation goes on from it.
    if args.prune and args.full_precision:
        raise BitvlaError("--prune is for policy files; --full-precision runs a checkpoint")
    policy: Any = args.policy
    if args.prune:
        import bitvla

        policy = partial(bitvla.load, args.policy.absolute(), threads=1, prune=args.prune)  # of any process's folder
    precision = "-full-precision" if args.full_precision else f"-pruned-{args.prune:g}" if args.prune else ""
    rules = f"-episodes-{args.episodes}" + (f"-{args.protocol}" if args.protocol else "")
    rules += f"-execute-{args.execute_horizon}" if args.execute_horizon else ""
    rules += f"-from-{args.first_seed}" if args.first_seed else ""
    suite = args.suite.replace("/", "-")
    default = Path("reports") / f"{_word(args.policy)}-{suite}{rules}{precision}.json"
    out = args.json if isinstance(args.json, Path) else default
    result = evaluate(
        policy,
        env=partial(make_simulator, args.env, protocol=args.protocol) if args.protocol else args.env,
        suite=args.suite,
        episodes=args.episodes,
        first_seed=args.first_seed,
        execute_horizon=args.execute_horizon,
        full_precision=args.full_precision,
        processes=args.processes,
        ray=args.ray,
        resume=not args.restart,
        films=args.films,
        out=out,
    )
    return result if args.json is True else display.evaluation(result) | {"record": out}


def _vqa(args: argparse.Namespace) -> Any:
    from bitvla import display, progress
    from bitvla.evaluate.vqa import MAX_TOKENS, evaluate

    rules = f"-and-{len(args.questions) - 1}-more" if len(args.questions) > 1 else ""
    rules += f"-first-{args.limit}" if args.limit else ""
    rules += f"-tokens-{args.max_tokens}" if args.max_tokens != MAX_TOKENS else ""
    default = Path("reports") / f"{_word(args.model)}-{_word(args.questions[0])}{rules}.json"
    out = args.json if isinstance(args.json, Path) else default
    with progress.bar("asking") as show:
        result = evaluate(
            args.model,
            args.questions,
            limit=args.limit,
            max_tokens=args.max_tokens,
            threads=args.threads,
            resume=not args.restart,
            out=out,
            progress=show,
        )
    return result if args.json is True else display.answers(result) | {"record": out}


def _word(path: Path) -> str:
    """A path, as seen from here, in a file's name: those of one name in two folders are told apart."""
    whole, here = Path(os.path.abspath(path)), Path.cwd()
    inside = whole.relative_to(here if whole.is_relative_to(here) else whole.anchor)
    return "-".join((inside if path.is_dir() else inside.with_suffix("")).parts)


def _compare(args: argparse.Namespace) -> Any:
    from bitvla import display
    from bitvla.evaluate import result, vqa
    from bitvla.evaluate.files import load

    if vqa.is_result(args.first):
        comparison = vqa.compare(load(args.first, vqa.VqaResult), load(args.second, vqa.VqaResult))
    else:
        comparison = result.compare(load(args.first, result.Result), load(args.second, result.Result))
    return comparison if args.json else display.comparison(comparison)


def _report(args: argparse.Namespace) -> Any:
    from bitvla.evaluate.report import report

    return {"report": report(args.results, args.out)}


def _serve(args: argparse.Namespace) -> Any:
    from bitvla.serve.app import serve
    from bitvla.serve.options import Options

    options = Options(
        protocol=args.protocol,
        host=args.host,
        port=args.port,
        http_port=args.http_port,
        token=args.token if args.token is not None else os.environ.get("BITVLA_TOKEN"),
        insecure=args.insecure,
        max_sessions=args.max_sessions,
        max_batch=args.max_batch,
        max_message_mb=args.max_message_mb,
        map=tuple(args.map),
        preset=args.preset,
        allow_kill=args.allow_kill,
    )
    return serve(args.policy, options, threads=args.threads, prune=args.prune, watch=args.watch)


def _run(args: argparse.Namespace) -> Any:
    from bitvla import display
    from bitvla.robot import make_robot
    from bitvla.robot.run import Options, run

    robot = partial(
        make_robot,
        args.robot,
        instruction=args.instruction,
        task=args.task,
        seed=args.seed,
        config=args.robot_config,
    )
    options = Options(
        seconds=args.seconds,
        episodes=args.episodes,
        control_hz=args.hz,
        joining=args.joining,
        synchronous=args.synchronous,
        lagged=args.lagged,
        max_hold_s=args.max_hold,
        limits=args.limits,
        record=args.record,
        log=args.log,
        timeout=args.timeout,
        token=args.token if args.token is not None else os.environ.get("BITVLA_TOKEN"),
        threads=args.threads,
        prune=args.prune,
    )
    result = run(args.policy, robot, options)
    return result if args.json else display.run(result)


def _replay(args: argparse.Namespace) -> Any:
    from bitvla import progress
    from bitvla.robot.replay import replay

    with progress.bar("replaying") as show:
        return replay(args.recording, args.policy, episode=args.episode, threads=args.threads, progress=show)


def _doctor(args: argparse.Namespace) -> Any:
    from bitvla.doctor import doctor

    return doctor()


# Parsing.


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line, with the name that was probably meant."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see '{self.prog} --help'", file=sys.stderr)
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            message = f"'{value}' is not one of {', '.join(names)}{meant(str(value), names)}"
            raise argparse.ArgumentError(action, message)

    def option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a rate above 0")
    return rate


def _bytes(text: str) -> int:
    number = text.upper().removesuffix("B")
    factor = {"M": 10**6, "G": 10**9, "T": 10**12}.get(number[-1:], 1)
    try:
        size = int(float(number.rstrip("MGT")) * factor)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size, as in 500MB or 20GB")
    return size


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=KEY, as in wrist=eye_in_hand_rgb")
    return ours, theirs


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 0")
    return value


def _share(text: str) -> float:
    if not 0 <= (share := _amount(text)) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share from 0 to below 1")
    return share


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the help of every command carries an example."""
    parser = _Parser(
        prog="bitvla",
        description="1-bit vision-language-action policies: record, train, pack, run on any CPU, evaluate.",
        epilog="example: bitvla demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bitvla {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        run: Callable[[argparse.Namespace], Any],
        summary: str,
        example: str,
        interrupted: str = NOTHING_LEFT,
        group: Any = commands,
    ) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = group.add_parser(
            run.__name__.rpartition("data_")[2].removeprefix("_").replace("_", "-"),
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: bitvla {example}",
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if run not in (_eval, _vqa):
            command.add_argument("--json", action="store_true", help="print one JSON document on standard output")
        command.set_defaults(run=run, parser=command, interrupted=interrupted)
        return command

    _add_making(add, commands)
    _add_running(add)
    _add_writing(add)
    _add_serving(add)
    _add_measuring(add)
    return parser


_Add = Callable[..., argparse.ArgumentParser]


def _add_making(add: _Add, commands: Any) -> None:
    """From a simulator to a policy file."""
    record = add(
        _record,
        "record demonstrations of scripted experts as a LeRobot dataset",
        "record --env metaworld --suite mt10 --episodes 100 datasets/mt10",
        GO_ON,
    )
    _add_environment(record, "successful episodes to keep of each task")
    record.add_argument("out", type=Path, metavar="OUT", help="folder of the dataset")
    record.add_argument("--processes", type=_count, metavar="N", help="simulators side by side (default: all cores)")
    record.add_argument("--image-size", type=_count, default=128, metavar="PX", help="width and height (default: 128)")
    record.add_argument("--seed", type=_seed, default=0, help="another number, other initial states (default: 0)")

    questions = add(
        _questions,
        "make pictures of Meta-World's scenes with captions, instructions and a test for a vision-language model",
        "questions --images 12000 --test-images 1000 datasets/scenes",
        GO_ON,
    )
    questions.add_argument("out", type=Path, metavar="OUT", help="folder of the images and conversations")
    questions.add_argument("--images", type=_count, required=True, metavar="N", help="to train on")
    questions.add_argument("--test-images", type=_count, required=True, metavar="N", help="to test with")
    questions.add_argument(
        "--image-size", type=_count, default=128, metavar="PX", help="width and height (default: 128)"
    )
    questions.add_argument("--seed", type=_seed, default=0, help="another number, other scenes (default: 0)")

    _add_data(add, commands)

    train = add(
        _train,
        "train a policy or a vision-language model, stage by stage",
        "train localize --config configs/metaworld-nano-localize.toml --data datasets/mt10 --out runs/tower",
        GO_ON,
    )
    train.add_argument("stage", choices=STAGES, metavar="STAGE", help=" | ".join(STAGES))
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file of the run")
    train.add_argument(
        "--data",
        action="append",
        metavar="D",
        help="dataset: folder, address (s3://bucket/data) or id on the Hugging Face Hub; pretrain takes several; "
        "align, instruct and the distill of their model conversations, as a JSON file or Parquet shards",
    )
    train.add_argument(
        "--cache-size", type=_bytes, metavar="SIZE", help="disk for kept pictures, as in 20GB (default: all of them)"
    )
    train.add_argument("--out", type=Path, metavar="OUT", help="folder of the checkpoint")
    train.add_argument(
        "--init",
        type=Path,
        metavar="CKPT",
        help="checkpoint whose weights to start from, also a published one, or its Hugging Face id",
    )
    train.add_argument(
        "--tower",
        type=Path,
        metavar="CKPT",
        help="SigLIP, for a language model as --init to see with, likewise (align)",
    )
    train.add_argument("--teacher", type=Path, metavar="CKPT", help="checkpoint to align with, likewise (distill)")
    train.add_argument("--plan", action="store_true", help="say what it takes, without weights or data, and end")
    train.add_argument("--devices", type=_count, metavar="N", help="of a --plan (default: 1)")
    train.add_argument(
        "--tflops", type=_rate, metavar="T", help="what one device of a --plan reaches in training, for the time"
    )

    pack = add(
        _pack,
        "pack a checkpoint into one policy file",
        "pack runs/student policy.safetensors",
    )
    pack.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder that training wrote, or a published BitVLA or BitNet checkpoint: its folder or Hugging Face id",
    )
    pack.add_argument("out", type=Path, metavar="OUT", help="policy file to write")
    pack.add_argument("--round", action="store_true", help="round a full-precision checkpoint to ternary, untrained")
    pack.add_argument(
        "--views", type=_count, metavar="N", help="cameras that a published checkpoint was trained with (default: 2)"
    )
    pack.add_argument(
        "--statistics",
        metavar="KEY",
        help="data set whose statistics to use, where a published checkpoint holds several; "
        "for the pre-trained base model also a JSON file of them",
    )
    pack.add_argument(
        "--control-hz", type=_rate, metavar="HZ", help="control rate of the robot of the pre-trained base model"
    )
    pack.add_argument(
        "--packing",
        choices=PACKINGS,
        default=PACKINGS[0],
        help="how ternary weights are stored: 2 bits each (default), or five in a byte: a fifth smaller, same results",
    )
    pack.add_argument(
        "--matrices",
        choices=MATRICES,
        help="how connector, projector and action head are stored (default: as the checkpoint has them)",
    )
    pack.add_argument(
        "--expert",
        choices=EXPERTS,
        help="round the layers of a flow-matching expert trained in full precision, and nothing else of it",
    )

    make_checkpoint = add(
        _make_checkpoint,
        "write a checkpoint of random weights in the published layout of BitVLA",
        "make-checkpoint runs/random --reduced",
    )
    make_checkpoint.add_argument("out", type=Path, metavar="OUT", help="folder to write (full size: 6.5 GB)")
    make_checkpoint.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        metavar="KIND",
        help="a LIBERO fine-tune, the base models it comes from, BitNet's language model, packed or in bfloat16, or "
        f"the SigLIP that it learns to see with: {' | '.join(KINDS)} (default: {KINDS[0]})",
    )
    make_checkpoint.add_argument("--reduced", action="store_true", help="small layers, published layout and tokens")
    make_checkpoint.add_argument(
        "--views", type=_count, metavar="N", help="cameras of a LIBERO fine-tune, 1 to 3 (default: 2)"
    )
    make_checkpoint.add_argument("--seed", type=_seed, default=0, help="another number, other weights (default: 0)")
    make_checkpoint.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="dataset_statistics.json of a kind that acts (default: LIBERO-Spatial's)",
    )


def _add_data(add: _Add, commands: Any) -> None:
    """Before training: what a dataset is worth, and what is none yet."""
    example = "data check datasets/mt10 --out reports/mt10-data.html --split reports/mt10-split.json"
    summary = "check a dataset before training on it, or make one of other files"
    data = commands.add_parser(
        "data",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: bitvla {example}",
        allow_abbrev=False,
    )
    group = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = add(_data_check, "measure a dataset and grade what is wrong", example, group=group)
    check.add_argument("--out", type=Path, metavar="OUT.html", help="draw the report, one file with everything in it")
    check.add_argument("--split", type=Path, metavar="OUT.json", help="write a proposed split by region, for "
                       "held_out in the [data.NAME] section of a training configuration")  # fmt: skip
    check.add_argument("--horizon", type=_count, default=8, metavar="N", help="actions of a chunk (default: 8)")

    statistics = add(
        _data_statistics,
        "compute the statistics of a dataset again, over every frame, and write them into it",
        "data statistics datasets/mine",
        group=group,
    )
    where = "LeRobot dataset (v3): folder, address (s3://bucket/data) or id on the Hugging Face Hub"
    for command in (check, statistics):
        command.add_argument("dataset", metavar="DATASET", help=where)

    convert = add(
        _data_convert,
        "write LIBERO's HDF5, or RLDS episodes in TFRecords, as a LeRobot dataset (v3)",
        "data convert libero_spatial datasets/libero-spatial --drop-no-ops",
        GO_ON,
        group=group,
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="file, or folder with *.hdf5 or *.tfrecord* files")
    convert.add_argument("out", type=Path, metavar="OUT", help="folder of the dataset")
    convert.add_argument(
        "--camera",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=KEY",
        help="the source's camera KEY gets this NAME (default: LIBERO's, as full and wrist)",
    )
    convert.add_argument("--fps", type=_rate, default=20.0, metavar="F", help="actions a second (default: LIBERO's 20)")
    convert.add_argument("--rotate180", action="store_true", help="turn the pictures: the source has them turned")
    convert.add_argument("--drop-no-ops", action="store_true", help="leave out steps without motion, as OpenVLA-OFT")


def _add_running(add: _Add) -> None:
    """A policy file in the simulator."""
    demo = add(
        _demo,
        "run the shipped policy closed loop and write an HTML report",
        "demo",
    )
    demo.add_argument("--policy", type=Path, metavar="POLICY", help="another policy file (default: the shipped one)")
    demo.add_argument("--out", type=Path, metavar="OUT", help="folder of the report (default: reports/demo)")
    demo.add_argument("--processes", type=_count, metavar="N", help="simulators side by side (default: all cores)")

    evaluate = add(
        _eval,
        "measure the success rate of a policy",
        "eval policy.safetensors --env metaworld --suite mt10 --episodes 50 --json reports/mt10.json",
        GO_ON,
    )
    evaluate.add_argument(
        "policy", type=Path, metavar="POLICY", help="policy file, or with --full-precision checkpoint folder"
    )
    _add_environment(evaluate, "episodes of each task")
    _add_record(evaluate)
    evaluate.add_argument("--processes", type=_count, metavar="N", help="simulators side by side (default: all cores)")
    evaluate.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="on the machines of a Ray cluster (default: the one that this machine belongs to)",
    )
    evaluate.add_argument(
        "--full-precision", action="store_true", help="run the PyTorch network of a checkpoint, same protocol"
    )
    evaluate.add_argument(
        "--execute-horizon", type=_count, metavar="N", help="actions of a chunk to play (default: the policy's)"
    )
    _add_prune(evaluate)
    evaluate.add_argument("--first-seed", type=_seed, default=0, metavar="N", help="first initial state (default: 0)")
    evaluate.add_argument("--protocol", metavar="P", help="LIBERO's: official (default), lerobot or vla.cpp")
    evaluate.add_argument("--restart", action="store_true", help="do not go on from an interrupted evaluation")
    evaluate.add_argument(
        "--films", type=Path, metavar="FOLDER", help="film each task's first episode; `bitvla report` shows the films"
    )

    vqa = add(
        _vqa,
        "measure how well a vision-language model answers multiple-choice questions",
        "vqa model.safetensors ai2d/data/*.parquet --json reports/ai2d.json",
        GO_ON,
    )
    vqa.add_argument("model", type=Path, metavar="MODEL", help="file of a vision-language model")
    vqa.add_argument(
        "questions",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="questions: Parquet or JSON Lines of AI2D, MMMU, SEED-Bench or MMStar",
    )
    _add_record(vqa)
    vqa.add_argument("--limit", type=_count, metavar="N", help="ask the first N questions (default: all)")
    vqa.add_argument("--max-tokens", type=_count, default=16, metavar="N", help="of an answer (default: 16)")
    vqa.add_argument("--threads", type=_count, metavar="N", help="threads of the kernels (default: all cores)")
    vqa.add_argument("--restart", action="store_true", help="do not go on from an interrupted evaluation")

    compare = add(
        _compare,
        "compare two records of the same initial states, or questions, pair by pair",
        "compare reports/student.json reports/teacher.json",
    )
    compare.add_argument("first", type=Path, metavar="A.json", help="record of `bitvla eval` or `bitvla vqa`")
    compare.add_argument("second", type=Path, metavar="B.json", help="another of the same kind")

    report = add(
        _report,
        "draw the HTML report of one or several records",
        "report reports/mt10.json reports/mt10.html",
    )
    report.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULT.json",
        help="records of `bitvla eval`; the first is the subject",
    )
    report.add_argument("out", type=Path, metavar="OUT.html", help="report to write, one file with everything in it")


def _add_writing(add: _Add) -> None:
    """A language model that writes."""
    chat = add(
        _chat,
        "talk to a language model",
        'chat model.safetensors --prompt "What is a robot?"',
        "the answer was not finished",
    )
    chat.add_argument("model", type=Path, metavar="MODEL", help="file of a language model, which `bitvla pack` wrote")
    chat.add_argument("--prompt", metavar="TEXT", help="what to answer (default: what is typed, turn after turn)")
    chat.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="image that the (first) prompt is about, for a vision-language model; can be repeated",
    )
    chat.add_argument("--max-tokens", type=_count, default=256, metavar="N", help="of an answer (default: 256)")
    chat.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the likeliest token (default); more: more chance",
    )
    chat.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among the likeliest, up to this share (default: 1)",
    )
    chat.add_argument("--seed", type=_seed, default=0, help="another number, other choices (default: 0)")
    chat.add_argument("--threads", type=_count, metavar="N", help="threads of the kernels (default: all cores)")


def _add_serving(add: _Add) -> None:
    """A policy file for robots."""
    serve = add(_serve, "serve a policy to robots over the network", "serve policy.safetensors --protocol openpi")
    serve.add_argument("policy", metavar="POLICY", help="policy file")
    serve.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        required=True,
        metavar="P",
        help=f"what the robot speaks: {' | '.join(PROTOCOLS)}",
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    serve.add_argument("--port", type=_seed, metavar="N", help="port (default: the protocol's: 8000, 8080, 5555)")
    serve.add_argument(
        "--http-port", type=_seed, metavar="N", help="/healthz, /readyz, /metrics (openpi: on its own port)"
    )
    serve.add_argument("--token", metavar="T", help="what robots must know (default: $BITVLA_TOKEN)")
    serve.add_argument("--insecure", action="store_true", help="let other machines in without a token")
    serve.add_argument("--max-sessions", type=_count, default=16, metavar="N", help="robots at once (default: 16)")
    serve.add_argument(
        "--max-batch",
        type=_count,
        default=8,
        metavar="N",
        help="observations of several robots computed together, at most, where that is faster (default: 8)",
    )
    serve.add_argument("--max-message-mb", type=_count, default=16, metavar="MB", help="largest message (default: 16)")
    serve.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="KEY=PART",
        help="the robot's KEY is this camera, state or instruction",
    )
    serve.add_argument("--preset", metavar="NAME", help="names and conventions of a known client: libero")
    serve.add_argument("--threads", type=_count, metavar="N", help="threads of the kernels (default: all cores)")
    _add_prune(serve)
    serve.add_argument("--watch", action="store_true", help="load the policy again when its file changes")
    serve.add_argument("--allow-kill", action="store_true", help="let a robot stop the server (gr00t's 'kill')")

    run = add(
        _run,
        "run a policy on a robot, or on a simulated one, without running out of actions",
        "run policy.safetensors --robot metaworld --task drawer-open-v3 --hz 20 --record datasets/runs",
        "the robot was told to hold; the episode that ran was recorded",
    )
    run.add_argument("policy", metavar="POLICY", help="policy file, or address of `bitvla serve` (ws://host:8000)")
    run.add_argument("--robot", choices=ROBOTS, required=True, metavar="R", help=" | ".join(ROBOTS))
    run.add_argument("--robot-config", type=Path, metavar="FILE", help="TOML file of a LeRobot robot")
    run.add_argument("--instruction", metavar="TEXT", help="what to do (a simulator knows its own)")
    run.add_argument("--task", metavar="NAME", help="task of a simulator: drawer-open-v3, libero_spatial/0 ...")
    run.add_argument("--seed", type=_seed, default=0, help="a simulator's first initial state (default: 0)")
    run.add_argument("--seconds", type=_amount, default=30.0, metavar="S", help="longest episode (default: 30); 0: "
                     "measure and prove, move nothing")  # fmt: skip
    run.add_argument("--episodes", type=_count, default=1, metavar="N", help="episodes in a row (default: 1)")
    run.add_argument("--hz", type=_rate, metavar="F", help="actions a second (default: as the policy was trained)")
    joinings = " | ".join(JOININGS)
    run.add_argument(
        "--joining", choices=JOININGS, default="replace", metavar="J", help=f"{joinings} (default: replace)"
    )
    run.add_argument("--synchronous", action="store_true", help="stand still while the next chunk is computed")
    run.add_argument("--lagged", action="store_true", help="play every action, late; bears twice the latency")
    run.add_argument("--max-hold", type=_amount, default=1.0, metavar="S", help="end after S seconds without an action "
                     "(default: 1)")  # fmt: skip
    run.add_argument("--limits", type=Path, metavar="FILE", help="TOML file of the guard (default: training range)")
    run.add_argument("--record", type=Path, metavar="OUT", help="dataset that gets every episode, to train or replay")
    run.add_argument("--log", type=Path, metavar="FILE", help="every chunk and step, as JSON lines")
    run.add_argument("--timeout", type=_amount, default=5.0, metavar="S", help="of a call to a server (default: 5)")
    run.add_argument("--token", metavar="T", help="of the server (default: $BITVLA_TOKEN)")
    run.add_argument("--threads", type=_count, metavar="N", help="threads of the kernels (default: all cores)")
    _add_prune(run)

    replay = add(
        _replay,
        "ask another policy what a recorded run asked, and compare the chunks",
        "replay datasets/runs policy.safetensors",
    )
    replay.add_argument("recording", type=Path, metavar="RECORDING", help="dataset that `bitvla run --record` wrote")
    replay.add_argument("policy", metavar="POLICY", help="policy file")
    replay.add_argument("--episode", type=_seed, metavar="N", help="this one alone (default: all)")
    replay.add_argument("--threads", type=_count, metavar="N", help="threads of the kernels (default: all cores)")


def _add_measuring(add: _Add) -> None:
    """What a policy file and this machine are worth."""
    verify = add(_verify, "check a policy file: data, statistics, kernels, golden traces", "verify policy.safetensors")
    inspect = add(_inspect, "show what is in a policy file", "inspect policy.safetensors --json")
    bench = add(_bench, "measure latency by part, kernels and memory", "bench policy.safetensors --threads 1")
    for command in (verify, inspect, bench):
        command.add_argument("policy", type=Path, metavar="POLICY", help="file of a policy, or of a language model")
    bench.add_argument("--threads", type=_count, metavar="N", help="threads of the kernels (default: 1 to all cores)")
    bench.add_argument(
        "--repeats", type=_count, default=50, metavar="N", help="calls, or tokens, to measure (default: 50)"
    )
    _add_prune(bench)
    bench.add_argument("--views", type=_count, metavar="N", help="measure as if it had N cameras (default: as it has)")
    bench.add_argument(
        "--batch", type=_count, default=1, metavar="N", help="measure calls of up to N observations too (default: 1)"
    )
    add(_doctor, "show what this machine has: instruction set, rendering, simulators, extras", "doctor")


def _add_record(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=True,
        metavar="OUT",
        help="write the record to OUT (default: a name under reports/); without OUT, print it too",
    )


def _add_prune(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prune",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="leave out this share of the image tokens before the decoder: faster, other actions (default: 0)",
    )


def _add_environment(command: argparse.ArgumentParser, episodes: str) -> None:
    command.add_argument("--env", default="metaworld", metavar="E", help="simulator (default: metaworld)")
    command.add_argument("--suite", required=True, metavar="S", help="mt10, libero_spatial ..., or one task's name")
    command.add_argument("--episodes", type=_count, required=True, metavar="N", help=episodes)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        names = args.parser.option_names()
        args.parser.error(f"unknown argument '{unknown[0]}'{meant(unknown[0].split('=')[0], names)}")
    return args


# Running: results to standard output, everything else to standard error, no traceback without --debug.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 or 130. Bad usage raises SystemExit(2)."""
    args = _parse(argv)
    try:
        with _quiet(args):
            result = args.run(args)
        _print(result, args)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(f"interrupted: {str(stop) or args.interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as in `bitvla inspect ... | head`; Python's flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:  # the last line of defence: a person gets one line, always
        if args.debug:
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        return 1
    return _status(result)


def _status(result: Any) -> int:
    """The exit status of a result: one that did not pass is a failure, told by its first check that failed."""
    if not isinstance(result, dict) or result.get("passed") is not False:
        return 0
    if "findings" in result:
        errors = [finding for finding in result["findings"] if finding["grade"] == "error"]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        print(f"error: {errors[0]['check']}: {errors[0]['subject']}: {errors[0]['value']}{more}", file=sys.stderr)
        return 1
    failed = [check for check in result["checks"] if not check.get("passed", check.get("state") == "ok")]
    print(f"error: {failed[0]['check']}: {' '.join(failed[0]['detail'].split())}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def _quiet(args: argparse.Namespace) -> Iterator[None]:
    """With --json, lead standard output to standard error while the command works.

    File descriptors are swapped, not `sys.stdout`, so that neither a native library nor a worker process can spoil the
    document. Warnings of libraries are for developers.
    """
    with warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("ignore")
        if not args.json:
            yield
            return
        sys.stdout.flush()
        output = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(output, 1)
            os.close(output)


def _explain(error: Exception) -> str:
    """One line that says what went wrong and what to do."""
    if isinstance(error, ModuleNotFoundError) and error.name and (missing := _explain_missing(error.name)):
        return missing
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full{_where(error)}: free some space, then run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}{_where(error)}"
    if isinstance(error, MemoryError):
        return (
            f"out of memory{f' ({error})' if str(error) else ''}: raise the limit of this process (ulimit -v, or its "
            "container's), close other programs, or use fewer --processes"
        )
    text = " ".join(str(error).split())
    # The native module, when it refuses BITVLA_ISA, can only raise an ImportError.
    if isinstance(error, BitvlaError) or "BITVLA_ISA" in text:
        return text
    return (
        f"unexpected {type(error).__name__}: {text}. Please report it with the output of the same command and --debug"
    )


def _where(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _explain_missing(module: str) -> str | None:
    if module == "bitvla._native":
        return "the native kernels are not built: run 'pip install .' in the repository, or 'make setup'"
    package = module.split(".")[0]
    from bitvla.doctor import EXTRAS

    for extra, packages in EXTRAS.items():
        if package in (name.split(".")[0] for name in packages):
            return f"this command needs '{package}': pip install 'bitvla[{extra}]'"
    return None


def _print(result: Any, args: argparse.Namespace) -> None:
    from bitvla import display

    if result is None:
        return
    if args.json is True:
        print(display.as_json(result))
    else:
        display.show(result)
