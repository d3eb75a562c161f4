"""ray-cluster.yaml passes Ray's own validator, and a slip in it does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ray-cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    loaded = yaml.safe_load(FILE.read_text())
    assert isinstance(loaded, dict)
    return loaded


def check(config: dict[str, Any]) -> None:
    """Ray's validator is private: one place that notices when an upgrade moves it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def test_rays_validator_accepts_the_cluster_file(config: dict[str, Any]) -> None:
    check(config)


def test_the_public_schema_accepts_the_cluster_file(config: dict[str, Any]) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_wokers",), 3),
        (("available_node_types", "gpu_worker", "min_wokers"), 1),
        (("available_node_types", "gpu_worker", "resources", "GPU"), "four"),
        (("head_node_type",), "haed"),
        (("available_node_types", "decode_worker", "min_workers"), 1000),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_slip_in_the_cluster_file_is_found(config: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(Exception, match=rf"{path[-1]}|{value}"):
        check(config)


def test_gpu_and_cpu_only_workers_can_both_scale(config: dict[str, Any]) -> None:
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert any(node["resources"].get("GPU") for node in workers.values())
    assert any(not node["resources"].get("GPU") and node["resources"]["CPU"] for node in workers.values())
    assert all(node["max_workers"] > 0 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) <= config["max_workers"]


def test_every_node_asks_for_the_token_and_the_file_holds_no_secret(config: dict[str, Any]) -> None:
    setup = "\n".join(config["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". ~/vit.env;")
    assert "~/.ray/auth_token" in config["file_mounts"]
    text = FILE.read_text()
    assert "SECRET" not in text and "ACCESS_KEY" not in text and "RAY_AUTH_TOKEN=" not in text
    assert {".vit", ".git"} <= set(config["rsync_exclude"])  # The state folder holds keys.
    assert "--dashboard-host=127.0.0.1" in "\n".join(config["head_start_ray_commands"])


def test_setup_commands_install_under_constraints(config: dict[str, Any]) -> None:
    assert any("-c constraints.txt" in command for command in config["setup_commands"])
