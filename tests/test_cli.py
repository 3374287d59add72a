"""The command line: what a person meets when things go well, and when they do not."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from bitvla import cli, display, progress
from bitvla.errors import BitvlaError

COMMANDS = [
    "record", "questions", "data", "train", "pack", "make-checkpoint", "demo", "eval", "vqa", "compare", "report",
    "chat", "serve", "run", "replay", "verify", "inspect", "bench", "doctor",
]  # fmt: skip
RESUMABLE = ["record", "questions", "train", "eval", "vqa"]


def example(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The example in a command's help, as arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    found = re.search(r"example:\s+bitvla\s+(.*)", capsys.readouterr().out, re.DOTALL)
    assert found, f"{command} --help has no example"
    return shlex.split(found[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = example(command, capsys)
    assert arguments[0] == command
    cli.build_parser().parse_args(arguments)


def test_the_list_of_commands_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert re.findall(r"^    ([a-z-]+)(?:  |$)", capsys.readouterr().out, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["inspct", "p"], "did you mean 'inspect'?"),
        (["verify"], "POLICY"),
        (["inspect", "p", "--jsn"], "did you mean '--json'?"),
        (["record", "out", "--suite", "mt10", "--episodes", "0"], "'0'"),
        (["record", "out", "--suite", "mt10", "--episodes", "many"], "'many'"),
        (["train", "distil", "--config", "c", "--data", "d", "--out", "o"], "did you mean 'distill'?"),
        (["train", "distill", "--config", "c", "--plan", "--tflops", "0"], "'0'"),
        (["train", "distill", "--config", "c", "--cache-size=-5GB"], "'-5GB' is not a size"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert named in output.err
    assert "--help" in output.err


Replace = Callable[[Callable[[Any], Any]], None]


@pytest.fixture
def inspection(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Sets what `bitvla inspect` calls: these tests are about everything around it."""

    def replace(function: Callable[[Any], Any]) -> None:
        module = types.ModuleType("bitvla.runtime.inspect")
        module.inspect = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bitvla.runtime.inspect", module)

    return replace


