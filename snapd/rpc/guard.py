"""What every call goes through: who calls, and how an error becomes a status."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from snapd.errors import AuthError, InternalError, JobUnusable, SnapdError, UnavailableError
from snapd.rpc.status import ERROR_KEY, code_of, refusal_of
from snapd.runtime.liveness import Peer
from snapd.runtime.node import Node

TOKEN_KEY = "snapd-token"
ServicerContext = grpc.aio.ServicerContext[Any, Any]
Self = TypeVar("Self")
Request = TypeVar("Request")
Reply = TypeVar("Reply")
Rest = ParamSpec("Rest")
Call = Callable[Concatenate[Self, Request, ServicerContext, Rest], Awaitable[Reply]]


async def refuse(context: ServicerContext, error: SnapdError) -> None:
    """End the call with the error's status; does not return."""
    refusal = refusal_of(error)
    await context.abort(
        code_of(error), f"{refusal.message} [{error.kind}]", ((ERROR_KEY, refusal.SerializeToString()),)
    )


def told(call: Callable[[Any, Request, ServicerContext], Awaitable[Reply]]) -> Any:
    """Turn the errors that a unary call raises into statuses. Our own bugs also stop the daemon."""

    @functools.wraps(call)
    async def guarded(self: Any, request: Request, context: ServicerContext) -> Reply | None:
        try:
            return await call(self, request, context)
        except (InternalError, JobUnusable) as error:
            self.node.context.failed(error)
            await refuse(context, error)
        except OSError as error:
            self.node.context.log.warning("call.failed", call=call.__name__, reason=str(error))
            await refuse(context, UnavailableError(f"the daemon's files: {error}", kind="files"))
        except SnapdError as error:
            self.node.context.log.info(
                "call.refused", call=call.__name__, kind=error.kind, reason=error.message, **error.context
            )
            await refuse(context, error)
        return None

    return guarded


def caller(node: Node, context: ServicerContext) -> Peer:
    """Return whom a call comes from, by its token.

    Raises:
        AuthError: kind `token`.
    """
    for key, value in context.invocation_metadata() or ():
        if key == TOKEN_KEY and isinstance(value, str):
            return node.peer_of(value)
    raise AuthError("the call has no token", kind="token", hint="shake hands first")
