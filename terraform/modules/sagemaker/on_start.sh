#!/bin/bash
# Studio's lifecycle script: the repository with its environment, kernel and hooks. It may take five minutes, so the
# installation goes on in the background; its log is ~/skin-lesion-setup.log.
set -eu
nohup bash -c '
set -eux
cd "$HOME"
[ -d skin_lesion ] || { aws s3 cp s3://BUCKET/studio/repository.bundle . && git clone repository.bundle skin_lesion; }
cd skin_lesion
aws s3 sync --no-progress s3://BUCKET/studio/wheels "$HOME/.wheels"
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet --no-index --find-links "$HOME/.wheels" -r requirements.lock
.venv/bin/pip install --quiet --no-index --find-links "$HOME/.wheels" --no-deps --no-build-isolation -e .
.venv/bin/python -m ipykernel install --user --name skin_lesion --display-name skin_lesion
.venv/bin/nbdev-install-hooks
' > "$HOME/skin-lesion-setup.log" 2>&1 &
