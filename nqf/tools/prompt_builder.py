"""Prompts, user vectors and recommendations of an exported recommender, with numpy and safetensors alone.

`python -m nqf.export RUN --format vllm` puts this file as `prompts.py` beside the weights; it imports nothing of nqf.
What it leaves to others is the language model: whatever runs the Qwen3 reads `prompt(history)` and hands back the state
of the last token (or the mean, as `pooling` says), after the final norm and not normalized.

    recommender = Recommender(".")
    history = recommender.history(["item 1", "item 2"])
    state = ...  # of the prompt recommender.prompt(history), float [D]
    recommender.recommend(history, state, k=10)

Letters: N slots of a history, Q tokens of an item, U user tokens, I items, D widths, V width of the score.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

_UNKNOWN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What one user did, oldest first, cut to what the model reads.

    Attributes:
      items: int64 [N], rows of the items.
      older: int64 [M], rows of the items before them, which are not recommended either.
      calendar: int64 [N, 3], hour, weekday (Monday 0) and month (January 0) in UTC; -1 where unknown.
      age: int64 [N], seconds before the newest known time; -1 where unknown.
      ratings: int64 [N], rating buckets; -1 where unknown.
      reviews: float32 [N, R], embeddings of reviews.
      has_review: bool [N].
    """

    items: np.ndarray
    older: np.ndarray
    calendar: np.ndarray
    age: np.ndarray
    ratings: np.ndarray
    reviews: np.ndarray
    has_review: np.ndarray


