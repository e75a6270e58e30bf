# SPDX-License-Identifier: Apache-2.0
"""Why a request gets no answer. Each dialect has a status and a form for every kind."""

from __future__ import annotations

import enum


class Kind(enum.Enum):
    """What went wrong, in terms of no dialect."""

    INVALID = "invalid"  # the request itself
    TOO_LONG = "too_long"  # prompt and answer exceed the context
    BODY_TOO_LARGE = "body_too_large"
    SLOW_BODY = "slow_body"  # the body did not arrive in time
    UNAUTHORIZED = "unauthorized"
    NO_ROUTE = "no_route"
    NO_METHOD = "no_method"
    NO_MODEL = "no_model"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"  # loading, or ending
    ENGINE_LOST = "engine_lost"
    TIMEOUT = "timeout"
    FAILED = "failed"  # this request alone: its logits were not finite
    INTERNAL = "internal"  # a fault of the service


class ServiceError(Exception):
    """A request ends without its answer; the message is for the client."""

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.param = kind, message, param
        self.retry_after_s = retry_after_s


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


def invalid(param: str, message: str) -> ServiceError:
    """The error for a field of a request."""
    return ServiceError(Kind.INVALID, message, param=param)
