"""HTTP endpoints that change the running group, and the key that protects them. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from app.errors import Unauthorized
from app.operations import Operations
from app.protocol import Number
from app.responses import Json

OperationId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]
Rank = Annotated[int, Field(ge=0, lt=1 << 16)]


class AdminKey:
    """What ``Authorization: Bearer`` must carry. Only a digest is kept, so nothing can show the key."""

    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()

    def __repr__(self) -> str:
        return "AdminKey(...)"

    @classmethod
    def read(cls, path: str) -> AdminKey:
        """The key in a file, without the white space around it. Raises ValueError that names the file, not the key."""
        try:
            key = Path(path).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"http.admin_key_file={path!r} can't be read on this node ({type(error).__name__}): make it readable, "
                "or leave the setting out"
            ) from None
        if not key:
            raise ValueError(f"http.admin_key_file={path!r} is empty: write a key into it, or leave the setting out")
        return cls(key)

    def check(self, authorization: str | None) -> None:
        """Raises Unauthorized unless the header has the key; takes as long for any other."""
        scheme, _, given = (authorization or "").partition(" ")
        # Headers are bytes that were decoded as Latin-1.
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._digest):
            what = "Incorrect admin key" if given else "No admin key"
            raise Unauthorized(f"{what}: this endpoint needs 'Authorization: Bearer <http.admin_key_file's content>'.")


class _Body(BaseModel):
    # A typo in a field that changes the group must not be taken for its absence.
    model_config = ConfigDict(strict=True, extra="forbid")


class ScaleBody(_Body):
    """``POST /scale_elastic_ep``. ``drain_timeout`` is in seconds; ``retire_ranks`` names who leaves."""

    new_data_parallel_size: int = Field(ge=1, le=1 << 16)
    drain_timeout: Number | None = Field(None, ge=0)
    operation_id: OperationId | None = None
    retire_ranks: list[Rank] | None = Field(None, min_length=1)
    wait: bool = True

    @field_validator("retire_ranks")
    @classmethod
    def _distinct(cls, ranks: list[int] | None) -> list[int] | None:
        if ranks is not None and len(set(ranks)) < len(ranks):
            raise PydanticCustomError("value_error", "names a rank twice")
        return ranks


class RebalanceBody(_Body):
    """``POST /rebalance_experts``."""

    operation_id: OperationId | None = None
    wait: bool = True


class CancelBody(_Body):
    """``POST /cancel_scale_elastic_ep``."""

    operation_id: OperationId


def add_control(app: FastAPI, operations: Operations, key: AdminKey | None) -> None:
    """Answers 200 when an operation is done, 202 when it goes on, and else what ``Operations`` raises.

    A caller who goes away while waiting does not stop the operation.
    """

    async def admin(request: Request) -> None:
        if key is not None:
            key.check(request.headers.get("authorization"))

    protected = [Depends(admin)]

    @app.post("/scale_elastic_ep", dependencies=protected)
    async def scale_elastic_ep(body: ScaleBody) -> Response:
        return _answer(
            await operations.scale(
                body.new_data_parallel_size, body.drain_timeout, body.operation_id, body.retire_ranks, body.wait
            )
        )

    @app.post("/rebalance_experts", dependencies=protected)
    async def rebalance_experts(body: RebalanceBody | None = None) -> Response:
        body = body or RebalanceBody()
        return _answer(await operations.rebalance(body.operation_id, body.wait))

    @app.post("/cancel_scale_elastic_ep", dependencies=protected)
    async def cancel_scale_elastic_ep(body: CancelBody) -> Response:
        return _answer(await operations.cancel(body.operation_id))

    @app.get("/is_scaling_elastic_ep")
    @app.post("/is_scaling_elastic_ep")
    async def is_scaling_elastic_ep() -> Response:
        return Json(await operations.status())


def _answer(result: dict[str, object]) -> Response:
    operation = result["operation"]
    assert isinstance(operation, dict)
    return Json(result, status_code=200 if operation["done"] else 202)
