"""A real stack: one start, shared by these tests in their order; it is attacked, killed, moved, stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.endpoints import BUCKET, Endpoints
from infra.local.errors import StackError
from infra.local.processes import Process, members, memory_pss
from infra.local.stack import PARTS, attend, down, status
from infra.local.state import State
from tests.infra.conftest import NAMES, listening

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
VIT = "import sys; from infra.cli import main; sys.exit(main(sys.argv[1], sys.argv[2:]))"


@dataclass
class Stack:
    state: State
    project: Path  # The folder that holds the state folder, as a user's project does.
    outputs: list[str]  # Of the two concurrent `vit up` that started it.
    seconds: float
    idle_bytes: int

    def endpoints(self) -> Endpoints:
        found = self.state.endpoints()
        assert found
        return found

    def attend(self) -> list[str]:
        said: list[str] = []
        attend(self.state, say=said.append)
        return said

    def processes(self, *names: str) -> list[Process]:
        record = self.state.record()
        return [
            process
            for part in PARTS
            if not names or part.name in names
            for process in members(
                self.state.mark(part.name), record.parts[part.name].processes, record.parts[part.name].sessions
            )
        ]

    def process(self, part: str, name: str = "") -> Process:
        (found,) = [p for p in self.state.record().parts[part].processes if not name or p.name == name]
        return found

    def recorded(self) -> dict[str, tuple[Process, ...]]:
        return {name: part.processes for name, part in self.state.record().parts.items()}


def environment(**more: str) -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(NAMES)}
    return {**bare, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    project = tmp_path_factory.mktemp("project")
    state = State(project / ".vit")
    began = time.monotonic()
    command = [sys.executable, "-c", VIT, "up"]
    starters = [
        subprocess.Popen(
            command, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        outputs = [starter.communicate(timeout=200)[0] for starter in starters]
        assert [starter.returncode for starter in starters] == [0, 0], outputs
        found = Stack(state, project, outputs, time.monotonic() - began, 0)
        found.idle_bytes = memory_pss(found.processes())
        yield found
    finally:
        for starter in starters:
            starter.kill()
        ray_folder = state.ray_folder()
        down(state, say=lambda _: None)
        shutil.rmtree(ray_folder.parent, ignore_errors=True)


def s3(stack: Stack, **changes: Any) -> Any:
    import boto3
    from botocore.config import Config

    endpoints = stack.endpoints()
    settings = {"aws_access_key_id": endpoints.access_key, "aws_secret_access_key": endpoints.secret_key} | changes
    config = Config(retries={"mode": "standard", "total_max_attempts": 8}, signature_version="s3v4")
    return boto3.session.Session().client(
        "s3", endpoint_url=endpoints.s3_endpoint, region_name=endpoints.region, config=config, **settings
    )


def refusal(call: Any, **arguments: Any) -> tuple[int, str]:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def is_busy() -> bool:
    """Other work on the machine: then the clock tells nothing about the stack."""
    return os.getloadavg()[0] > 2 * (os.cpu_count() or 1)


def test_two_commands_at_once_start_one_stack(stack: Stack) -> None:
    assert sum("starting the embedded stack" in output for output in stack.outputs) == 1
    for output in stack.outputs:
        for address in (stack.endpoints().s3_endpoint, stack.endpoints().mlflow, stack.endpoints().ray_jobs):
            assert str(address) in output
        assert str(stack.endpoints().secret_key) not in output
    assert [line.state for line in status(stack.state)] == ["running"] * 3


def test_it_is_ready_within_a_minute_and_idles_under_a_gigabyte_and_a_half(stack: Stack) -> None:
    if not is_busy():
        assert stack.seconds < 60
    assert 0 < stack.idle_bytes < 1.5e9


def test_a_second_up_attaches(stack: Stack) -> None:
    before, began = stack.recorded(), time.monotonic()
    assert stack.attend() == []
    assert is_busy() or time.monotonic() - began < 0.5
    up = subprocess.run(
        [sys.executable, "-c", VIT, "up"], cwd=stack.project, env=environment(), capture_output=True, text=True
    )
    assert up.returncode == 0 and "already running" in up.stdout
    assert is_busy() or time.monotonic() - began < 2.5
    assert stack.recorded() == before


def test_nothing_in_the_state_folder_is_for_others(stack: Stack) -> None:
    assert stat.S_IMODE(stack.state.folder.stat().st_mode) == 0o700
    secret = ["keys.json", "ray.token", "stack.json", "store/s3.json", "store/security.toml", "store/grpc.key"]
    for name in [*secret, "mlflow/mlflow.db"]:
        assert stat.S_IMODE((stack.state.folder / name).stat().st_mode) == 0o600, name
    for process in stack.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(psutil.Process(process.pid).cmdline())
            keys = stack.state.require_keys()
            assert keys.secret_key not in words and keys.admin_secret_key not in words


def sockets(processes: list[Process]) -> dict[int, set[str]]:
    """Listening TCP ports of the processes, with the addresses they listen on."""
    found: dict[int, set[str]] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(process.pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(connection.laddr.port, set()).add(connection.laddr.ip)
    return found


def test_every_socket_is_on_loopback_and_every_port_is_one_of_ours(stack: Stack) -> None:
    found = sockets(stack.processes())
    recorded = {port for part in stack.state.record().parts.values() for port in part.ports.values()}
    assert {
        port: sorted(where) for port, where in found.items() if not where <= {"127.0.0.1", "::ffff:127.0.0.1"}
    } == {}
    assert found.keys() == recorded


def test_the_store_answers_to_its_keys_alone(stack: Stack) -> None:
    keys = stack.state.require_keys()
    s3(stack).put_object(Bucket=BUCKET, Key="probe/object", Body=b"x")
    assert refusal(s3(stack, aws_secret_access_key="wrong").list_objects_v2, Bucket=BUCKET) == (
        403,
        "SignatureDoesNotMatch",
    )
    assert refusal(s3(stack, aws_access_key_id="nobody").list_objects_v2, Bucket=BUCKET) == (403, "InvalidAccessKeyId")
    for call, arguments in (
        (s3(stack).create_bucket, {"Bucket": "other"}),
        (s3(stack).delete_bucket, {"Bucket": BUCKET}),
        (s3(stack).put_object, {"Bucket": "other", "Key": "k"}),
        (s3(stack).list_objects_v2, {"Bucket": "other"}),
    ):
        assert refusal(call, **arguments) == (403, "AccessDenied")
    admin = s3(stack, aws_access_key_id=keys.admin_access_key, aws_secret_access_key=keys.admin_secret_key)
    assert [bucket["Name"] for bucket in admin.list_buckets()["Buckets"]] == [BUCKET]


def http(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    import urllib.error
    import urllib.request

    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(
        url, data=body, method=method, headers={"Content-Type": "application/json"} | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read(2000)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(2000)


# What answers without a credential: health, figures and empty pages. Everything else is refused or absent.
OPEN = {
    "s3": {"/status", "/healthz"},
    "master": {"/", "/cluster/status"},
    "volume": {"/status", "/healthz"},
    "filer": set(),
    "admin": {"/health", "/metrics"},
}
TRIED = {
    "s3": ["/", f"/{BUCKET}/", f"/{BUCKET}/probe/object", "/status", "/healthz", "/metrics"],
    "master": [
        *("/", "/dir/assign", "/dir/lookup?volumeId=1", "/dir/status", "/vol/status", "/vol/grow", "/col/delete"),
        *("/submit", "/cluster/status", "/stats/disk", "/metrics", "/debug/pprof/"),
    ],
    "volume": [
        "/",
        "/1,01637037d6",
        "/status",
        "/ui/index.html",
        "/stats/disk",
        "/metrics",
        "/healthz",
        "/debug/pprof/",
    ],
    "filer": ["/", "/buckets/", f"/buckets/{BUCKET}/probe/object", "/etc/", "/.tus/", "/metrics", "/healthz", "/kv/x"],
    "admin": ["/", "/login", "/api/config", "/api/s3/buckets", "/api/users", "/health", "/metrics"],
}


@pytest.mark.parametrize("server", sorted(TRIED))
def test_behind_s3_no_http_port_gives_data_or_write_tokens(stack: Stack, server: str) -> None:
    address = f"http://127.0.0.1:{stack.state.record().parts['store'].ports[server]}"
    answered = set()
    for path in TRIED[server]:
        code, body = http(address + path)
        assert code in (200, 400, 401, 403, 404, 405), (path, code)
        if code == 200:
            answered.add(path)
            assert b"Bearer" not in body and b'"fid"' not in body
    assert answered == OPEN[server]
    for method in ("PUT", "POST", "DELETE"):
        for path in (f"/buckets/{BUCKET}/evil", "/1,01637037d6", "/dir/assign", "/vol/vacuum", f"/{BUCKET}/evil"):
            assert http(address + path, method)[0] >= 400, (method, path)
    assert s3(stack).get_object(Bucket=BUCKET, Key="probe/object")["Body"].read() == b"x"


def grpc_code(port: int, method: str, *metadata: tuple[str, str]) -> str:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


@pytest.mark.parametrize("server", sorted(TRIED))
def test_the_stores_grpc_ports_speak_only_to_the_client_certificate(stack: Stack, server: str) -> None:
    import socket
    import ssl

    port = stack.state.record().parts["store"].ports[f"{server}_grpc"]
    for method in ("/filer_pb.SeaweedFiler/GetFilerConfiguration", "/master_pb.Seaweed/Assign"):
        assert grpc_code(port, method) == "UNAVAILABLE"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        pytest.raises(ssl.SSLError, match="certificate required"),
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw) as channel,
    ):
        channel.recv(1)  # TLS 1.3: the server's refusal comes after the handshake.
    context.load_verify_locations(stack.state.folder / "store" / "ca.pem")
    context.load_cert_chain(stack.state.folder / "store" / "grpc.pem", stack.state.folder / "store" / "grpc.key")
    with socket.create_connection(("127.0.0.1", port)) as raw, context.wrap_socket(raw) as channel:
        assert channel.recv(1)


RAY_METHODS = {
    "gcs": [
        "InternalKVGcsService/InternalKVKeys",
        "JobInfoGcsService/GetAllJobInfo",
        "NodeInfoGcsService/GetAllNodeInfo",
    ],
    "node_manager": ["NodeManagerService/GetNodeStats", "NodeManagerService/RequestWorkerLease"],
    "object_manager": ["ObjectManagerService/Push", "ObjectManagerService/Pull"],
    "agent_grpc": ["ReporterService/GetTraceback", "LogService/ListLogs"],
}


@pytest.mark.parametrize("server", sorted(RAY_METHODS))
def test_rays_grpc_ports_answer_nobody_without_the_token(stack: Stack, server: str) -> None:
    port = stack.state.record().parts["ray"].ports[server]
    token = stack.state.token_path.read_text()
    for method in RAY_METHODS[server]:
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", f"Bearer {'0' * len(token)}"),)):
            code = grpc_code(port, f"/ray.rpc.{method}", *metadata)
            assert code in ("UNAUTHENTICATED", "UNIMPLEMENTED"), (method, metadata)
    refused = grpc_code(port, f"/ray.rpc.{RAY_METHODS[server][0]}")
    assert refused == "UNAUTHENTICATED"


def test_rays_http_ports_ask_for_the_token(stack: Stack) -> None:
    ports = stack.state.record().parts["ray"].ports
    for server, path in (
        ("dashboard", "/api/jobs/"),
        ("dashboard", "/nodes?view=summary"),
        ("dashboard", "/api/v0/tasks"),
        ("dashboard", "/logs"),
        ("dashboard", "/api/version"),
        ("agent", "/api/job_agent/jobs/"),
        ("agent", "/logs"),
        ("runtime_env", "/get_or_create_runtime_env"),
    ):
        for method in ("GET", "POST"):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                code, _ = http(f"http://127.0.0.1:{ports[server]}{path}", method, **headers)
                assert code in (401, 403, 405), (server, path, method, code)
    for server in ("metrics", "dashboard_metrics", "autoscaler_metrics"):  # Open, and said to be: figures alone.
        code, body = http(f"http://127.0.0.1:{ports[server]}/metrics")
        assert code == 200 and body.startswith(b"#")


def test_mlflow_refuses_other_hosts_and_origins(stack: Stack) -> None:
    address = f"{stack.endpoints().mlflow}/api/2.0/mlflow/experiments"
    assert http(f"{address}/search?max_results=1")[0] == 200  # Whoever is on this machine; docs/stack.md says so.
    for host in ("evil.example", "10.0.0.1", "192.168.0.1:5000"):
        assert http(f"{address}/search?max_results=1", Host=host)[0] == 403
    assert http(f"{address}/create", "POST", Origin="http://evil.example")[0] == 403
    traversal = "/api/2.0/mlflow-artifacts/artifacts/..%2f..%2f..%2fetc/passwd"
    assert http(f"{stack.endpoints().mlflow}{traversal}")[0] == 400


def client(stack: Stack) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(stack.endpoints().mlflow)


def test_mlflow_keeps_artifacts_in_the_store(stack: Stack, tmp_path: Path) -> None:
    mlflow = client(stack)
    run = mlflow.create_run(mlflow.create_experiment("kept"))
    mlflow.log_metric(run.info.run_id, "loss", 0.25)
    mlflow.log_text(run.info.run_id, "weights", "folder/file.txt")
    found = s3(stack).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]
    assert any(entry["Key"].endswith("folder/file.txt") for entry in found)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")  # No address in it: ports may move.


JOB = """
import os, shutil, sys
from infra import endpoints
before = dict(os.environ)
found = endpoints.ensure()
assert dict(os.environ) == before, "a job must not change or start anything"
import ray
ray.init()
@ray.remote
def seen():
    return os.environ["AWS_ENDPOINT_URL"], os.environ["VIT_ROOT"]
