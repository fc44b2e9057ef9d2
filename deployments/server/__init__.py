"""A Prefect server: on this machine with `make server`, and the recipe for production beside it.

Nothing here imports prefect: a server is a process of its own, and who starts one may not have settled yet
which API this process shall use.
"""

from deployments.server.local import SERVER_SETTINGS, LocalServer, free_port
from deployments.server.postgres import Postgres, ServerError

__all__ = ["SERVER_SETTINGS", "LocalServer", "Postgres", "ServerError", "free_port"]
