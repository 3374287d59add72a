"""The data doctor: every planted defect is found and named, and a clean dataset has none."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bitvla.cli import main
from bitvla.data.check import check, split
from bitvla.data.lerobot import LeRobotDataset, write_statistics
from bitvla.errors import BitvlaError
from datasets import make_writer, random_episode

EPISODES, LENGTH, SIZE = 24, 24, 64


def picture(position, shift=0, brightness=0.0, contrast=1.0):
    """A textured room with a bright square at `position` in [0, 1]^2."""
    room = np.random.default_rng(0).uniform(70, 150, (SIZE // 4, SIZE // 4)).repeat(4, 0).repeat(4, 1)
    room = 110 + contrast * (np.roll(room, shift, axis=1) - 110) + brightness
    x, y = (int(4 + (SIZE - 20) * value) for value in position)
    room[y : y + 12, x : x + 12] = 240
    return np.clip(room, 0, 255).astype(np.uint8)[..., None].repeat(3, -1)


def episode(index, length=LENGTH, **look):
    """A square that moves as the state does, from another corner region each time."""
    rng = np.random.default_rng(index)
    start = np.array([0.1, 0.1, 0.5]) + 0.5 * np.array([index % 2, index // 2 % 2, 0]) + rng.uniform(0, 0.1, 3)
    velocity = rng.uniform(0.008, 0.012, 3)
    state = (start + np.arange(length)[:, None] * velocity).astype(np.float32)
    images = np.stack([picture(position[:2], **look) for position in state])
    action = rng.uniform(-1, 1, (length, 3)).astype(np.float32)
    usual = random_episode(index, length)
    changed = {"observation.state": state, "action": action, "observation.environment_state": state[:, :2]}
    vectors = {**usual.vectors, **changed}
    extra = {"recovery": index % 5 == 0, "env_task": ("drawer", "puck")[index % 2]}
    return replace(usual, images={"front": images}, vectors=vectors, extra=extra)


def write(root, change=lambda index, whole: whole, count=EPISODES):
    writer = make_writer(root, SIZE)
    writer.append([change(i, episode(i)) for i in range(count)])
    return root


def rewrite(root, change):
    """Change the table of frames in place."""
    (path,) = (root / "data").rglob("*.parquet")
    table = pd.read_parquet(path)
    change(table)
    table.to_parquet(path)


def found(root, name, **options):
    return [finding for finding in check(root, **options).findings if finding.check == name]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clean") / "d")


@pytest.fixture
def dataset(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "copy")


def test_a_clean_dataset_has_no_findings(clean):
    before = sorted(clean.rglob("*"))
    checkup = check(clean)
    assert checkup.findings == []
    assert checkup.passed
    assert (checkup.episodes, checkup.frames, checkup.fps) == (EPISODES, EPISODES * LENGTH, 10)
    assert checkup.tasks == {"drawer": 12, "puck": 12}
    assert sorted(clean.rglob("*")) == before, "a check writes nothing into the dataset"


def plant_nan(table):
    table.at[30, "action"] = np.array([0, np.nan, 0], np.float32)


def plant_other_size(table):
    table.at[30, "action"] = np.zeros(2, np.float32)


def plant_gap(table):
    later = (table["episode_index"] == 3) & (table["frame_index"] >= 10)
    table.loc[later, "timestamp"] += np.float32(0.3)


def plant_jitter(table):
    table.loc[(table["episode_index"] == 4) & (table["frame_index"] == 7), "timestamp"] += np.float32(0.02)


def plant_rate(table):
    table["timestamp"] *= np.float32(2)


def plant_still_clock(table):
    table.loc[table["episode_index"] == 4, "timestamp"] = np.float32(0)


def plant_no_time(table):
    table.at[30, "timestamp"] = np.float32("nan")


def plant_no_times(table):
    del table["timestamp"]


@pytest.mark.parametrize(
    ("plant", "name", "grade", "subject", "value"),
    [
        (plant_nan, "finite", "error", "'dy' of 'action', episode 1", "1 of 24 values not finite, first in frame 6"),
        (plant_other_size, "vectors", "error", "'action' of episode 1", "another size"),
        (plant_gap, "dropped frames", "error", "episode 3", "400 ms"),
        (plant_jitter, "timestamps", "warning", "episode 4", "20 ms"),
        (plant_rate, "timestamps", "error", "episodes 0-23", "200 ms"),
        (plant_still_clock, "timestamps", "error", "episode 4", "0 ms"),
        (plant_no_time, "timestamps", "error", "episode 1", "nan ms"),
        (plant_no_times, "timestamps", "error", "episodes 0-23", "no column 'timestamp'"),
    ],
)
def test_defects_of_the_tables(dataset, plant, name, grade, subject, value):
    rewrite(dataset, plant)
    (finding,) = check(dataset).findings
    assert (finding.check, finding.grade) == (name, grade)
    assert subject in finding.subject
    assert value in finding.value


def change_statistics(root, change):
    path = root / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    change(stats)
    path.write_text(json.dumps(stats))


def stand(table):
    """In one dimension, whatever the statistics."""
    table["observation.state"] = [np.array([x, y, 0.5], np.float32) for x, y, _ in table["observation.state"]]


def test_missing_and_constant_statistics(dataset):
    def change(stats):
        del stats["action"]["q99"]
        stats["observation.state"]["q01"][2] = stats["observation.state"]["q99"][2] = 0.5

    rewrite(dataset, stand)
    change_statistics(dataset, change)
    state, action = sorted(found(dataset, "statistics"), key=lambda finding: finding.subject, reverse=True)
    assert state.subject == "'z' of 'observation.state'"
    assert "constant" in state.value
    assert action.subject == "'action'"
    assert "q01 and q99" in action.value


@pytest.mark.parametrize("key", ["action", "observation.state"])
def test_what_training_refuses_does_not_pass(dataset, key):
    """Not one vector of an episode: the dataset has none."""
    path = dataset / "meta" / "info.json"
    info = json.loads(path.read_text())
    del info["features"][key]
    path.write_text(json.dumps(info))
    (finding,) = check(dataset).findings
    assert (finding.check, finding.grade) == ("training", "error")
    assert f"has no '{key}'" in finding.value


@pytest.mark.parametrize("content", ["null", '{"action": [1]}'])
def test_statistics_that_are_none(dataset, content):
    (dataset / "meta" / "stats.json").write_text(content)
    assert {finding.subject for finding in check(dataset).findings} == {"'observation.state'", "'action'"}


def test_statistics_without_a_list(dataset):
    change_statistics(dataset, lambda stats: stats["observation.state"].update(q01=0.5))
    (finding,) = check(dataset).findings
    assert finding.subject == "'observation.state'"


def test_of_few_frames_the_least_and_the_greatest_are_outside_the_quantiles(tmp_path):
    root = write(tmp_path / "d", lambda index, _: episode(index, length=12), count=1)
    assert [finding.check for finding in check(root).findings if finding.check != "recoveries"] == []


def test_an_impossible_rate_is_one_error(dataset):
    path = dataset / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 0}))
    with pytest.raises(BitvlaError, match="an fps of 0"):
        check(dataset)


def test_quantiles_of_lerobot_that_hide_a_motion(dataset):
    """What stands within each episode, and elsewhere in others: lerobot's average of its quantiles is one point."""

    def stand_apart(table):
        rows = zip(table["observation.state"], table["episode_index"], strict=True)
        table["observation.state"] = [np.array([x, y, episode], np.float32) for (x, y, _), episode in rows]

    def average(stats):
        stats["observation.state"]["q01"][2] = stats["observation.state"]["q99"][2] = 11.5

    rewrite(dataset, stand_apart)
    change_statistics(dataset, average)
    (finding,) = check(dataset).findings
    assert (finding.grade, finding.check, finding.subject) == ("error", "quantiles", "'z' of 'observation.state'")
    assert "bitvla data statistics" in finding.fix
    with pytest.raises(
        BitvlaError, match=r"100% of the values of 'z' .* \(11.5 and 11.5\); run: bitvla data statistics"
    ):
        LeRobotDataset(dataset).stats  # noqa: B018
    write_statistics(dataset)
    assert LeRobotDataset(dataset).stats["observation.state"]["q01"][2] == 0
    assert not found(dataset, "quantiles")


