"""What of Flower the coordinator relies on, private names and the command line of the SuperLink included."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from flwr.proto import control_pb2, message_pb2, runtime_pb2
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

from common import flower
from server import calls, loopback, operator

SOURCE = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (operator, loopback))


def test_this_is_the_flower_that_was_looked_at() -> None:
    assert version("flwr").startswith("1.41."), "look through server/ and client/node.py again"


CALLS = {
    "/v1/control/list-nodes": control_pb2.ListNodesRequest,
    "/v1/control/list-runs": control_pb2.ListRunsRequest,
    "/v1/control/register-node": control_pb2.RegisterNodeRequest,
    "/v1/control/start-run": control_pb2.StartRunRequest,
    "/v1/control/stop-run": control_pb2.StopRunRequest,
    "/v1/control/unregister-node": control_pb2.UnregisterNodeRequest,
    "/v1/runtime/acquire-task": runtime_pb2.AcquireTaskRequest,
    "/v1/runtime/confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "/v1/runtime/get-nodes": runtime_pb2.GetNodesRequest,
    "/v1/runtime/pull-messages": runtime_pb2.PullAppMessagesRequest,
    "/v1/runtime/pull-object": message_pb2.PullObjectRequest,
    "/v1/runtime/pull-task-input": runtime_pb2.PullTaskInputRequest,
    "/v1/runtime/push-messages": runtime_pb2.PushAppMessagesRequest,
    "/v1/runtime/push-object": message_pb2.PushObjectRequest,
    "/v1/runtime/push-task-output": runtime_pb2.PushTaskOutputRequest,
    "/v1/runtime/send-task-heartbeat": runtime_pb2.SendTaskHeartbeatRequest,
}


@pytest.mark.parametrize(("path", "request_type"), CALLS.items(), ids=list(CALLS))
def test_a_call_has_the_path_and_the_request_that_the_superlink_expects(path: str, request_type: type) -> None:
    assert PROTOBUF_REQUEST_TYPES["POST", path] is request_type
    assert f'"{path.rpartition("/")[2]}"' in SOURCE


def test_the_calls_that_are_checked_are_all_that_are_made() -> None:
    control = re.findall(r'_CONTROL \+ "([a-z-]+)"', SOURCE)
    runtime = re.findall(r'(?:\.call\(|_RUNTIME \+ )"([a-z-]+)"', SOURCE)
    made = {f"/v1/control/{found}" for found in control} | {f"/v1/runtime/{found}" for found in runtime}
    assert made == set(CALLS)


def test_helpers_of_flower_take_what_they_are_given() -> None:
    def parameters(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(loopback.create_superexec_auth_metadata) == ["auth_secret", "method", "request"]
    assert parameters(loopback.derive_auth_secret) == ["master_secret"]
    assert parameters(loopback.make_message) == ["metadata", "content", "error"]
    assert parameters(loopback.inflate_object_from_contents)[:2] == ["object_id", "object_contents"]
    assert parameters(flower.message_to_proto) == ["message"]
    assert parameters(flower.remove_content_from_message) == ["message"]
    assert parameters(calls.RuntimeVersionMetadata.from_local_component)[0] == "component_name"
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(loopback.TaskIdentity)))
    assert loopback.TaskType.SERVER_APP == "flwr-serverapp"
    abstract = getattr(loopback.Grid, "__abstractmethods__", frozenset())
    assert abstract == {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }


def test_the_command_line_of_the_superlink_knows_every_option() -> None:
    options = _parse_args_run_superlink()._option_string_actions
    used = {
        *("--host", "--port", "--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile", "--enable-supernode-auth"),
        *("--isolation", "--superexec-auth-secret-file", "--database", "--disable-runtime-dependency-installation"),
    }
    assert used <= set(options)
