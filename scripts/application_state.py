"""Prints the state of the Serve applications of a local cluster, one line each, and why those that failed did.

    python scripts/application_state.py [DASHBOARD_URL]

Exit status 1 if one has failed to deploy, 2 if the dashboard does not answer.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8265"
    try:
        with urllib.request.urlopen(f"{url}/api/serve/applications/", timeout=5) as answer:
            applications = json.load(answer)["applications"]
    except (OSError, ValueError) as error:
        print(f"no answer from {url}: {error}")
        return 2
    failed = False
    for name, application in applications.items():
        print(f"{name}: {application['status']}")
        if application["status"] == "DEPLOY_FAILED":
            failed = True
            print(application["message"])
            for deployment in (application.get("deployments") or {}).values():
                print(deployment["message"].split("RuntimeError: ")[-1])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
