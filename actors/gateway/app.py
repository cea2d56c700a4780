"""The routes of the OpenAI-compatible HTTP server."""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from actors.gateway.completion_handler import CompletionHandler
from actors.gateway.middleware import GatewayMiddleware
from actors.gateway.state import Service
from actors.openai.errors import ApiError, sanitize
from actors.openai.protocol import BODY_TYPES

SCHEMA_REF = "#/components/schemas/{model}"
TELEMETRY_OFF: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def build_app(service: Service, origins: Collection[str] = ()) -> FastAPI:
    """Returns the application, without pages that load external content and without any
    telemetry. Web pages of `origins` may use it.
    """
    app = FastAPI(
        title="Outrider",
        version=service.version,
        telemetry=TELEMETRY_OFF,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for url, kind in BODY_TYPES.items():
        app.add_api_route(
            url,
            completion_route(service, url),
            methods=["POST"],
            openapi_extra=body_schema(kind.__name__),
            response_class=JSONResponse,
        )

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [model(service)] if may_see_model(request, service) else [],
        }

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
            raise ApiError(
                503, "not_ready", "no target takes requests now: try again later", retry_after=1
            )
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": service.version}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(ApiError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_error)
    app.add_exception_handler(Exception, handle_internal_error)
    app.add_middleware(
        GatewayMiddleware,
        service=service,
        origins=frozenset(origins),
        routes=frozenset(getattr(route, "path", "") for route in app.routes),
    )
    add_body_schemas(app)
    return app


def completion_route(service: Service, url: str) -> Any:
    async def generate() -> Response:
        return CompletionHandler(service, url)

    return generate


def may_see_model(request: Request, service: Service) -> bool:
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


async def handle_api_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return JSONResponse(error.body(), error.status, error.headers)


async def handle_http_error(request: Request, error: Exception) -> Response:
    """Answers an unknown URL or method."""
    if not isinstance(error, HTTPException):
        raise error
    found = ApiError(
        error.status_code,
        error.detail.lower().replace(" ", "_"),
        f"{request.method} {sanitize(request.url.path)}: {error.detail}",
    )
    return JSONResponse(found.body(), found.status, error.headers)


async def handle_internal_error(_: Request, error: Exception) -> Response:
    """Answers an unexpected error; the log has its traceback."""
    return JSONResponse(
        ApiError(
            500, "internal_error", f"the gateway has failed ({type(error).__name__}): see its log"
        ).body(),
        500,
    )


def body_schema(name: str) -> dict[str, Any]:
    """Returns the OpenAPI entry of a body, which FastAPI does not see because the handler
    reads it.
    """
    content = {"application/json": {"schema": {"$ref": SCHEMA_REF.format(model=name)}}}
    return {"requestBody": {"required": True, "content": content}}


def add_body_schemas(app: FastAPI) -> None:
    """Adds the schemas of the bodies to app.openapi()."""
    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain_openapi()
        _, schemas = models_json_schema(
            [(kind, "validation") for kind in BODY_TYPES.values()], ref_template=SCHEMA_REF
        )
        found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return found

    app.openapi = openapi  # type: ignore[method-assign]
