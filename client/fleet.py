"""What every call of Flower's Fleet API needs: trust in one authority alone, and the signature of this node."""

from __future__ import annotations

import ssl
from base64 import b64encode
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from common.errors import ConfigError

ACTIVATE = "/v1/fleet/activate-node"

MOST_AHEAD_S = SYSTEM_TIME_TOLERANCE
MOST_BEHIND_S = SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE
"""How far this machine's clock may be from the coordinator's: signatures hold a time."""

ENROLLED = int(ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL)
UNKNOWN = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
"""The codes with which a SuperLink refuses `impossible_activation`: from a node it knows, and from any other."""


def trust_in(authority: bytes) -> ssl.SSLContext:
    """TLS 1.3 with whoever these certificates (PEM) vouch for, and nobody else, whatever the machine trusts.

    Raises ConfigError when they are none.
    """
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        trust.load_verify_locations(cadata=authority.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"authority: expected certificates in PEM, found none ({error})") from error
    return trust


def signed_headers(key: ec.EllipticCurvePrivateKey, now: datetime) -> dict[str, str]:
    """The headers of a call that this node makes at that moment (with its time zone)."""
    moment = now.isoformat()
    signature = sign_message(key, moment.encode("ascii"))
    return {
        **dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()),
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode("ascii"),
        TIMESTAMP_HEADER: moment,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
        "content-type": PROTOBUF_MEDIA_TYPE,
        "accept": PROTOBUF_MEDIA_TYPE,
        "accept-encoding": "identity",
        "user-agent": "silotune",
    }


def impossible_activation(key: ec.EllipticCurvePublicKey) -> bytes:
    """A request that is always refused, and tells by how whether the coordinator knows the key.

    The SuperLink looks the key up first, and only then at the interval between heartbeats, which is impossible here: so
    nothing changes, and a daemon that runs with the same key notices nothing.
    """
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key), heartbeat_interval=0.0)
    body: bytes = request.SerializeToString(deterministic=True)
    return body
