#!/usr/bin/env bash
# Makes docs/images/report.png, the upper part of a run's report, and its head for README.md: docs/images/report.sh [RUN]
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python -m nqf.report "${1:-runs/quickstart}" --output "$scratch/report.html"
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$scratch/profile" --hide-scrollbars \
  --window-size=1280,2620 --screenshot="$scratch/report.png" "file://$scratch/report.html"
# 128 colors are enough for flat drawings and a fifth of the size.
.venv/bin/python -c "
from PIL import Image
page = Image.open('$scratch/report.png').convert('RGB')
page.quantize(128).save('docs/images/report.png', optimize=True)
page.crop((0, 0, 1280, 1185)).quantize(128).save('docs/images/report-top.png', optimize=True)"
