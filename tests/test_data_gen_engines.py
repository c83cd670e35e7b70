"""The engines: what fails is tried again, given up and reported; all others are made."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bootpig_jax.errors import UserError
from data_gen.config import RayConfig
from data_gen.engines.ray_engine import actor_count
from data_gen.run import Command, Part, run
from data_gen.shards import finished_shards
from tests import data_gen_stubs as stubs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What an uninterrupted run in this process writes."""
    folder = tmp_path_factory.mktemp("expected")
    assert run(Command(stubs.make_config(folder)), stubs.make_stages) == 0
    return stubs.shards(folder)


def without_shard(contents, number):
    return {name: data for name, data in contents.items() if f"-{number:05d}-of-" not in name}


# --- in this process


def test_a_shard_that_always_fails_leaves_all_others_done(expected, tmp_path, capsys):
    config = stubs.make_config(tmp_path / "out")

    def stages(config):
        loaded = stubs.make_troubled_stages(config)
        loaded.pictures._first("crash")  # that would be the end of this process
        return loaded

    assert run(Command(config), stages) == 1
    assert sorted(finished_shards(config)) == [0, 1, 3]
    assert stubs.shards(config.output_dir) == without_shard(expected, 2)
    shown = capsys.readouterr().err
    assert "shard 1: attempt 1 failed: TimeoutError: once" in shown
    assert "error: 1 shards failed 2 times each (shard 2: ValueError" in shown
    page = (config.output_dir / "report.html").read_text()
    assert "3 of 4 shards are finished" in page
    assert "&lt;b&gt;this candidate always fails" in page and "<b>this" not in page
    assert not (config.output_dir / "dataset_info.json").exists()

    # Mended, the same command makes what is left.
    assert run(Command(config), stubs.make_stages) == 0
    assert stubs.shards(config.output_dir) == expected
    assert "Shards that failed" not in (config.output_dir / "report.html").read_text()


def test_jobs_of_an_array_share_a_folder_and_the_last_one_describes_it(expected, tmp_path):
    config = stubs.make_config(tmp_path)
    for index in (2, 0, 1):
        assert not (tmp_path / "dataset_info.json").exists()
        assert run(Command(config, Part(index, 3)), stubs.make_stages) == 0
    assert (tmp_path / "dataset_info.json").exists() and (tmp_path / "report.html").exists()
    assert stubs.shards(tmp_path) == expected


def test_describing_is_a_command_of_its_own(expected, tmp_path):
    config = stubs.make_config(tmp_path)
    run(Command(config, Part(1, 2)), stubs.make_stages)
    with pytest.raises(UserError, match="2 of 4 shards are not there yet.* number 0"):
        run(Command(config, only="describe"), stubs.make_stages)
    run(Command(config, Part(0, 2)), stubs.make_stages)
    for name in ("dataset_info.json", "summary.json", "report.html"):
        (tmp_path / name).unlink()
    assert run(Command(config, only="describe"), None) == 0
    assert {p.name for p in tmp_path.iterdir()} >= {"dataset_info.json", "report.html"}


# --- on Ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of one machine with four CPUs, which runs find by its address."""
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 4, "object_store_memory": 80 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        # By default actors come after everything else that the machine does.
        patch.setenv("RAY_worker_niceness", "0")
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    cluster.shutdown()


def ray_config(folder, actors):
    return stubs.make_config(folder, ray={"actors": actors})


def test_two_actors_survive_a_crash_an_error_and_a_poison_shard(
    cluster, expected, tmp_path, capsys
):
    config = ray_config(tmp_path / "out", 2)
    assert run(Command(config, engine="ray"), stubs.make_troubled_stages) == 1
    assert sorted(finished_shards(config)) == [0, 1, 3]
    assert stubs.shards(config.output_dir) == without_shard(expected, 2)
    shown = capsys.readouterr().err
    assert "shard 0: attempt 1 failed: ActorDiedError" in shown
    assert "shard 1: attempt 1 failed: TimeoutError: once" in shown
    assert "shard 2: attempt 2 failed: ValueError" in shown
    assert "error: 1 shards failed 2 times each (shard 2: ValueError" in shown


def test_one_actor_makes_the_same_bytes_as_this_process(cluster, expected, tmp_path):
    assert run(Command(ray_config(tmp_path, 1), engine="ray"), stubs.make_stages) == 0
    assert stubs.shards(tmp_path) == expected


_DRIVER = """
import sys
from pathlib import Path
from data_gen.run import Command, run
from tests import data_gen_stubs as stubs
config = stubs.make_config(Path(sys.argv[1]), ray={"actors": 2})
run(Command(config, engine="ray"), stubs.make_slow_stages)
"""


def test_a_killed_driver_is_continued_with_the_same_bytes(cluster, expected, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, tmp_path], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while child.poll() is None and not list(tmp_path.glob("*.done.json")):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert run(Command(ray_config(tmp_path, 2), engine="ray"), stubs.make_stages) == 0
    assert stubs.shards(tmp_path) == expected


def test_an_error_of_the_configuration_keeps_its_one_line(cluster, tmp_path):
    with pytest.raises(UserError, match="^pictures.model: no such folder$"):
        run(Command(ray_config(tmp_path, 1), engine="ray"), stubs.make_no_stages)


def test_too_small_a_cluster_is_an_error_at_once(cluster, tmp_path):
    with pytest.raises(UserError, match="ray.cpus_per_actor: 5 actors .* 4 CPUs"):
        run(Command(ray_config(tmp_path, 5), engine="ray"), stubs.make_stages)


@pytest.mark.parametrize(
    ("asked", "resources", "machines", "count"),
    [
        ({}, {"CPU": 16.0, "GPU": 8.0}, 2, 8),
        ({"actors": 3}, {"CPU": 16.0, "GPU": 8.0}, 2, 3),
        ({}, {"CPU": 16.0}, 2, 2),
        ({"cpus_per_actor": 8}, {"CPU": 16.0}, 2, 2),
    ],
)
def test_actors_follow_the_cluster(asked, resources, machines, count):
    assert actor_count(RayConfig(**asked), resources, machines) == count


def test_more_actors_than_gpus_are_refused():
    with pytest.raises(UserError, match="9 actors need as many GPUs; the cluster has 8"):
        actor_count(RayConfig(actors=9), {"CPU": 64.0, "GPU": 8.0}, 1)


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'bootpig_jax\[data-gen-ray\]'"):
        run(Command(stubs.make_config(tmp_path), engine="ray"), stubs.make_stages)


def test_an_address_without_a_cluster_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "not an address")
    with pytest.raises(UserError, match="^RAY_ADDRESS: no Ray cluster answers at not an address"):
        run(Command(stubs.make_config(tmp_path), engine="ray"), stubs.make_stages)
