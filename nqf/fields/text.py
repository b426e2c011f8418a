"""Text without a download: TF-IDF of words, word pairs and character trigrams, then whitened truncated SVD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from scipy import sparse

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.encoder import LightEncoder, Values, unit_rows

# Words of a text that are read where the schema sets no limit.
MAX_WORDS = 256
# Trigrams in the vocabulary; they stand for words that are not.
TRIGRAMS = 8_192
# Characters tokenized at a time: their words, as strings, are the peak of an encoder's memory.
CHARACTERS = 4_000_000
# Characters of the matrix that is decomposed; of longer samples every k-th text is taken.
DECOMPOSED = 12_000_000
# Extra random directions and rounds of the subspace iteration.
OVERSAMPLED = 16
POWER_ITERATIONS = 4
# Distinct terms counted at a time; beyond it, those met once are dropped (lossy counting, Manku and Motwani 2002).
COUNTED = 2_000_000

# A float32 `csr_matrix`. Scipy has no annotations; what checkers infer (a shape may be None) fits none of its matrices.
Matrix: TypeAlias = Any


class TextEncoder(LightEncoder):
    """Latent semantic analysis with subwords and whitened components; rows have norm 1.

    Terms are lower-case runs of letters, digits and underscores (NFKC), pairs of neighbors that are both in the
    vocabulary, and the trigrams of "<word>". Term counts are sublinear, 1 + log(count), times a smooth inverse
    document frequency. A misspelt or new word still has its trigrams; a text with no known trigram either is
    unreadable.

    State: `words` (UTF-8, one per line), `pairs` (uint64, row of the first word << 32 | row of the second,
    ascending), `trigrams` (as `words`), `idf` float32 and `components` float32 [terms, width] with the terms in
    that order.
    """

    kind = "tfidf-svd"

    def __init__(self, options: dict[str, Any], state: dict[str, np.ndarray]):
        super().__init__(options, state)
        self.width = state["components"].shape[1]
        self._terms = _Terms(state, options["max_words"])

    @classmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        return {
            "width": config.text_width,
            "features": config.text_features,
            "max_words": field.max_length or MAX_WORDS,
            "fit_sample": config.fit_sample,
        }

    @classmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> TextEncoder:
        """Chooses the terms that most sampled texts hold and decomposes their matrix."""
        options = cls.settings(field, config)
        limit = options["max_words"]
        counts, texts, characters = _count_words(values, limit)
        # A term of a single text relates it to nothing, unless there is no other.
        words = _most_frequent(counts, -(-config.text_features // 2), 2 if texts > 2 else 1)
        state = {
            "words": _pack(words["term"]),
            "pairs": np.zeros(0, np.uint64),
            "trigrams": _pack(_most_frequent(_count_trigrams(counts), TRIGRAMS, 1)["term"]),
        }
        pairs = _most_frequent(_count_pairs(values, state, limit), config.text_features - len(words), 2)
        state["pairs"] = np.sort(pairs["term"].to_numpy())
        terms = _Terms(state, limit)
        every = -(-characters // DECOMPOSED)
        rows: list[Matrix] = [terms.counts(part) for chunk in values() for part in _slices(chunk.gather_every(every))]
        rows = rows or [sparse.csr_matrix((0, terms.width), dtype=np.float32)]
        frequency = sum(np.bincount(part.indices, minlength=terms.width) for part in rows)
        held = sum(part.shape[0] for part in rows)
        state["idf"] = (np.log((1 + held) / (1 + frequency)) + 1).astype(np.float32)
        matrix = sparse.vstack([terms.weigh(part, state["idf"]) for part in rows], format="csr")
        if matrix.nnz:
            singular, components = truncated_svd(matrix, config.text_width)
            # Whitened: unscaled, the first few components (what all texts share) decide every cosine. On the
            # titles of amazon-beauty, HR@10 by cosine to the last item is .043 at width 128 without it, .051 with.
            state["components"] = (components * (singular[0] / singular)).astype(np.float32)
        else:
            state["components"] = np.zeros((terms.width, 1), np.float32)
        return cls(options, state)

    def encode(self, values: pl.Series | list[str]) -> tuple[np.ndarray, np.ndarray]:
        texts = pl.Series("text", values, dtype=pl.String)
        vectors = np.zeros((len(texts), self.width), np.float32)
        done = 0
        for part in _slices(texts):
            weighted = self._terms.weigh(self._terms.counts(part), self.state["idf"])
            vectors[done : done + len(part)] = weighted @ self.state["components"]
            done += len(part)
        # Below this a projection is rounding noise, which would be blown up to norm 1.
        ok = np.linalg.norm(vectors, axis=1) > 1e-4
        return unit_rows(np.where(ok[:, None], vectors, 0)), ok


def truncated_svd(matrix: Matrix, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest singular values and their right vectors, by randomized subspace iteration.

    Algorithm 4.4 of Halko, Martinsson and Tropp (SIAM Review 2011), orthogonalized through k x k Gram matrices
    in place of QR: scikit-learn's `randomized_svd` spends nearly all its time in LAPACK calls on the tall factor.

    Args:
      matrix: float32 [rows, columns], not all zero.
      width: Most components; fewer where the matrix has a lower rank.

    Returns:
      float64 [k], descending, all above a thousandth of the first; and float32 [columns, k].
    """
    rng = np.random.default_rng(0)
    basis = matrix @ rng.standard_normal((matrix.shape[1], width + OVERSAMPLED), np.float32)
    for _ in range(POWER_ITERATIONS):
        basis = matrix @ (matrix.T @ _orthogonal(basis)[0])
    basis, _ = _orthogonal(basis)
    right, singular = _orthogonal(matrix.T @ basis)
    keep = singular[:width] > 1e-3 * singular[0]
    return singular[:width][keep], right[:, :width][:, keep]


