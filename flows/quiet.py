"""Settings that Prefect, DVC, MLflow and Great Expectations read when imported: no telemetry, time to start.

Imported before Prefect; the stages get them too. What the user's environment says goes first.
"""

import os

SETTINGS = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # else "database is locked" in runs without a server
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start makes its database
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