def failing(error: BaseException) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("command", "broken"),
    [
        (["questions", "--images", "1", "--test-images", "1"], {"MUJOCO_GL": "glfw"}),
        (["record", "--suite", "reach-v3", "--episodes", "1"], {"PYOPENGL_PLATFORM": "none"}),
    ],
)
def test_a_machine_without_opengl_is_one_line(tmp_path: Path, command: list[str], broken: dict[str, str]) -> None:
    if importlib.util.find_spec("mujoco") is None:  # not imported here: it picks its OpenGL for the whole process
        pytest.skip("mujoco is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | broken
    words = [sys.executable, "-m", "bitvla", *command, str(tmp_path / "out")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: the simulator .*apt-get install -y libegl1 .*`bitvla doctor` .*\n", done.stderr)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BitvlaError("policy.safetensors is cut off\nat byte 7"), "error: policy.safetensors is cut off at byte 7"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "p"), "error: no such file or directory (p)"),
        (OSError(errno.ENOSPC, "No space left on device", "out.bin"), "error: the disk is full (out.bin): free some"),
        (MemoryError(), "error: out of memory: raise the limit"),
        (
            MemoryError("the kernels need 4 MB to work in"),
            "error: out of memory (the kernels need 4 MB to work in): raise",
        ),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), "pip install 'bitvla[train]'"),
        (ModuleNotFoundError("No module named 'metaworld'", name="metaworld"), "pip install 'bitvla[sim]'"),
        (ModuleNotFoundError("No module named 'bitvla._native'", name="bitvla._native"), "make setup"),
        (ZeroDivisionError("division by zero"), "error: unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_a_failure_is_one_line_and_exit_1(
    error: Exception, line: str, inspection: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection(failing(error))
    assert cli.main(["inspect", "p"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert line in output.err


def test_debug_shows_the_traceback(inspection: Replace) -> None:
    inspection(failing(ZeroDivisionError("division by zero")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "p", "--debug"])


def test_a_missing_file_is_an_error_of_the_real_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.safetensors")
    for command in (["verify", missing], ["inspect", missing], ["bench", missing], ["pack", missing, missing + ".out"]):
        assert cli.main(command) == 1
        output = capsys.readouterr()
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        assert "none.safetensors" in output.err
    assert not list(tmp_path.iterdir())


def test_other_rules_are_another_record(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By its default name, so that no evaluation writes over that of other rules."""
    records: list[Path] = []
    for module in ("rollout", "vqa"):
        monkeypatch.setattr(f"bitvla.evaluate.{module}.evaluate", lambda *_, out, **options: records.append(out))
    monkeypatch.setattr(display, "evaluation", lambda result: {})
    monkeypatch.setattr(display, "answers", lambda result: {})
    usual = ["eval", "p.safetensors", "--env", "libero", "--suite", "libero_10", "--episodes", "1"]
    for rules in (
        [], ["--episodes", "2"], ["--protocol", "lerobot"], ["--execute-horizon", "2"], ["--first-seed", "9"],
        ["--prune", "0.5"],
    ):  # fmt: skip
        assert cli.main(usual + rules) == 0
    assert str(records[0]) == "reports/p-libero_10-episodes-1.json"
    for rules in ([], ["--limit", "9"], ["--max-tokens", "9"], ["r.jsonl"]):
        assert cli.main(["vqa", "m.safetensors", "q.jsonl", *rules]) == 0
    for folder in ("runs/a", "runs/b"):  # of one name, but other ones
        assert cli.main(["eval", f"{folder}/p.safetensors", *usual[2:]]) == 0
        assert cli.main(["vqa", f"{folder}/m.safetensors", "q.jsonl"]) == 0
        assert cli.main(["vqa", "m.safetensors", f"{folder}/q.jsonl"]) == 0
    assert str(records[-1]) == "reports/m-runs-b-q.json"
    assert len(set(records)) == len(records)
    capsys.readouterr()


def test_a_pruned_policy_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a Ray cluster runs where the cluster was started."""
    policies: list[Any] = []
    monkeypatch.setattr("bitvla.evaluate.rollout.evaluate", lambda policy, **options: policies.append(policy))
    monkeypatch.setattr(display, "evaluation", lambda result: {})
    assert cli.main(["eval", "p.safetensors", "--suite", "reach", "--episodes", "1", "--prune", "0.5"]) == 0
    assert policies[0].args == (Path.cwd() / "p.safetensors",)


def test_what_is_pruned_is_a_policy_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["eval", str(tmp_path), "--suite", "reach", "--episodes", "1", "--full-precision"]
    for command, line in (
        (["run", "ws://localhost:1", "--robot", "fake"], "give --prune to its `bitvla serve`"),
        (evaluation, "--prune is for policy files"),
    ):
        assert cli.main([*command, "--prune", "0.25"]) == 1
        assert line in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "policy.safetensors", "--prune", "1"])


@pytest.mark.parametrize("command", COMMANDS)
def test_interruption_says_how_to_go_on(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = example(command, capsys)
    name = "data-check" if command == "data" else command  # what its example does
    function = f"_{name.replace('-', '_')}"
    monkeypatch.setattr(cli, function, named(function, failing(KeyboardInterrupt())))
    assert cli.main(arguments) == 130
    output = capsys.readouterr()
    assert output.err.startswith("interrupted: ")
    assert output.err.count("\n") == 1
    assert ("go on where it stopped" in output.err) == (command in RESUMABLE)


def named(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    function.__name__ = name
    return function


SHIPPED = Path(cli.__file__).parent / "policies" / "metaworld-mt10-nano.safetensors"
RESULT = {"passed": True, "ratio": float("nan"), "count": np.int64(3), "where": Path("a/b"), "rows": [{"x": 1.5}]}


def test_results_are_printed_for_people(inspection: Replace, capsys: pytest.CaptureFixture[str]) -> None:
    inspection(lambda path: RESULT | {"name": f"[{path}]"})
    assert cli.main(["inspect", "p"]) == 0
    printed = capsys.readouterr().out
    assert "count: 3" in printed
    assert "passed: yes" in printed
    assert "1.5" in printed
    assert "name: [p]" in printed, "markup of a value is shown, not interpreted"


def test_people_see_the_stages_of_a_policy_and_files_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(SHIPPED)]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 150
    stages = [line.split() for line in printed[printed.index("stages") :].splitlines()]
    assert [words[:3] for words in stages if words and words[0] in cli.STAGES] == [
        ["localize", "1,500", "full"], ["finetune", "3,000", "full"], ["distill", "500", "ternary"],
        ["finetune", "800", "ternary"],
    ]  # fmt: skip
    display.show({"files": {"action_head--10_checkpoint.pt": "0", "bits_per_parameter": 2}})
    assert {"action_head--10_checkpoint.pt:", "bits"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_a_check_that_failed_is_exit_1(
    passed: bool, status: int, inspection: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [{"check": "digest", "passed": passed, "detail": "not\nthe same"}]
    inspection(lambda path: {"passed": passed, "checks": checks})
    assert cli.main(["inspect", "p"]) == status
    assert capsys.readouterr().err == ("" if passed else "error: digest: not the same\n")


# What happens to a whole process.

PROGRAM = """
import os, sys, time, types

def inspect(path):
    {body}

module = types.ModuleType("bitvla.runtime.inspect")
module.inspect = inspect
sys.modules["bitvla.runtime.inspect"] = module
from bitvla.cli import main
sys.exit(main(sys.argv[1:]))
"""


def program(body: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(body=body), "inspect", "p", *arguments]


def test_json_is_the_only_thing_on_standard_output() -> None:
    body = "print('noise'); os.system('echo noise of a child'); return {'value': 1, 'path': path}"
    done = subprocess.run(program(body, "--json"), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"value": 1, "path": "p"}
    assert "noise of a child" in done.stderr


def test_json_of_a_failure_is_empty_standard_output() -> None:
    done = subprocess.run(program("print('noise'); 1 / 0", "--json"), capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_json_takes_numpy_paths_and_missing_numbers(inspection: Replace, capfd: pytest.CaptureFixture[str]) -> None:
    inspection(lambda path: RESULT)
    assert cli.main(["inspect", "p", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document == {"passed": True, "ratio": None, "count": 3, "where": "a/b", "rows": [{"x": 1.5}]}


def test_no_result_is_no_output(inspection: Replace, capfd: pytest.CaptureFixture[str]) -> None:
    """Of several processes that train one has a result."""
    inspection(lambda path: None)
    assert cli.main(["inspect", "p", "--json"]) == 0
    assert capfd.readouterr().out == ""


def test_ctrl_c_ends_a_process_with_one_line() -> None:
    command = program("print('working', flush=True); time.sleep(60)")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("interrupted: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("rows", [1, 100_000])
def test_a_reader_that_left_is_no_error(rows: int) -> None:
    body = f"sys.stdin.read(); return {{'rows': [{{'x': i}} for i in range({rows})]}}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Only buffered output is written a second time, when Python ends.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(program(body, "--json"), text=True, env=buffered, **pipes) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_help_is_immediate_and_loads_nothing_heavy() -> None:
    heavy = "{'numpy', 'torch', 'metaworld', 'rich', 'tokenizers', 'transformers', 'scipy'}"
    code = f"import sys\nfrom bitvla.cli import build_parser\nbuild_parser()\nprint({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "set()\n", done.stderr
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bitvla", "--help"], check=True, capture_output=True, timeout=30)
    # 0.3 s on an idle machine; tests share theirs, so this bound only catches a heavy import.
    assert time.perf_counter() - start < 1.5


def test_stages_are_those_of_the_training_code() -> None:
    from bitvla.train import stages

    assert cli.STAGES == stages.NAMES


def test_the_training_code_may_say_where_it_stopped(inspection: Replace, capsys: pytest.CaptureFixture[str]) -> None:
    inspection(failing(KeyboardInterrupt("stopped at step 7")))
    assert cli.main(["inspect", "p"]) == 130
    assert capsys.readouterr().err == "interrupted: stopped at step 7\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"bitvla {project['version']}\n"


def test_progress_is_a_line_now_and_then_where_nothing_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, now = io.StringIO(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with progress.Progress(*columns, console=Console(file=log, width=20), get_time=lambda: now) as bar:
        task = bar.add_task("recording a long task", total=10)
        for _ in range(5):
            now += 20
            bar.update(task, advance=1)
    assert log.getvalue() == "recording a long task  2/10\nrecording a long task  4/10\n"
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    with progress.bar("checking") as show:
        show(1, 2, "")
    assert capsys.readouterr().err == "checking 1/2 0:00:00\n"