def test_statistics_of_other_data(dataset):
    change_statistics(dataset, lambda stats: stats["action"].update(q01=[-0.5] * 3, q99=[0.5] * 3))
    findings = found(dataset, "quantiles")
    assert [finding.subject for finding in findings] == [f"'{name}' of 'action'" for name in ("dx", "dy", "dz")]
    assert {finding.grade for finding in findings} == {"error"}


@pytest.mark.parametrize("bound", [["a", "b", "c"], [[1], [2, 3]], {"x": 1}])
def test_quantiles_that_are_no_numbers(dataset, bound):
    change_statistics(dataset, lambda stats: stats["action"].update(q01=bound))
    (finding,) = check(dataset).findings
    assert (finding.check, finding.subject) == ("statistics", "'action'")


def test_a_table_that_cannot_be_read_is_a_finding(dataset):
    (path,) = (dataset / "data").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    finding = check(dataset).findings[0]
    assert (finding.grade, finding.check, finding.subject) == ("error", "table", "chunk-000/file-000.parquet")
    assert "magic bytes" in finding.value


def test_an_episode_without_frames_is_a_finding(dataset):
    """The last one, of which nothing else is missing."""
    (episodes,) = (dataset / "meta" / "episodes").rglob("*.parquet")
    table, (frames,) = pd.read_parquet(episodes), (dataset / "data").rglob("*.parquet")
    last = table["episode_index"] == EPISODES - 1
    table.assign(length=table["length"].where(~last, 0)).to_parquet(episodes)
    rows = pd.read_parquet(frames)
    rows[rows["episode_index"] != EPISODES - 1].to_parquet(frames)
    finding = found(dataset, "episode")[0]
    assert (finding.subject, finding.value) == (f"episode {EPISODES - 1}", "0 frames")


