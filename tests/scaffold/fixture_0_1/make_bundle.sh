#!/usr/bin/env bash
# Writes template.bundle anew: what copier reads of version 0.1, as one commit whose hash is always the same. A checkout without history has no
# other place to take it from. Needs that version in the history here.
set -euo pipefail
cd "$(dirname "$0")"
version=303bc3b
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git clone --quiet --bare --shared "$(git rev-parse --path-format=absolute --git-common-dir)" "$scratch"
export GIT_AUTHOR_NAME=Fixture GIT_AUTHOR_EMAIL=fixture@example.org GIT_AUTHOR_DATE="2026-01-01T00:00:00Z"
export GIT_COMMITTER_NAME=$GIT_AUTHOR_NAME GIT_COMMITTER_EMAIL=$GIT_AUTHOR_EMAIL GIT_COMMITTER_DATE=$GIT_AUTHOR_DATE
inside() { git -C "$scratch" "$@"; }
tree=$(inside ls-tree "$version" copier.yml LICENSE templates | inside mktree)
inside update-ref refs/heads/fixture "$(inside commit-tree "$tree" -m "The template of version 0.1")"
inside symbolic-ref HEAD refs/heads/fixture
inside -c pack.threads=1 -c pack.compression=9 bundle create --quiet "$PWD/template.bundle" HEAD fixture
