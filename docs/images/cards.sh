#!/usr/bin/env bash
# Makes docs/images/cards.png, a user of a run with what is recommended to them: docs/images/cards.sh [RUN]
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python - "${1:-runs/quickstart}" "$scratch/cards.html" <<'END'
import dataclasses
import sys
from pathlib import Path

import nqf
from nqf.tools.report.cards import cards_html, item_cards
from nqf.stages.run import open_run

run, recommender = open_run(sys.argv[1]), nqf.Recommender.load(sys.argv[1])
catalogue, interactions, cases = run.dataset.catalogue, run.dataset.interactions, run.dataset.split.test
# The first test user whose next choice is among the first six, all with pictures.
for user, cut in zip(cases.users, cases.cuts, strict=True):
    history = [recommender.item_ids[row] for row in interactions.items[interactions.offsets[user] : cut]]
    chosen = recommender.item_ids[interactions.items[cut]]
    best = recommender.recommend(history=history, k=6)["item_id"].to_list()
    cards = item_cards(catalogue, [*history[-6:], *best])
    if chosen in best and all(card.picture for card in cards):
        break
picks = [
    dataclasses.replace(card, marked=card.item_id == chosen, note="chosen next" if card.item_id == chosen else "")
    for card in cards[-6:]
]
rows = [(f"Newest items of {interactions.user_ids[user]}", cards[:-6]), ("Recommended", picks)]
Path(sys.argv[2]).write_text(f"<meta charset=utf-8><body style='margin:16px'>{cards_html(rows)}", encoding="utf-8")
END
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$scratch/profile" --hide-scrollbars \
  --force-device-scale-factor=2 --window-size=886,506 --screenshot="$scratch/cards.png" "file://$scratch/cards.html"
# 256 colors are enough for flat drawings and a fraction of the size.
.venv/bin/python -c "
from PIL import Image
Image.open('$scratch/cards.png').convert('RGB').quantize(256).save('docs/images/cards.png', optimize=True)"