class Recommender:
    """An exported folder.

    Attributes:
      config: Content of `recommender.json`.
      item_ids: Ids of the items, in the order of `item_vectors`.
      item_vectors: float32 [I, V].
    """

    def __init__(self, folder: str | Path):
        """Reads a folder that `--format vllm` wrote; item tables are mapped, not read."""
        folder = Path(folder)
        self.config: dict[str, Any] = json.loads((folder / "recommender.json").read_text(encoding="utf-8"))
        self.item_ids: list[str] = json.loads((folder / "item_ids.json").read_text(encoding="utf-8"))
        self._row_of = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self._weights = load_file(folder / "weights.safetensors")
        tables = ("item_vectors", "tokens", "learned", "text", "titles", "words", "available")
        self._tables = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in tables}
        self.item_vectors = self._tables["item_vectors"]
        pairs = folder / "cooccurrence.safetensors"
        self._pairs = load_file(pairs) if pairs.is_file() else None

    def history(
        self,
        items: Sequence[str],
        *,
        times: Sequence[float | None] | None = None,
        ratings: Sequence[float | None] | None = None,
        reviews: Sequence[np.ndarray | None] | None = None,
    ) -> History:
        """What a user did, oldest first.

        Args:
          items: Item ids.
          times: Unix seconds of each, None where unknown.
          ratings: Ratings on the scale of the training data, None where unknown.
          reviews: Embeddings of the reviews, float [R], by the encoder of the run, None where there is none.

        Raises:
          ValueError: No item, an unknown one, or lists of different lengths.
        """
        unknown = [item for item in items if item not in self._row_of]
        if unknown or not len(items):
            raise ValueError(f"unknown item ids: {unknown[:5]}" if unknown else "the history is empty")
        lists = [[None] * len(items) if given is None else list(given) for given in (times, ratings, reviews)]
        if {len(given) for given in lists} != {len(items)}:
            raise ValueError("items, times, ratings and reviews are of different lengths")
        rows = np.array([self._row_of[item] for item in items], np.int64)
        slots, width = self.config["max_history"], self.config["review_width"]
        seconds, ratings_N, given = (values[-slots:] for values in lists)
        known = np.array([value is not None for value in seconds])
        seconds_N = np.array([0 if value is None else int(value) for value in seconds], np.int64)
        newest = seconds_N[known].max(initial=np.iinfo(np.int64).min)
        days = seconds_N // 86_400
        months = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
        # 1970-01-01 was a Thursday.
        calendar = np.stack([seconds_N // 3_600 % 24, (days + 3) % 7, months % 12], axis=1)
        low, high = self.config["ratings"] or (0.0, 0.0)
        buckets = self.config["rating_buckets"] - 1
        return History(
            items=rows[-slots:],
            older=rows[:-slots],
            calendar=np.where(known[:, None], calendar, _UNKNOWN),
            age=np.where(known, np.clip(newest - seconds_N, 0, np.iinfo(np.int32).max), _UNKNOWN),
            ratings=np.array(
                [
                    _UNKNOWN
                    if value is None or not self.config["ratings"]
                    else int(np.clip(np.rint((value - low) / max(high - low, 1e-9) * buckets), 0, buckets))
                    for value in ratings_N
                ],
                np.int64,
            ),
            reviews=np.array([np.zeros(width) if value is None else value for value in given], np.float32),
            has_review=np.array([value is not None for value in given]),
        )

    def prompt(self, history: History) -> np.ndarray:
        """What the language model reads: input embeddings, float32 [T, D], all of them valid."""
        config, tables, rows = self.config, self._tables, history.items[-self.config["history_items"] :]
        inputs_NxQxE = self._inputs(history)
        features_NxD = (
            self._features(_under(self._weights, "interactions"), history) if config["interactions"] else None
        )
        told = 0.0 if features_NxD is None else features_NxD[-len(rows) :, None]
        tokens_SxQxD = self._injected("item", inputs_NxQxE[-len(rows) :], told)
        parts = [tables["words"][config["instruction"]]]
        for row, tokens_QxD in zip(rows, tokens_SxQxD, strict=True):
            words = tables["titles"][row]
            parts += [tables["words"][words[words >= 0]], tokens_QxD]
        if config["user_tokens"]:
            parts.append(self._injected("user", self.user_tokens(history)))
        return np.concatenate([*parts, tables["words"][[config["end"]]]]).astype(np.float32)

    def user_tokens(self, history: History) -> np.ndarray:
        """The User Q-Former's tokens of a history, float32 [U, D]."""
        weights, config = _under(self._weights, "user_qformer"), self.config["user_qformer"]
        states_NxQxD = _dense(weights, "project", self._inputs(history)) + weights["token_index"]
        features = self._features(weights, history)
        if features is not None:
            states_NxQxD = states_NxQxD + features[:, None]
        states_NxQxD = _layer_norm(weights, "input_norm", states_NxQxD, 1e-6)
        distance_N = np.arange(len(history.items))[::-1]
        bias_NxH = weights["recency_bias"][_recency_bucket(distance_N, len(weights["recency_bias"]))]
        if self.config["times"]:
            table = weights["gap_bias/embedding"]
            newest = history.age[-1]
            gap_N = np.where((history.age >= 0) & (newest >= 0), np.maximum(history.age - newest, 0), _UNKNOWN)
            bias_NxH = bias_NxH + table[_gap_bucket(gap_N, len(table))]
        per_item = states_NxQxD.shape[1]
        return _qformer(
            _under(weights, "qformer"),
            config,
            weights["queries"][0],
            states_NxQxD.reshape(-1, states_NxQxD.shape[-1]),
            np.repeat(bias_NxH, per_item, axis=0).T,
        )

    def item_tokens(self, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The Item Q-Former's tokens, float32 [Q, D], and vector, float32 [D], of one item.

        Args:
          values: Field name to the field's frozen embedding, float [width]; fields that are missing are left out.
        """
        weights, config = _under(self._weights, "item_qformer"), self.config["item_qformer"]
        kinds, states = sorted({kind for _, kind in config["fields"]}), []
        for index, (name, kind) in enumerate(config["fields"]):
            if name not in values:
                continue
            state = _dense(weights, f"project_{name}", np.asarray(values[name], np.float32))
            schema = weights["field_names"][index], weights["modalities"][kinds.index(kind)]
            if config["fusion"] == "add":
                state = state + schema[0] + schema[1]
            elif config["fusion"] == "concat":
                state = _dense(weights, f"fuse_{name}", np.concatenate([state, *schema]))
            states.append(state)
        # An item without any field reads nothing.
        states_FxD = np.reshape(states, (len(states), weights["queries"].shape[-1])).astype(np.float32)
        states_FxD = _layer_norm(weights, "field_norm", states_FxD, 1e-6)
        tokens_QxD = _qformer(_under(weights, "qformer"), config["qformer"], weights["queries"][0], states_FxD, None)
        return tokens_QxD, _dense(weights, "vector", tokens_QxD.reshape(-1))

    def user_vector(self, history: History, state: np.ndarray) -> np.ndarray:
        """The user's side of the score, float32 [V], of the language model's pooled state, float [D]."""
        weights, state = _under(self._weights, "head"), np.asarray(state, np.float32)
        distance_N = np.arange(len(history.items))[::-1]

        def recent(name: str, vectors_NxD: np.ndarray) -> np.ndarray:
            weight_N = np.exp(-np.logaddexp(0, weights[name]) * distance_N)
            return _unit(weight_N @ np.asarray(vectors_NxD, np.float32))

        user = _dense(weights, "project", state) if "project/kernel" in weights else state
        if "tokens/kernel" in weights:
            user = user + _dense(weights, "tokens", self.user_tokens(history).reshape(-1))
        if "transition/kernel" in weights:
            last = recent("transition_decay", self._tables["learned"][history.items])
            user = user + _dense(weights, "transition", last * math.sqrt(len(last)))
        scale = np.exp(min(weights["log_scale"], math.log(100.0))) if "log_scale" in weights else self.config["scale"]
        user = _unit(user) * scale
        if "gate/kernel" in weights:
            gate = np.logaddexp(0, _dense(weights, "gate", state)) + self.config["text_weight"]
            user = np.concatenate([user, gate * recent("decay", self._tables["text"][history.items])])
        return user.astype(np.float32)

    def scores(self, history: History, state: np.ndarray) -> np.ndarray:
        """Scores of all items, float32 [I]: inner products with the user vector of length one, and co-occurrence."""
        vector = self.user_vector(history, state)
        scores_I = np.asarray(self.item_vectors @ vector, np.float32)
        if self._pairs is not None:
            items = np.concatenate([history.older, history.items])[::-1]
            starts, columns, counts = (self._pairs[name] for name in ("indptr", "indices", "data"))
            for row, weight in zip(items, self.config["cooccurrence_weights"], strict=False):
                # Items that came later were in no training event.
                if row + 1 < len(starts):
                    at = slice(starts[row], starts[row + 1])
                    scores_I[columns[at]] += weight * counts[at]
        return scores_I / max(float(np.linalg.norm(vector)), 1e-12)

    def recommend(
        self, history: History, state: np.ndarray, *, k: int = 10, mask_seen: bool = True
    ) -> list[tuple[str, float]]:
        """The best k items with their scores; removed items and, unless asked for, those of the history left out."""
        scores_I = np.where(self._tables["available"], self.scores(history, state), -np.inf)
        if mask_seen:
            scores_I[np.concatenate([history.older, history.items])] = -np.inf
        best = np.argsort(-scores_I, kind="stable")[:k]
        return [(self.item_ids[row], float(scores_I[row])) for row in best if np.isfinite(scores_I[row])]

    def _inputs(self, history: History) -> np.ndarray:
        tokens_NxQxE, learned_NxV = (
            np.asarray(self._tables[name][history.items], np.float32) for name in ("tokens", "learned")
        )
        learned = np.repeat(learned_NxV[:, None] * math.sqrt(learned_NxV.shape[1]), tokens_NxQxE.shape[1], axis=1)
        return np.concatenate([tokens_NxQxE, learned], axis=-1)

    def _injected(self, name: str, tokens: np.ndarray, told: np.ndarray | float = 0.0) -> np.ndarray:
        projected = _dense(self._weights, f"{name}_projection", tokens) + told
        mean = np.mean(projected**2, axis=-1, keepdims=True)
        return projected / np.sqrt(mean + 1e-6) * self._weights[f"{name}_norm/scale"]

    def _features(self, weights: Mapping[str, np.ndarray], history: History) -> np.ndarray | None:
        parts = []
        if self.config["times"]:
            for index, name in enumerate(("hour", "weekday", "month")):
                parts.append(weights[f"{name}/embedding"][history.calendar[:, index] + 1])
            before = np.concatenate([[_UNKNOWN], history.age[:-1]])
            gap_N = np.where((before >= 0) & (history.age >= 0), before - history.age, _UNKNOWN)
            parts.append(weights["gap/embedding"][_gap_bucket(gap_N, len(weights["gap/embedding"]))])
        if self.config["reads_ratings"]:
            parts.append(weights["rating/embedding"][history.ratings + 1])
        if self.config["reads_reviews"] and self.config["review_width"]:
            parts.append(np.where(history.has_review[:, None], _dense(weights, "review", history.reviews), 0))
        return np.sum(parts, axis=0) if parts else None


def _qformer(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, int],
    queries_QxD: np.ndarray,
    states_SxE: np.ndarray,
    bias_HxS: np.ndarray | None,
) -> np.ndarray:
    """The query branch of BLIP-2's Q-Former (arXiv 2301.12597); all states are read."""

    def attention(name: str, x_QxD: np.ndarray, states_SxE: np.ndarray, bias_HxS: np.ndarray | None) -> np.ndarray:
        here = _under(weights, name)
        q, k, v = (
            _dense(here, part, x).reshape(len(x), config["heads"], -1).swapaxes(0, 1)
            for part, x in (("query", x_QxD), ("key", states_SxE), ("value", states_SxE))
        )
        logits_HxQxS = q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
        if bias_HxS is not None:
            logits_HxQxS = logits_HxQxS + bias_HxS[:, None]
        shares = np.exp(logits_HxQxS - logits_HxQxS.max(axis=-1, keepdims=True, initial=-np.inf))
        shares /= shares.sum(axis=-1, keepdims=True)
        return residual(here, (shares @ v).swapaxes(0, 1).reshape(len(x_QxD), -1), x_QxD)

    def residual(here: Mapping[str, np.ndarray], update: np.ndarray, x_QxD: np.ndarray) -> np.ndarray:
        return _layer_norm(here, "LayerNorm", _dense(here, "dense", update) + x_QxD, 1e-12)

    x_QxD = _layer_norm(weights, "layernorm", queries_QxD, 1e-12)
    for layer in range(config["layers"]):
        x_QxD = attention(f"layer_{layer}_attention", x_QxD, x_QxD, None)
        if layer % config["cross_every"] == 0:
            x_QxD = attention(f"layer_{layer}_crossattention", x_QxD, states_SxE, bias_HxS)
        here = _under(weights, f"layer_{layer}_output")
        hidden = _dense(here, "intermediate", x_QxD)
        erf = np.vectorize(math.erf, otypes=[np.float32])(hidden * math.sqrt(0.5))
        x_QxD = residual(here, hidden * (0.5 + 0.5 * erf), x_QxD)
    return x_QxD


def _under(weights: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(f"{name}/")}


def _dense(weights: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", np.float32(0))


def _layer_norm(weights: Mapping[str, np.ndarray], name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * weights[f"{name}/scale"] + weights[f"{name}/bias"]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / max(float(np.linalg.norm(x)), 1e-12)


def _gap_bucket(seconds: np.ndarray, buckets: int) -> np.ndarray:
    """Number of bits of the seconds; the last bucket where they are unknown."""
    bits = np.array([int(value).bit_length() for value in np.maximum(seconds, 0)], np.int64)
    return np.where(seconds < 0, buckets - 1, bits)


def _recency_bucket(slots: np.ndarray, buckets: int) -> np.ndarray:
    """Exact to 15 slots, then four buckets per doubling, as T5's (arXiv 1910.10683)."""
    far = 16 + 4 * np.log2(np.maximum(slots, 16).astype(np.float32) / 16)
    return np.minimum(np.where(slots < 16, slots, far.astype(np.int64)), buckets - 1)
