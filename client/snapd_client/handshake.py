"""The handshake socket: framed messages with descriptors.

Each message is a 4-byte little-endian length and a HandshakeRequest or HandshakeReply (proto/snapd/v1/trainer.proto).
Descriptors come with the first byte of the reply's frame.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct

from google.protobuf.message import DecodeError
from snapd_proto import trainer_pb2 as pb

from .errors import ProtocolError, UnavailableError, from_daemon

MESSAGE_BYTES_MAX = 1 << 20
DESCRIPTORS_MAX = 250  # SCM_MAX_FD is 253
_LENGTH = struct.Struct("<I")
_IS_IT_OURS = "is another program listening there, or a snapd of another version?"


def exchange(connection: socket.socket, request: pb.HandshakeRequest) -> tuple[pb.HandshakeReply, list[int]]:
    """Send one request and wait for its reply; the caller owns the descriptors that came with it.

    Raises:
        UnavailableError: the connection ended or took too long.
        ProtocolError: the reply is no message of ours.
        SnapdError: the daemon refused; its words.
    """
    body = request.SerializeToString()
    descriptors: list[int] = []
    try:
        connection.sendall(_LENGTH.pack(len(body)) + body)
        head = _receive(connection, _LENGTH.size, descriptors)
        nbytes = _LENGTH.unpack(head)[0]
        if nbytes > MESSAGE_BYTES_MAX:
            raise ProtocolError(
                "the answer is longer than any message of snapd's",
                hint=_IS_IT_OURS,
                socket=_name(connection),
                nbytes=nbytes,
            )
        reply = pb.HandshakeReply.FromString(_receive(connection, nbytes, descriptors))
    except DecodeError as error:
        close_all(descriptors)
        raise ProtocolError(
            "the answer is no message of snapd's", hint=_IS_IT_OURS, socket=_name(connection)
        ) from error
    except OSError as error:
        close_all(descriptors)
        raise UnavailableError(
            "the daemon broke off", hint="its log says why", socket=_name(connection), cause=error
        ) from error
    except ProtocolError:
        close_all(descriptors)
        raise
    if reply.HasField("refusal"):
        close_all(descriptors)
        raise from_daemon(reply.refusal.kind, reply.refusal.message, reply.refusal.hint)
    return reply, descriptors


def _name(connection: socket.socket) -> str:
    """Where the other end listens, for messages."""
    try:
        return str(connection.getpeername())
    except OSError:
        return "?"


def _receive(connection: socket.socket, nbytes: int, descriptors: list[int]) -> bytes:
    parts = bytearray()
    while len(parts) < nbytes:
        data, ancillary, flags, _ = connection.recvmsg(
            nbytes - len(parts), socket.CMSG_SPACE(DESCRIPTORS_MAX * 4), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors were lost", hint="raise the limit of open files (ulimit -n)")
        if not data:
            raise ConnectionResetError("end of stream")
        parts += data
    return bytes(parts)


def close_all(descriptors: list[int]) -> None:
    """Close what a failed exchange left behind."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    descriptors.clear()