def look(index, whole, which, **how):
    return replace(whole, images=episode(index, **how).images) if index in which else whole


def frozen(index, whole):
    if index != 7:
        return whole
    images = whole.images["front"].copy()
    images[5:] = images[5]
    return replace(whole, images={"front": images})


@pytest.mark.parametrize(
    ("change", "name", "subject"),
    [
        (frozen, "frozen frames", "'front', episode 7"),
        (lambda i, e: look(i, e, {9, 10}, shift=6), "moved camera", "'front', episodes 9-10"),
        (lambda i, e: look(i, e, {5}, brightness=40.0), "lighting", "'front', episode 5"),
        (lambda i, e: look(i, e, {6}, contrast=0.1), "contrast", "'front', episode 6"),
        (lambda i, e: look(i, e, range(EPISODES), brightness=2.0 * i), "lighting drift", "'front'"),
        (lambda i, e: replace(e, extra=e.extra | {"recovery": i == 0}), "recoveries", "failed state"),
        (lambda i, e: replace(e, extra=e.extra | {"env_task": "puck" if i else "drawer"}), "balance", "'drawer'"),
        (lambda i, e: replace(e, task="" if i == 2 else e.task), "sentences", "episode 2"),
        (lambda i, e: episode(i, length=5) if i == 8 else e, "length", "episode 8"),
        (lambda i, e: replace(e, vectors=standing(e.vectors)), "no-ops", "does not move"),
    ],
)
def test_defects_of_the_recording(tmp_path, change, name, subject):
    (finding,) = check(write(tmp_path / "d", change)).findings
    assert finding.check == name
    assert subject in finding.subject
    assert finding.value
    assert finding.threshold
    assert finding.fix


@pytest.mark.parametrize("kind", ["float", "boolean"])
@pytest.mark.parametrize(("marked", "share"), [({0: 1.0}, 1 / EPISODES), ({}, None)])
def test_an_episode_that_is_not_marked_is_no_recovery(dataset, marked, share, kind):
    (path,) = (dataset / "meta" / "episodes").rglob("*.parquet")
    table = pd.read_parquet(path)
    table["recovery"] = pd.Series([marked.get(i, np.nan) for i in range(EPISODES)]).astype(kind)
    table.to_parquet(path)
    checkup = check(dataset)
    assert checkup.recovery_share == share
    assert [finding.grade for finding in checkup.findings] == ["note" if share is None else "warning"]


