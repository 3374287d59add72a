"""Evaluation: complete, resumable, honest about what could not be run; on a simulator in memory and on the real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import av
import msgspec
import pytest
from rich.console import Console

import bitvla
from bitvla import progress
from bitvla.errors import BitvlaError
from bitvla.evaluate.demo import demo
from bitvla.evaluate.files import load
from bitvla.evaluate.policy_host import PolicyHost
from bitvla.evaluate.pool import Pool
from bitvla.evaluate.process import Remote
from bitvla.evaluate.report import report
from bitvla.evaluate.result import Result, compare
from bitvla.evaluate.rollout import evaluate
from bitvla.evaluate.video import VIEW
from checkpoints import nano_config, pack_random
from fakes import Crasher, Dazed, Line, Refuser, UpsideDown, Walker, line_config

QUIET = Console(quiet=True)


def run(policy=Walker, suite="both", episodes=3, processes=1, **options):
    return evaluate(policy, env=Line, suite=suite, episodes=episodes, processes=processes, console=QUIET, **options)


def test_every_episode_is_recorded(tmp_path):
    result = run(out=tmp_path / "r.json", processes=2)
    assert [(e.task, e.seed) for e in result.episodes] == [(t, s) for t in ("left", "right") for s in range(3)]
    assert all(e.success and 8 <= e.steps <= 12 and e.chunk_ms and e.seconds for e in result.episodes)
    assert result.total.rate == 1
    assert result.policy.name == "walker"
    assert result.protocol.execute_horizon == 3
    assert len(result.episodes[0].chunk_ms) == -(-result.episodes[0].steps // 3)
    assert load(tmp_path / "r.json", Result) == result
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_progress_is_seen_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    evaluate(Walker, env=Line, suite="left", episodes=2, processes=1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"\d/\d", line) for line in lines] == [["0/2"], ["1/2"], ["2/2"]]
    assert "success 100%" in lines[-1]


def test_a_deaf_policy_is_found_out():
    deaf = run(partial(Walker, deaf=True), suite="swap")
    assert deaf.obedience[0].matrix == ((0, 3, 0), (0, 3, 0))
    assert deaf.obedience[0].changed.rate == 0
    assert deaf.failures == {"goal misunderstanding": 3}
    obedient = run(suite="swap")
    assert obedient.obedience[0].matrix == ((3, 0, 0), (0, 3, 0))
    assert obedient.obedience[0].changed.rate == 1
    assert obedient.obedience[0].all_obeyed.rate == 1


def test_policies_are_compared_on_the_same_states():
    deaf, good = run(partial(Walker, deaf=True)), run()
    comparison = compare(good, deaf)
    assert comparison.tasks["left"].only_a == 3
    assert comparison.tasks["right"].both == 3
    assert comparison.total.difference == 0.5
    again = msgspec.structs.replace(good, policy=msgspec.structs.replace(good.policy, digest="f" * 64))
    assert compare(good, again).a != compare(good, again).b == "walker (ternary) fffffff"
    swapped = compare(run(suite="swap"), run(partial(Walker, deaf=True), suite="swap"))
    assert swapped.failures == {"goal misunderstanding": (0, 3)}
    with pytest.raises(BitvlaError, match="protocol"):
        compare(good, run(episodes=2))
    with pytest.raises(BitvlaError, match="protocol"):
        compare(good, run(first_seed=1))


def test_a_crash_is_tried_again_then_counted_as_a_failure(tmp_path):
    once = run(partial(Crasher, tmp_path / "once", 1))
    assert once.errors == 0
    assert once.total.rate == 1
    twice = run(partial(Crasher, tmp_path / "twice", 2), episodes=2)
    assert twice.errors == 1
    assert twice.tasks["left"].successes == 1
    assert "SIGKILL" in next(e.error for e in twice.episodes if e.error)


def test_only_what_could_not_run_is_run_again(tmp_path):
    out, crasher, ran = tmp_path / "r.json", partial(Crasher, tmp_path / "count", 2), []
    assert run(crasher, episodes=2, out=out).errors == 1
    result = run(crasher, episodes=2, out=out, on_episode=ran.append)
    assert [(episode.task, episode.seed) for episode in ran] == [("left", 0)]
    assert (result.total.successes, result.errors) == (4, 0)
    assert load(out, Result) == result
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_folder_is_no_place_for_a_result(tmp_path):
    ran = []
    for folder in (tmp_path, Path()):
        with pytest.raises(BitvlaError, match="is a folder: name a file in it"):
            run(out=folder, on_episode=ran.append)
    assert not ran


class Unlucky(Pool):
    """Its first worker dies as it starts."""

    made = 0

    def _make(self):
        self.made += 1
        return Remote(os._exit, 1) if self.made == 1 else super()._make()


def test_a_worker_lost_as_it_starts_is_replaced_where_that_may_happen():
    spec = (Walker, Line, "both", 1, False)
    with Unlucky(spec, 1, 1) as pool, pytest.raises(BitvlaError, match="fewer processes"):
        pool.describe()
    with Unlucky(spec, 1, 1) as pool:
        pool.start_attempts = 2
        assert pool.describe()[1].name == "line"
        assert pool.made == 2


def test_refusals_are_recorded_not_hidden():
    result = run(Refuser)
    assert result.errors == 3
    assert result.tasks["left"].successes == 0
    assert "refusing to act" in result.episodes[0].error
    with pytest.raises(BitvlaError, match=r"in a row.*finite"):
        run(Dazed)


def test_a_task_that_cannot_be_run_keeps_no_other_from_it():
    result = run(Refuser, episodes=6)
    assert (result.errors, result.tasks["right"].successes) == (6, 6)
    with pytest.raises(BitvlaError, match=r"5 episodes in a row.*refusing"):
        run(Refuser, suite="left", episodes=6)


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from rich.console import Console
from bitvla.evaluate.rollout import evaluate
from fakes import Line, Walker
try:
    evaluate(partial(Walker, seconds=0.05), env=Line, suite="both", episodes=20, processes=1,
             console=Console(quiet=True), out=Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_evaluation_goes_on(tmp_path, how):
    out = tmp_path / "r.json"
    partial_file = tmp_path / "r.json.partial.jsonl"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env=environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (partial_file.exists() and partial_file.read_bytes().count(b"\n") >= 4):
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(30)
    done = partial_file.read_bytes().count(b"\n") - 1
    assert 3 <= done < 40
    assert not out.exists()
    ran = []
    result = run(partial(Walker, seconds=0.0), episodes=20, out=out, on_episode=ran.append)
    assert len(ran) == 40 - done
    assert result.total.total == 40


def test_a_torn_line_is_run_again_and_another_policy_may_not_go_on(tmp_path):
    out = tmp_path / "r.json"

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out=out, on_episode=stop)
    journal = tmp_path / "r.json.partial.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    with pytest.raises(BitvlaError, match="another protocol"):
        run(out=out, episodes=4)
    assert run(out=out).total.total == 6


def test_a_pruned_policy_is_another_policy(tmp_path):
    out, pruned = tmp_path / "r.json", partial(Walker, prune=0.25)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pruned, out=out, on_episode=stop)
    with pytest.raises(BitvlaError, match="another prune"):
        run(out=out)
    result = run(pruned, out=out)
    assert load(out, Result).policy.prune == 0.25
    assert compare(result, run()).a.startswith("walker (ternary, 25% of the image tokens left out) ")


def test_a_policy_file_is_known_by_its_name_however_it_is_loaded(tmp_path):
    path = pack_random(tmp_path, nano_config())
    plain = PolicyHost(str(path), 1, False).facts()
    pruned = PolicyHost(partial(bitvla.load, path, threads=1, prune=0.5), 1, False).facts()
    assert plain.source == "policy.safetensors"
    assert plain.file_bytes > 0
    assert pruned == msgspec.structs.replace(plain, prune=0.5, load_seconds=pruned.load_seconds)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (partial(Walker, line_config(size=64)), {"env": partial(Line)}, None),
        (partial(Walker, line_config(state_dim=2)), {}, "state is .* made for another robot"),
        (Walker, {"execute_horizon": 99}, "cannot play 99 actions"),
        (Walker, {"suite": "circus"}, "unknown suite 'circus'"),
        (Walker, {"episodes": 0}, "at least 1"),
        (Path("nowhere.safetensors"), {}, "nowhere.safetensors"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_moves(policy, options, message):
    call = {"env": Line, "suite": "both", "episodes": 1, "processes": 1, "console": QUIET} | options
    if message is None:
        assert evaluate(policy, **call).protocol.image_size == 64
        return
    with pytest.raises(BitvlaError, match=message):
        evaluate(policy, **call)


def test_the_report_holds_everything_and_fetches_nothing(tmp_path):
    films = tmp_path / "films"
    run(out=tmp_path / "r.json", films=films)
    run(suite="swap", out=tmp_path / "swap.json")
    run(partial(Walker, deaf=True), out=tmp_path / "deaf.json")
    page = report([tmp_path / name for name in ("r.json", "swap.json", "deaf.json")], tmp_path / "r.html").read_text()
    assert page.count("<video") == 2
    assert page.count("data:video/mp4;base64,") == 2
    assert "http://" not in page
    assert "https://" not in page
    for text in ("walker", "6 of 6", "go left", "asked for left", "+50.0 points", "Time a call"):
        assert text in page, text
    with pytest.raises(BitvlaError, match="cannot read the result"):
        report(tmp_path / "missing.json", tmp_path / "x.html")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BitvlaError, match="not a record"):
        report(tmp_path / "bad.json", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_films_are_upright(tmp_path):
    result = evaluate(Walker, env=UpsideDown, suite="left", episodes=1, processes=1, films=tmp_path, console=QUIET)
    with av.open(result.episodes[0].video) as film:
        first = next(film.decode(video=0)).to_ndarray(format="gray")
    assert first[10 : VIEW // 2 - 10].min() > 200 > 50 > first[VIEW // 2 + 10 : VIEW - 10].max()


def test_a_report_is_not_written_over_a_record(tmp_path):
    run(out=tmp_path / "a.json")
    run(out=tmp_path / "b.json")
    with pytest.raises(BitvlaError, match=r"b\.json is the name of a record; .* comes last, as in .*b\.html"):
        report(tmp_path / "a.json", tmp_path / "b.json")
    assert load(tmp_path / "b.json", Result).total.total == 6


def test_the_demo_prints_what_it_promises(tmp_path):
    summary = demo(Walker, tmp_path / "demo", 1, env=Line, suite="both")
    assert [row["success"] for row in summary["episodes"]] == [True, True]
    assert summary["tasks_done"] == "2 of 2"
    assert Path(summary["report"]).read_text().count("<video") == 2
    json.dumps(summary)
    again = demo(Walker, tmp_path / "demo", 1, env=Line, suite="both")
    assert again["tasks_done"] == "2 of 2"
    with pytest.raises(BitvlaError, match="no policy file"):
        demo(tmp_path / "none.safetensors", tmp_path / "demo")


def test_a_packed_policy_runs_in_the_real_simulator(tmp_path):
    config = nano_config()
    processing = config.processing
    named = msgspec.structs.replace(
        processing,
        state=msgspec.structs.replace(processing.state, names=("hand_x", "hand_y", "hand_z", "gripper_opening")),
        action=msgspec.structs.replace(processing.action, names=("hand_dx", "hand_dy", "hand_dz", "gripper_effort")),
    )
    policy = pack_random(tmp_path / "p", msgspec.structs.replace(config, processing=named))
    result = evaluate(policy, suite="reach", episodes=1, max_steps=20, processes=1, console=QUIET)
    episode = result.episodes[0]
    assert episode.error is None
    assert episode.steps <= 20
    assert result.policy.precision == "ternary"
    assert 20e6 < episode.policy_peak_bytes < 150e6