def _orthogonal(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors, as float32 columns, and singular values, descending; null directions are dropped."""
    gram = columns.T.astype(np.float64) @ columns
    energies, rotation = np.linalg.eigh(gram)
    keep = np.flatnonzero(energies > 1e-9 * energies[-1])[::-1]
    singular = np.sqrt(energies[keep])
    return (columns @ (rotation[:, keep] / singular)).astype(np.float32), singular


class _Terms:
    """Looks terms up; columns are words, then pairs, then trigrams."""

    def __init__(self, state: dict[str, np.ndarray], max_words: int):
        self._words = _unpack(state["words"])
        self._trigrams = _unpack(state["trigrams"])
        self._pairs = state["pairs"]
        self._max_words = max_words
        self.trigrams_at = len(self._words) + len(self._pairs)
        self.width = self.trigrams_at + len(self._trigrams)

    def counts(self, texts: pl.Series) -> Matrix:
        """Term counts, float32 [texts, width]."""
        row, at, distinct = _tokens(texts, self._max_words)
        word = _look_up(distinct, self._words)[at]
        known = np.flatnonzero(word >= 0)
        pair_row, code = _pair_codes(row, word)
        column = np.searchsorted(self._pairs, code)
        found = column < len(self._pairs)
        found[found] = self._pairs[column[found]] == code[found]
        spelling_row, spelling = _spellings(distinct)
        trigram = _look_up(spelling, self._trigrams)
        subwords = _matrix(spelling_row[trigram >= 0], trigram[trigram >= 0], (len(distinct), len(self._trigrams)))
        words = _matrix(
            np.concatenate([row[known], pair_row[found]]),
            np.concatenate([word[known], len(self._words) + column[found]]),
            (len(texts), self.trigrams_at),
        )
        return sparse.hstack([words, _matrix(row, at, (len(texts), len(distinct))) @ subwords], format="csr")

    def weigh(self, counts: Matrix, idf: np.ndarray) -> Matrix:
        """TF-IDF with the word part and the trigram part of norm 1 each."""
        data = (1 + np.log(counts.data)) * idf[counts.indices]
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        part = 2 * row + (counts.indices >= self.trigrams_at)
        norms = np.sqrt(np.bincount(part, np.square(data, dtype=np.float64), minlength=2 * counts.shape[0]))
        weighted = (data / norms[part]).astype(np.float32)
        return sparse.csr_matrix((weighted, counts.indices, counts.indptr), counts.shape)


def _slices(texts: pl.Series) -> Iterator[pl.Series]:
    """Cuts a chunk so that each part has about `CHARACTERS` characters at most."""
    ends = np.cumsum(texts.str.len_bytes().to_numpy().astype(np.int64))
    start = 0
    while start < len(texts):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + CHARACTERS, side="right")))
        yield texts[start:end]
        start = end


def _tokens(texts: pl.Series, max_words: int) -> tuple[np.ndarray, np.ndarray, pl.Series]:
    """Words of texts: int64 text row and int64 index into the distinct words, per word, and the distinct words."""
    words = texts.str.normalize("NFKC").str.to_lowercase().str.extract_all(r"[\p{L}\p{M}\p{N}_]+").list.head(max_words)
    long = pl.DataFrame({"row": np.arange(len(texts)), "word": words}).explode("word").drop_nulls()
    distinct = long["word"].unique(maintain_order=True)
    at = long.join(distinct.to_frame("word").with_row_index("at"), on="word", how="left", maintain_order="left")["at"]
    return long["row"].to_numpy(), at.to_numpy().astype(np.int64), distinct


def _spellings(words: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Character trigrams of "<word>": int64 row of the word, and the trigram, per trigram."""
    long = (
        words.to_frame("word")
        .with_row_index("row")
        .with_columns(letters=("<" + pl.col("word") + ">").str.split(""))
        .select("row", "letters")
        .explode("letters")
        .with_columns(
            trigram=pl.col("letters") + pl.col("letters").shift(-1) + pl.col("letters").shift(-2),
            end=pl.col("row").shift(-2),
        )
        .filter(pl.col("row") == pl.col("end"))
    )
    return long["row"].to_numpy().astype(np.int64), long["trigram"]


def _pair_codes(row: np.ndarray, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighboring known words of one text: their text row and their uint64 code."""
    both = np.flatnonzero((row[:-1] == row[1:]) & (word[:-1] >= 0) & (word[1:] >= 0))
    return row[both], word[both].astype(np.uint64) << np.uint64(32) | word[both + 1].astype(np.uint64)


def _look_up(terms: pl.Series, vocabulary: pl.Series) -> np.ndarray:
    """Row of each term in the vocabulary, int64, -1 where it has none."""
    found = terms.to_frame("term").join(
        vocabulary.to_frame("term").with_row_index("at"), on="term", how="left", maintain_order="left"
    )
    return found["at"].cast(pl.Int64).fill_null(-1).to_numpy()


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Matrix:
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)


def _count_words(values: Values, max_words: int) -> tuple[pl.DataFrame, int, int]:
    """Number of sampled texts that hold each word; the number of texts and of their characters."""
    total = pl.DataFrame(schema={"term": pl.String, "count": pl.Int64})
    texts = characters = 0
    for chunk in values():
        for part in _slices(chunk):
            row, at, distinct = _tokens(part, max_words)
            held = np.unique(at * len(part) + row) // len(part)
            total = _add(total, distinct, np.bincount(held, minlength=len(distinct)))
            texts, characters = texts + len(part), characters + int(part.str.len_bytes().sum())
    return total, texts, characters


def _count_trigrams(words: pl.DataFrame) -> pl.DataFrame:
    """Number of texts of the words that hold each trigram; a text with two such words counts twice."""
    row, trigram = _spellings(words["term"])
    return pl.DataFrame({"term": trigram, "count": words["count"].to_numpy()[row]}).group_by("term").sum()


def _count_pairs(values: Values, state: dict[str, np.ndarray], max_words: int) -> pl.DataFrame:
    """Number of sampled texts that hold each pair of neighboring words, by the pair's code."""
    words = _unpack(state["words"])
    total = pl.DataFrame(schema={"term": pl.UInt64, "count": pl.Int64})
    for chunk in values():
        for part in _slices(chunk):
            row, at, distinct = _tokens(part, max_words)
            pair_row, code = _pair_codes(row, _look_up(distinct, words)[at])
            codes, group = np.unique(code, return_inverse=True)
            held = np.unique(group * len(part) + pair_row) // len(part)
            total = _add(total, pl.Series(codes, dtype=pl.UInt64), np.bincount(held, minlength=len(codes)))
    return total


def _add(total: pl.DataFrame, terms: pl.Series, counts: np.ndarray) -> pl.DataFrame:
    part = pl.DataFrame({"term": terms, "count": counts.astype(np.int64)})
    total = pl.concat([total, part]).group_by("term").sum()
    return total.filter(pl.col("count") > 1) if len(total) > COUNTED else total


def _most_frequent(counts: pl.DataFrame, size: int, least: int) -> pl.DataFrame:
    """The `size` terms of the most texts, ties by the term itself."""
    return counts.filter(pl.col("count") >= least).sort(["count", "term"], descending=[True, False]).head(size)


def _pack(terms: pl.Series) -> np.ndarray:
    return np.frombuffer("\n".join(terms.to_list()).encode(), np.uint8)


def _unpack(packed: np.ndarray) -> pl.Series:
    text = packed.tobytes().decode()
    return pl.Series("term", text.split("\n") if text else [], dtype=pl.String)
