"""Errors as OpenAI's API words them: a status, and an object that says which field was wrong."""

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from retention_jax.serving import json_text


class ApiError(Exception):
    """What a client is told in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`param` names the field that is at fault, `code` the error; `retry_after` is in seconds."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", retry_after=5.0)


def response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json_text.dump(error.body()), error.status, headers, media_type="application/json")


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Of the routing: a path that is not there, or not for this method."""
    status = int(getattr(error, "status_code", 500))
    told = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = told.get(status, str(getattr(error, "detail", "")))
    return response(ApiError(status, message, code=codes.get(status)), getattr(error, "headers", None))


async def on_crash(request: Request, error: Exception) -> Response:
    return response(ApiError(500, "the server has a fault; its log says more", code="internal_error"))
