"""The routes of the OpenAI-compatible HTTP server."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from actors.gateway.completion_handler import Exchange
from actors.gateway.middleware import Door
from actors.gateway.state import Service
from actors.openai.errors import Refused, plain
from actors.openai.protocol import KINDS

REF = "#/components/schemas/{model}"
QUIET: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def build(service: Service) -> FastAPI:
    """No page that loads anything from elsewhere, nothing that tells of the code."""
    app = FastAPI(
        title="Outrider",
        version=service.version,
        telemetry=QUIET,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for url, kind in KINDS.items():
        app.add_api_route(
            url,
            generating(service, url),
            methods=["POST"],
            openapi_extra=described(kind.__name__),
            response_class=JSONResponse,
        )

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [model(service)] if visible(request, service) else []}

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        service.check_model(name, request.state.key)
        return model(service)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Requests are taken."""
        if not service.ready:
            raise Refused(
                503, "not_ready", "no target takes requests now: try again later", retry_after=1
            )
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": service.version}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.meter.text(), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(Refused, answer_refused)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(Exception, answer_fault)
    app.add_middleware(
        Door, service=service, routes=frozenset(getattr(route, "path", "") for route in app.routes)
    )
    documented(app)
    return app


def generating(service: Service, url: str) -> Any:
    async def generate() -> Response:
        return Exchange(service, url)

    return generate


def visible(request: Request, service: Service) -> bool:
    key = request.state.key
    return key is None or key.models is None or service.served.name in key.models


def model(service: Service) -> dict[str, Any]:
    served = service.served
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "outrider",
        "max_model_len": served.context,
    }


async def answer_refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, Refused):
        raise error
    return JSONResponse(error.body(), error.status, error.headers)


async def answer_http(request: Request, error: Exception) -> Response:
    """An address or a method that there is none of."""
    if not isinstance(error, HTTPException):
        raise error
    found = Refused(
        error.status_code,
        error.detail.lower().replace(" ", "_"),
        f"{request.method} {plain(request.url.path)}: {error.detail}",
    )
    return JSONResponse(found.body(), found.status, error.headers)


async def answer_fault(_: Request, error: Exception) -> Response:
    """Ours. The log has the rest."""
    return JSONResponse(
        Refused(
            500, "internal_error", f"the gateway has failed ({type(error).__name__}): see its log"
        ).body(),
        500,
    )


def described(name: str) -> dict[str, Any]:
    """What OpenAPI says of a body that is read by ourselves."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=name)}}}
    return {"requestBody": {"required": True, "content": content}}


def documented(app: FastAPI) -> None:
    """app.openapi() knows the bodies."""
    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain_openapi()
        _, schemas = models_json_schema(
            [(kind, "validation") for kind in KINDS.values()], ref_template=REF
        )
        found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return found

    app.openapi = openapi  # type: ignore[method-assign]