def standing(vectors):
    """The first frames of an episode are held."""
    state = vectors["observation.state"].copy()
    state[:6] = state[0]
    return {**vectors, "observation.state": state}


def test_a_truncated_video(dataset):
    (path,) = dataset.rglob("*.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    finding = found(dataset, "video")[0]
    assert finding.grade == "error"
    assert "'front'" in finding.subject
    assert "cannot be decoded" in finding.value


@pytest.mark.parametrize(
    ("edit", "value"),
    [
        (lambda info: info.update(fps=5), "runs at 10 frames a second, info.json says 5"),
        (
            lambda info: info["features"]["observation.images.front"].update(shape=[32, 48, 3]),
            "a picture of 64 x 64 pixels in episode 0, info.json says 32 x 48",
        ),
    ],
)
def test_a_video_that_is_not_as_info_json_says(dataset, edit, value):
    path = dataset / "meta" / "info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info))
    (finding,) = found(dataset, "video")
    assert value in finding.value
    assert "ends after" not in finding.value


def test_the_split_holds_a_whole_region_out(clean):
    checkup = check(clean)
    parts = split(checkup)
    assert sorted(parts["train"] + parts["held_out"]) == list(range(EPISODES))
    assert parts["held_out"]
    clusters = np.array(checkup.coverage.clusters)
    assert not set(clusters[parts["train"]]) & set(clusters[parts["held_out"]])


def test_a_split_of_few_starting_places_holds_one_out(tmp_path):
    def three_places(index, whole):
        state = whole.vectors["observation.state"].copy()
        state[0] = (0.2, 0.3, 0.1 * (index % 3))
        vectors = {"observation.state": state, "observation.environment_state": state[:, :2]}
        return replace(whole, vectors={**whole.vectors, **vectors}, extra={"env_task": "drawer"})

    parts = split(check(write(tmp_path / "d", three_places)))
    assert {episode % 3 for episode in parts["held_out"]} == {parts["held_out"][0] % 3}
    assert (len(parts["train"]), len(parts["held_out"])) == (16, 8)


def test_no_split_says_what_it_takes_and_shows_the_findings(tmp_path, dataset, capsys):
    with pytest.raises(BitvlaError, match=r"at least 10 episodes \(5 are there\)"):
        split(check(write(tmp_path / "d", count=5)))

    def plant(table):
        table.at[24, "observation.state"] = np.full(3, np.nan, np.float32)

    rewrite(dataset, plant)
    assert main(["data", "check", str(dataset), "--split", str(tmp_path / "s.json")]) == 1
    printed = capsys.readouterr()
    assert "not finite" in printed.out
    assert "finite state in its first frame" in printed.err


def test_no_dataset_is_one_error(tmp_path):
    with pytest.raises(BitvlaError, match="not a LeRobotDataset"):
        check(tmp_path)


def test_the_command(clean, dataset, tmp_path, capsys):
    (rows,) = (dataset / "meta" / "episodes").rglob("*.parquet")
    named = pd.read_parquet(rows)["env_task"].map("of $x_{{ the {}$".format)  # no formula
    pd.read_parquet(rows).assign(env_task=named).to_parquet(rows)
    page, parts = tmp_path / "r.html", tmp_path / "s.json"
    assert main(["data", "check", str(clean), "--out", str(page), "--split", str(parts)]) == 0
    assert set(json.loads(parts.read_text())) == {"train", "held_out"}
    text = page.read_text()
    assert text.count("<svg") >= 4
    assert not re.search(r"""(src|href)=["'](?!#)""", text), "nothing to fetch"
    capsys.readouterr()
    rewrite(dataset, plant_nan)
    assert main(["data", "check", str(dataset), "--json", "--out", str(page)]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["findings"][0]["check"] == "finite"
    assert "&#39;dy&#39; of &#39;action&#39;, episode 1" in page.read_text()
    assert not list(Path(tmp_path).glob("*.tmp"))
