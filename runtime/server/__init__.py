"""The OpenAI-compatible HTTP server.

`build_app` makes the application for an engine, `serve` runs it until a signal; `ServerConfig` holds their settings.
"""

from distaff.runtime.server.app import build_app
from distaff.runtime.server.config import ServerConfig
from distaff.runtime.server.metrics import PrometheusStatLogger
from distaff.runtime.server.serve import bind, serve

__all__ = ["PrometheusStatLogger", "ServerConfig", "bind", "build_app", "serve"]