assert ray.get(seen.remote()) == (found.s3_endpoint, found.root)
print("files:", sorted(os.listdir(".")))
print("python:", shutil.which("python"))
"""


def test_a_submitted_job_finds_the_stack_and_no_secret_travels_with_it(stack: Stack) -> None:
    (stack.project / "job.py").write_text(JOB)
    (stack.project / "recipe.yaml").write_text("steps: 1\n")
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "job.py"]
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        cwd=stack.project,
        env=environment(**stack.endpoints().environment()),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "files: ['job.py', 'recipe.yaml']" in done.stdout  # Neither the state folder nor a key.
    assert f"python: {Path(sys.executable).parent / 'python'}" in done.stdout


LATE = """
import ray
from infra import endpoints
endpoints.ensure(start=False)
ray.init(log_to_driver=False)
print("cores:", ray.cluster_resources()["CPU"])
"""


def test_ray_may_be_imported_before_the_endpoints_are_known(stack: Stack) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE], cwd=stack.project, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert "cores: " in done.stdout, done.stderr


def test_worker_processes_listen_on_loopback_behind_the_token_too(stack: Stack) -> None:
    recorded = {port for part in stack.state.record().parts.values() for port in part.ports.values()}
    workers = {port: where for port, where in sockets(stack.processes("ray")).items() if port not in recorded}
    for port, where in workers.items():
        assert where <= {"127.0.0.1", "::ffff:127.0.0.1"}
        for method in ("CoreWorkerService/PushTask", "CoreWorkerService/KillActor"):
            assert grpc_code(port, f"/ray.rpc.{method}") in ("UNAUTHENTICATED", "UNAVAILABLE")


def kill(process: Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("part", "process", "title"),
    [
        ("store", "", "object store"),
        ("mlflow", "", "MLflow server"),
        ("ray", "raylet", "Ray head"),
        ("ray", "dashboard", "Ray head"),
    ],
)
def test_a_killed_part_is_restarted_alone_and_nothing_is_lost(
    stack: Stack, part: str, process: str, title: str
) -> None:
    store = s3(stack)
    written = {f"kept/{part}-{number}": os.urandom(3000) for number in range(20)}
    for key, body in written.items():
        store.put_object(Bucket=BUCKET, Key=key, Body=body)
    before, endpoints, token = stack.recorded(), stack.endpoints(), stack.state.token_path.read_text()
    kill(stack.process(part, process))

    assert [line.state.split(":")[0] for line in status(stack.state)].count("dead") == 1
    (said,) = stack.attend()
    assert said.startswith(f"the {title} was dead") and said.endswith("restarting it")
    after = stack.recorded()
    assert {name for name in after if after[name] != before[name]} == {part}
    assert (stack.endpoints(), stack.state.token_path.read_text()) == (endpoints, token)
    assert not [old for old in before[part] if old.is_alive() and old not in after[part]]

    store.put_object(Bucket=BUCKET, Key=f"kept/{part}-after", Body=b"")  # Writes are open again at once.
    for key, body in written.items():
        assert store.get_object(Bucket=BUCKET, Key=key)["Body"].read() == body
    (run,) = client(stack).search_runs([client(stack).get_experiment_by_name("kept").experiment_id])
    assert run.data.metrics == {"loss": 0.25}


def test_down_stops_everything_it_started_and_up_finds_it_again(stack: Stack) -> None:
    living, ports = stack.processes(), stack.state.record()
    with listening(0) as (foreign, _):
        stopped = subprocess.run(
            [sys.executable, "-c", VIT, "down"], cwd=stack.project, env=environment(), capture_output=True, text=True
        )
        assert stopped.returncode == 0 and "stopped: object store, MLflow server, Ray head" in stopped.stdout
        assert [process for process in living if process.is_alive()] == []
        assert stack.processes() == [] and stack.state.endpoints() is None
        assert not [
            p for part in ports.parts.values() for p in part.ports.values() for p in Path("/tmp").glob(f"*-{p}.sock")
        ]
        assert psutil.pid_exists(foreign)
    again = subprocess.run(
        [sys.executable, "-c", VIT, "down"], cwd=stack.project, env=environment(), capture_output=True, text=True
    )
    assert again.returncode == 0 and "nothing runs" in again.stdout


def test_a_part_that_cannot_start_says_why_and_the_others_run(stack: Stack) -> None:
    database = stack.state.folder / "mlflow" / "mlflow.db"
    kept = database.read_bytes()
    database.write_bytes(b"no database " * 1000)
    with pytest.raises(StackError, match=r"(?s)the MLflow server stopped at its start; .*file is not a database"):
        stack.attend()
    assert [line.state for line in status(stack.state)] == ["running", "stopped", "running"]
    before = stack.recorded()
    database.write_bytes(kept)
    stack.attend()
    after = stack.recorded()
    assert {name for name in after if after[name] != before[name]} == {"mlflow"}
    assert s3(stack).get_object(Bucket=BUCKET, Key="kept/store-0")["Body"].read()


def test_a_port_taken_meanwhile_is_left_to_its_holder_and_those_told_of_it_are_restarted(stack: Stack) -> None:
    port = stack.state.record().parts["mlflow"].ports["http"]
    before = stack.recorded()
    kill(stack.process("mlflow"))
    with listening(port) as (foreign, _):
        said = stack.attend()
        assert psutil.pid_exists(foreign)
    assert [text.split(" ")[1] for text in said] == ["MLflow", str(port), "Ray"]
    assert f"(pid {foreign}); it gets another one" in said[1]
    assert "restarted too" in said[-1]
    after = stack.recorded()
    assert {name for name in after if after[name] != before[name]} == {"mlflow", "ray"}
    head = psutil.Process(stack.process("ray", "raylet").pid)
    assert head.environ()["MLFLOW_TRACKING_URI"] == stack.endpoints().mlflow


def test_a_start_that_was_killed_leaves_nothing_that_the_next_one_does_not_find(stack: Stack) -> None:
    living = stack.processes()
    (stack.state.folder / "stack.json").unlink()  # As if the starter had died before it wrote.
    assert [line.state for line in status(stack.state)] == ["leftovers"] * 3
    assert down(stack.state, say=lambda _: None) == ["object store", "MLflow server", "Ray head"]
    assert [process for process in living if process.is_alive()] == []
