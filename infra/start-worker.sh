#!/bin/sh
# A worker of the pool $1 in a container: the checkout once, the server's set-up, then the worker itself.
set -eu
pool=$1
: "${PREFECT_API_URL:?set PREFECT_API_URL to the Prefect server, with /api at its end}"
: "${PREFECT_API_AUTH_STRING:?set PREFECT_API_AUTH_STRING to NAME:PASSWORD of the Prefect server}"
: "${MLFLOW_TRACKING_PASSWORD:?set MLFLOW_TRACKING_PASSWORD to the password of the MLflow server}"
: "${AWS_SECRET_ACCESS_KEY:?set AWS_SECRET_ACCESS_KEY to the secret of the object store}"
: "${INSTRUCTFLOW_REPOSITORY:?set INSTRUCTFLOW_REPOSITORY to the git repository that the pipeline runs in}"

if [ ! -d .git ]; then
    git clone --quiet "$INSTRUCTFLOW_REPOSITORY" .
fi
if [ -n "${INSTRUCTFLOW_REVISION:-}" ]; then
    git fetch --quiet origin
    git checkout --quiet "$INSTRUCTFLOW_REVISION"
fi
export INSTRUCTFLOW_CHECKOUT="$PWD"
python -m infra.healthy server
python -m infra.setup
exec python -m infra.worker "$pool"
