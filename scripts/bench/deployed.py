"""Deploying what is deployed already, with another size: what ``serve deploy`` does with a file that was edited."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

APPLICATIONS = "/api/serve/applications/"


def deploy(dashboard: str, data_parallel_size: int) -> None:
    """Returns when Serve has taken it, not when the group has that size. Raises OSError when it does not.

    ``dashboard`` is the URL of Ray's.
    """
    details = _ask(dashboard, None)
    applications = [application["deployed_app_config"] for application in details["applications"].values()]
    for application in applications:
        for deployment in application["deployments"]:
            deployment["user_config"] = {"data_parallel_size": data_parallel_size}
    _ask(dashboard, {"applications": applications})


def _ask(dashboard: str, document: dict[str, Any] | None) -> Any:
    data = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(
        dashboard + APPLICATIONS, data, {"Content-Type": "application/json"}, method="GET" if data is None else "PUT"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = response.read()
    return json.loads(answer) if document is None else None
