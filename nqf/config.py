"""Configuration: frozen, keyword-only dataclasses, YAML files and typed overrides.

A YAML file gives any subset of the keys below; what it leaves out has the default that stands here. Every
stage saves the resolved configuration with the run, so a run folder says what made it. Types, ranges and
combinations are checked whenever a section is made: from a file, from the command line and in Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import reprlib
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from annotated_types import Interval, Len

from nqf import files

T = TypeVar("T")

MISSING_WORDS = (
    *"-1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> #N/A #NA N/A n/a NA NULL null NaN nan None \\N".split(),
    "#N/A N/A",
)
r"""Words for nothing: those of pandas (`pandas._libs.parsers.STR_NA_VALUES`, pandas 3.1) and MySQL's `\N`."""
TimeFormat = Literal[
    "seconds", "milliseconds", "microseconds", "nanoseconds", "digits", "excel", "month-first", "day-first"
]


class InputError(ValueError):
    """Something given that cannot be used; where its own words made the message enormous, the middle is left out."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1_500 else f"{message[:1_000]} (…) {message[-400:]}")


class ConfigError(InputError):
    """A configuration that cannot be used; the message names the file, the key and what to do.

    Attributes:
      problem: The message without file and key.
      key: Dotted key; empty if there is none.
    """

    def __init__(self, problem: str, *, key: str = "", where: str = "") -> None:
        super().__init__(": ".join(part for part in (where, key, problem) if part))
        self.problem, self.key = problem, key


# Of any number of something; indices are int32.
Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
CountOrNone = Annotated[int, Interval(ge=0, le=2**31 - 1)]
# NumPy's, grain's and jax's seeds, to which stages and batches add small numbers.
Seed = Annotated[int, Interval(ge=0, le=2**31 - 1)]
Width = Annotated[int, Interval(ge=1, le=65_536)]
WidthOrNone = Annotated[int, Interval(ge=0, le=65_536)]
# Layers, heads, query tokens, devices, processes.
Few = Annotated[int, Interval(ge=1, le=4_096)]
FewOrNone = Annotated[int, Interval(ge=0, le=4_096)]
Share = Annotated[float, Interval(ge=0, le=1)]
# Of what must not be all: dropout, or items held out.
Rate = Annotated[float, Interval(ge=0, lt=1)]
Weight = Annotated[float, Interval(ge=0, le=1e6)]
Temperature = Annotated[float, Interval(ge=1e-3, le=1e3)]
LearningRate = Annotated[float, Interval(gt=0, le=10)]

_PATH_KEYS = ("items", "interactions", "schema")
DATA_PATHS = (*_PATH_KEYS, "inter", "reviews", "candidates")
"""Keys of the data section that are paths, or addresses of the same files (`nqf.data.addresses`)."""
# An address as `Path` has it, with one slash. A drive of Windows has one letter.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Makes a frozen, keyword-only dataclass that refuses what its annotations do not allow (`ConfigError`).

    Types are strict: no bool is a number, no text either. Ranges are those of `Interval` and `Len` in `Annotated`;
    nan and inf are in none. A `Path` is a local one: no folder is made of an address. `__post_init__` checks
    combinations.
    """
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)
    build = made.__init__

    @functools.wraps(build)
    def checked(self: Any, **values: Any) -> None:
        for key, value in values.items():
            if isinstance(value, Path) and _ADDRESS.match(str(value)):
                # Credentials are known by the two slashes that `Path` makes one of.
                name = files.masked(str(value).replace(":/", "://", 1))
                problem = f"{shown(name)} is an address, which tables and runs may have; this path has to be local: "
                advice = "mount it (gcsfuse, mountpoint-s3, rclone) or copy it, and give that path"
                raise ConfigError(problem + advice, key=key)
        try:
            build(self, **values)
        except pydantic.ValidationError as error:
            raise _refusal(made, error) from None

    made.__init__ = checked
    return made


def _refusal(cls: type, error: pydantic.ValidationError) -> ConfigError:
    """The first of the errors, in our words."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return ConfigError(cause.problem, key=cause.key, where=cls.__name__)
    hints, key = hints_of(cls), str(first["loc"][0])
    if key not in hints:
        return ConfigError(f"unknown key {shown(key)}{_nearest(key, hints)}", where=cls.__name__)
    if first["type"] == "missing":
        problem = f"is missing; expected {kind_of(hints[key])}"
    else:
        problem = f"expected {kind_of(hints[key])}, found {shown(first['input'])}; give one, or leave the key out"
    return ConfigError(problem, key=key, where=cls.__name__)


def _nearest(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key[:200], list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(known)}"


def hints_of(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with their ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def kind_of(hint: Any) -> str:
    """A type with its range as a reader of YAML would call it: "a number from 0 to 1"."""
    inner, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is Annotated:
        kind = kind_of(inner[0])
        if inner[0] in (int, float):
            return f"{kind} {range_of(hint)}"
        return kind.replace("a list", "a list of at least one")
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        return f"a list, each {kind_of(inner[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else kind_of(part) for part in inner)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names[hint] if hint in names else "keys and values"


def range_of(hint: Any) -> str:
    """The range of the numbers in a type in words; empty if there is none."""
    for part in (*getattr(hint, "__metadata__", ()), *typing.get_args(hint)):
        if isinstance(part, Interval):
            low = f"above {part.gt:,.12g}" if part.gt is not None else f"from {part.ge:,.12g}"
            between = " to" if part.gt is None and part.lt is None else ", up to"
            return low + (f", below {part.lt:,.12g}" if part.lt is not None else f"{between} {part.le:,.12g}")
        if found := range_of(part):
            return found
    return ""


def _refuse(wrong: object, key: str, problem: str) -> None:
    if wrong:
        raise ConfigError(problem, key=key)


def _check_heads(heads: int, width: int) -> None:
    _refuse(
        width % heads,
        "heads",
        f"{heads} heads cannot share a width of {width} evenly; give a number that divides width",
    )


def _check_decay(learning_rate: float, weight_decay: float) -> None:
    _refuse(
        learning_rate * weight_decay >= 1,
        "weight_decay",
        f"{weight_decay:g} times learning_rate, {learning_rate:g}, takes the whole of a weight in a step; give "
        f"one below {1 / learning_rate:g}, or lower learning_rate",
    )


def _check_batch(loss: LossConfig, optim: OptimConfig) -> None:
    _refuse(
        loss.negatives == "in-batch" and loss.positions == "last" and optim.batch_size == 1,
        "optim.batch_size",
        "a batch of 1 with one position has no negatives for loss.negatives: in-batch; give at least 2",
    )


@section
class SyntheticConfig:
    """The built-in catalogue (`data.format: synthetic`), deterministic by `data.seed`.

    Attributes:
      items: Number of items.
      users: Number of users.
      min_events: Shortest history of a user, in interactions.
      max_events: Longest history of a user, in interactions.
      unseen_share: Share of the items, 0 to 1, that occur only as evaluation targets, never in training.
      missing_share: Share of the values, 0 to 1, that are missing in every optional field.
      images: Whether a PNG thumbnail is drawn for each item.
    """

    items: Count = 3_000
    users: Count = 4_000
    min_events: Annotated[int, Interval(ge=3, le=10_000)] = 8
    max_events: Annotated[int, Interval(ge=3, le=10_000)] = 20
    unseen_share: Annotated[float, Interval(ge=0, le=0.5)] = 0.1
    missing_share: Rate = 0.1
    images: bool = True

    def __post_init__(self) -> None:
        _refuse(
            self.min_events > self.max_events,
            "min_events",
            f"{self.min_events} is above max_events, {self.max_events}; lower it",
        )
        _refuse(
            self.items < 2 * self.max_events,
            "items",
            f"{self.items} are too few for histories of max_events, {self.max_events}, without an item twice; "
            f"give at least {2 * self.max_events}, or lower max_events",
        )


@section
class DialectConfig:
    """How a text table is written: CSV, TSV and RecBole's files. `python -m nqf.data inspect` guesses it.

    Attributes:
      separator: Character between fields; null takes the one that gives all rows the width of the header, and says so.
      encoding: A name that Python knows, such as `cp1252`; null is UTF-8, or what a byte order mark announces.
      quote: Character around fields that hold separators, doubled inside; empty where quotes are plain text.
      escape: Character that takes away the meaning of the next one, such as a backslash; empty for none.
      bad_lines: What to do with lines that cannot be read, as those with too many fields: `refuse` or `drop` (counted).
    """

    separator: str | None = None
    encoding: str | None = None
    quote: str = '"'
    escape: str = ""
    bad_lines: Literal["refuse", "drop"] = "refuse"


@section
class ColumnsConfig:
    """Names of columns, where they are not the usual ones; null looks for common names and says what it took.

    Attributes:
      user: User of an interaction.
      item: Item of an interaction.
      time: Time of an interaction.
      rating: Rating of an interaction.
      review: Text of an interaction.
      id: Id in the item table; null looks for the name of `item` first.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    review: str | None = None
    id: str | None = None


@section
class DataConfig:
    """Where the tables come from and how they are split.

    Attributes:
      format: `synthetic`, `table` (CSV, TSV, JSON, JSONL, Parquet, Excel, folders of parts), `recbole` (.inter and
        .item), `amazon-2023` (metadata and reviews) or `unirec` (the reference system's JSON files).
      items: Path of the item table, or its address (`gs://`, `s3://`, ...), as of all files of this section; relative
        paths in a YAML file start at that file's folder, or if there is nothing at the working directory.
      interactions: Path of the interaction table.
      schema: Path of the schema YAML.
      inter: Path of an .inter file with the ratings and times of the samples' interactions (`unirec`).
      reviews: Path of a review dictionary with the samples' reviews (`unirec`); ratings and times that `inter` lacks
        are read from it too.
      candidates: Path of a JSON file of candidate embeddings, `{item id: [floats]}`, which then stand in place of those
        that `fields.text_encoder` makes of one document per item.
      columns: Names of the columns of users, items, times, ratings and reviews (`table` and `recbole`).
      items_dialect: How the item table is written, if it is text.
      interactions_dialect: How the interaction table is written, if it is text.
      seed: Seed of the synthetic catalogue and of the cold-item draw.
      split: `leave-one-out` (last item test, the one before it validation), `temporal` (global time cuts) or `samples`
        (`unirec`: the test file's targets are the test, the train file's samples are trained on).
      valid_share: Share of the interactions between the two cuts of the temporal split; of the training samples, whose
        targets are held out for validation.
      test_share: Share of the interactions after the second cut of the temporal split.
      cold_share: Share of the items, 0 to 1, removed from training altogether.
      refit: Train on what the validation holds out too, for the last model, when everything has been chosen without.
        Nothing can be selected then: all stages that rank keep their newest parameters.
      min_interactions: Users with fewer interactions are left out and counted.
      unknown_items: What to do with interactions whose item the catalogue lacks: `drop` (counted) or `refuse`.
      bad_values: What to do with numbers and times that do not parse: `missing` (counted) or `refuse`.
      missing_words: Texts that stand for a missing value, whatever the column.
      missing_ids: What to do with rows whose user or item id is missing or one of `missing_words`: `refuse`, `drop`
        (counted), or `keep`, where the words are ids.
      duplicates: What to do with interactions of one user, item, time, rating and review: `keep` (counted) or `merge`.
      time_format: How the times of interactions are read, as a field's `format`; empty decides from all of them.
      without: Fields of the schema that are left out, to see what they are worth.
      shuffle_ties: Put interactions of one user and time in random order (of `seed`), to see what part of a result is
        the order of the file.
      use_after_the_fact: Also use fields that the schema marks as known only after the fact.
      synthetic: The built-in catalogue.
    """

    format: Literal["synthetic", "table", "recbole", "amazon-2023", "unirec"] = "synthetic"
    items: str | None = None
    interactions: str | None = None
    schema: str | None = None
    inter: str | None = None
    reviews: str | None = None
    candidates: str | None = None
    columns: ColumnsConfig = ColumnsConfig()
    items_dialect: DialectConfig = DialectConfig()
    interactions_dialect: DialectConfig = DialectConfig()
    seed: Seed = 0
    split: Literal["leave-one-out", "temporal", "samples"] = "leave-one-out"
    valid_share: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    test_share: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    cold_share: Rate = 0.0
    refit: bool = False
    min_interactions: Count = 3
    unknown_items: Literal["drop", "refuse"] = "drop"
    bad_values: Literal["missing", "refuse"] = "missing"
    missing_words: tuple[str, ...] = MISSING_WORDS
    missing_ids: Literal["refuse", "drop", "keep"] = "refuse"
    duplicates: Literal["keep", "merge"] = "keep"
    time_format: tuple[TimeFormat, ...] = ()
    without: tuple[str, ...] = ()
    shuffle_ties: bool = False
    use_after_the_fact: bool = False
    synthetic: SyntheticConfig = SyntheticConfig()

    def __post_init__(self) -> None:
        for key in _PATH_KEYS if self.format != "synthetic" else ():
            _refuse(
                not getattr(self, key), key, f"format '{self.format}' needs this path; give it, or format: synthetic"
            )
        for key, given in (("inter", self.inter), ("reviews", self.reviews), ("split", self.split == "samples")):
            name = files.masked(str(getattr(self, key)))[:200]
            _refuse(
                given and self.format != "unirec",
                key,
                f"{name!r} belongs to UniRec's sample files; set format: unirec, or remove it",
            )
        _refuse(
            self.valid_share + self.test_share >= 1,
            "valid_share",
            f"{self.valid_share:g} and test_share, {self.test_share:g}, leave nothing to train on; "
            "give shares whose sum is below 1",
        )


@section
class FieldsConfig:
    """Frozen encoders and the field cache.

    Attributes:
      text_encoder: `tfidf-svd`, or a local folder or hub name of a BERT-family or Qwen3-Embedding model.
      text_width: Components of the truncated SVD.
      text_features: Largest TF-IDF vocabulary.
      image_encoder: `pca` (thumbnails), or a local folder or hub name of a CLIP model.
      image_width: Principal components of the thumbnails.
      category_width: Width of the hashed category vectors.
      number_frequencies: Fourier frequencies of a scaled number.
      fit_sample: Most distinct values that an encoder is fitted on.
      chunk_rows: Items read and encoded at a time.
    """

    text_encoder: str = "tfidf-svd"
    text_width: Width = 128
    text_features: Count = 30_000
    image_encoder: str = "pca"
    image_width: Width = 64
    category_width: Width = 64
    number_frequencies: Annotated[int, Interval(ge=0, le=32)] = 8
    fit_sample: Count = 100_000
    chunk_rows: Count = 16_384


@section
class OptimConfig:
    """AdamW with warm-up and cosine decay, and when to validate and stop.

    Attributes:
      batch_size: Examples per step, over all devices.
      epochs: Passes over the training examples; with 0 the stage keeps the parameters that it starts from.
      learning_rate: Peak learning rate.
      adapter_learning_rate: Peak learning rate of LoRA adapters.
      warmup_share: Share of the steps, 0 to 1, spent on linear warm-up.
      final_share: Learning rate at the end as a share of the peak.
      weight_decay: Decoupled weight decay on matrices; none on norms, biases and tables.
      clip_norm: Largest global norm of the trainable gradient.
      average: Share of the steps so far over which the parameters that are validated and kept are averaged,
        exponentially; with 0 they are those of the last step.
      validate_every: Epochs between validations.
      patience: Validations without improvement before the stage stops; 0 never stops early.
    """

    batch_size: Count = 128
    epochs: CountOrNone = 10
    learning_rate: LearningRate = 1e-3
    adapter_learning_rate: LearningRate = 2e-4
    warmup_share: Share = 0.05
    final_share: Share = 0.05
    weight_decay: Weight = 0.01
    clip_norm: Annotated[float, Interval(gt=0, le=1e6)] = 1.0
    average: Share = 0.1
    validate_every: Count = 1
    patience: CountOrNone = 0

    def __post_init__(self) -> None:
        _check_decay(self.learning_rate, self.weight_decay)


@section
class QFormerConfig:
    """Size of a Q-Former (BLIP-2 block: post-norm, GELU).

    Attributes:
      width: Hidden width.
      layers: Number of blocks.
      heads: Attention heads; divides `width`.
      mlp_width: Width of the feed-forward layer.
      queries: Query tokens.
      cross_every: Cross-attention in every k-th block, the first included.
      dropout: Dropout rate of attention outputs and feed-forward outputs.
    """

    width: Width = 64
    layers: Few = 2
    heads: Few = 4
    mlp_width: Width = 256
    queries: Few = 2
    cross_every: Few = 1
    dropout: Rate = 0.1

    def __post_init__(self) -> None:
        _check_heads(self.heads, self.width)


@section
class ItemConfig:
    """Item stage: masked field reconstruction and a contrastive loss on pairs from sequences.

    Attributes:
      qformer: Size of the Item Q-Former.
      fusion: How value, field name and modality meet: `add` (the paper), `concat` (then projected) or `none`.
      field_dropout: Probability that a present field is hidden from the encoder in training.
      reconstruction: `scaled` (each field's mean squared error over that of its mean vector, of all items of a batch)
        or `squared` (the reference's: squared error summed over a field's width, averaged over the anchors' fields).
      reconstruction_weight: Weight of the masked field reconstruction.
      contrastive: `infonce` (in-batch), `triplet` (the reference's margin loss, with a gradient of the anchors alone)
        or `none`.
      contrastive_weight: Weight of the contrastive loss.
      margin: Margin of the triplet loss, in units of Euclidean distance.
      temperature: Temperature of InfoNCE over cosines.
      held_out_share: Share of the items, 0 to 1, never trained on, for validation of the reconstruction.
      optim: Optimizer and schedule.
    """

    # Hidden fields regularize already: dropout of 0.1 beside them explained less of the quick start's held-out items.
    qformer: QFormerConfig = QFormerConfig(dropout=0.0)
    fusion: Literal["add", "concat", "none"] = "add"
    field_dropout: Rate = 0.3
    reconstruction: Literal["scaled", "squared"] = "scaled"
    reconstruction_weight: Weight = 1.0
    contrastive: Literal["infonce", "triplet", "none"] = "infonce"
    contrastive_weight: Weight = 0.25
    margin: Weight = 0.5
    temperature: Temperature = 0.07
    held_out_share: Rate = 0.1
    # Of 0.01, 0.3, 1 and 3 a weight decay of 1 explained most of ml-100k's held-out items; on the quick start it beat
    # 0.01 as well.
    optim: OptimConfig = OptimConfig(batch_size=128, epochs=5, learning_rate=4e-3, warmup_share=0.1, weight_decay=1.0)

    def __post_init__(self) -> None:
        contrastive = self.contrastive != "none" and self.contrastive_weight > 0
        _refuse(
            not (contrastive or self.reconstruction_weight or not self.optim.epochs),
            "reconstruction_weight",
            "0 with no contrastive loss leaves nothing to learn; give one of the two a weight, or set optim.epochs "
            "to 0",
        )
        _refuse(
            contrastive and self.contrastive == "infonce" and self.optim.batch_size == 1,
            "optim.batch_size",
            "a batch of 1 has no negatives for contrastive: infonce; give at least 2, or set contrastive to none",
        )


@section
class CandidatesConfig:
    """Candidate tower: what an item is scored by.

    Attributes:
      sources: Frozen inputs of the tower: `item` (Item Q-Former vectors), `fields` (each field's vectors apart,
        whitened), `neighbors` (the means of those of the ten items that occur most often near the item in training
        histories; nothing for new items), `text` (candidate text embeddings, of one document per item).
      text_width: Whitened principal components of the text embeddings that the models read, and the most of a field;
        0 reads the text embeddings as they are and all components of the fields.
      width: Width of the learned part of user and item vectors.
      free_vectors: Add a learned vector per item, for what content does not tell.
      free_dropout: Probability, per item and step, that its learned vector is hidden in training.
      transitions: Add a linear map of the history's recency-weighted item vectors to the user vector, beside the
        model's pooled state: which item follows which, as in a factorized Markov chain.
      frozen_similarity: Keep the cosine of the frozen text embeddings as a part of the score, weighted by a
        learned scale; it is what ranks items that training never saw.
      temperature: Temperature of the scores; the one at the start if it is learned.
      learn_temperature: Whether the temperature is learned.
      frozen: Score by the cosine of the pooled vector itself with the frozen text embeddings (as the reference, with
        `text_width: 0`): no tower, nothing beside it, and a projection only where their widths differ. Of the other
        keys only `text_width` and the temperature's are then read.
    """

    sources: Annotated[tuple[Literal["item", "fields", "neighbors", "text"], ...], Len(1)] = (
        "item",
        "fields",
        "neighbors",
    )
    text_width: WidthOrNone = 128
    width: Width = 64
    free_vectors: bool = True
    free_dropout: Rate = 0.5
    transitions: bool = True
    frozen_similarity: bool = True
    temperature: Temperature = 0.07
    learn_temperature: bool = True
    frozen: bool = False

    @property
    def learned_width(self) -> int:
        """Leading part of an item's vector that is learned."""
        return 0 if self.frozen else self.width

    def __post_init__(self) -> None:
        _refuse(
            len(set(self.sources)) < len(self.sources),
            "sources",
            f"{', '.join(self.sources)}: one is named twice; name each once",
        )
        _refuse(
            self.learn_temperature and self.temperature < 0.01,
            "temperature",
            f"{self.temperature:g} is below 0.01, the least that is learned, where learning stands still; give a "
            "larger one, or set learn_temperature to false",
        )


@section
class LossConfig:
    """Ranking loss of the user and joint stages.

    Attributes:
      negatives: `full` (the whole catalogue), `sampled`, `in-batch`, or `given` (the candidates of UniRec's samples,
        whose targets are then the only examples).
      samples: Negatives per step of `sampled`; of each target of `given`, the first ones of its sample.
      log_q: Correct in-batch and sampled scores by the log of the sampling probability.
      duplicate_cosine: Items whose frozen text embeddings have a larger cosine than this are no negatives for each
        other; 0 for no such limit.
      positions: Supervise `all` positions of the history or only the `last`.
    """

    negatives: Literal["full", "sampled", "in-batch", "given"] = "full"
    samples: Count = 4_096
    log_q: bool = True
    duplicate_cosine: Share = 0.0
    positions: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        _refuse(
            self.negatives == "given" and self.positions == "all",
            "positions",
            "negatives: given belong to the targets of samples, which are the last positions; set this to last",
        )


@section
class UserConfig:
    """User stage: the User Q-Former on histories of item tokens.

    Attributes:
      qformer: Size of the User Q-Former; `queries` is the number of user tokens.
      max_history: Newest items of a history that it reads.
      item_dropout: Probability, in training, that an item of the history is hidden (user and joint stage).
      ratings: Add an embedding of the rating.
      times: Add calendar parts and time gaps.
      reviews: Add a projection of the review's text embedding, where reviews exist.
      regression_weight: Weight of predicting the next item's query tokens (mean squared error).
      ranking_weight: Weight of the ranking loss. With 0 nothing is ranked, and the newest parameters are kept.
      loss: Ranking loss.
      optim: Optimizer and schedule.
    """

    qformer: QFormerConfig = QFormerConfig(queries=2, layers=1)
    max_history: Width = 50
    item_dropout: Rate = 0.0
    ratings: bool = True
    times: bool = True
    reviews: bool = True
    regression_weight: Weight = 0.1
    ranking_weight: Weight = 1.0
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig(epochs=8)

    def __post_init__(self) -> None:
        _check_batch(self.loss, self.optim)
        _refuse(
            not (self.regression_weight or self.ranking_weight or not self.optim.epochs),
            "ranking_weight",
            "0 with a regression_weight of 0 leaves nothing to learn; give one of the two a weight, or set "
            "optim.epochs to 0",
        )


@section
class BackboneConfig:
    """The Qwen3 that reads the prompt.

    Attributes:
      path: Local folder or hub name of pretrained weights: the base is frozen and LoRA is trained. Empty: a
        small Qwen3 of the sizes below, initialized at random and trained whole.
      width: Hidden width of the small model.
      layers: Decoder layers of the small model.
      heads: Query heads of the small model.
      kv_heads: Key-value heads of the small model.
      head_dim: Width of a head of the small model.
      mlp_width: Width of the gated feed-forward layer of the small model.
      vocabulary: Tokens of the byte-level BPE that is trained on the catalogue's text.
      dropout: Dropout of the small model's embeddings and residual branches in training.
      lora_rank: Rank of the adapters (pretrained base only).
      lora_alpha: Scale numerator of the adapters; the update is scaled by alpha / rank.
      lora_dropout: Dropout on the adapters' input.
      lora_targets: Projections that carry adapters.
      attention: Attention kernel: `auto` (the fused one of the platform where it can be used), `xla` or `cudnn`.
      remat: Recompute activations of each layer in the backward pass.
    """

    path: str = ""
    width: Width = 64
    layers: Few = 2
    heads: Few = 4
    kv_heads: Few = 2
    head_dim: Annotated[int, Interval(ge=2, le=65_536)] = 16
    mlp_width: Width = 192
    vocabulary: Annotated[int, Interval(ge=265, le=2**31 - 1)] = 2_048
    dropout: Rate = 0.1
    lora_rank: Width = 16
    lora_alpha: Annotated[float, Interval(gt=0, le=1e6)] = 32.0
    lora_dropout: Rate = 0.1
    lora_targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: bool = False

    def __post_init__(self) -> None:
        _refuse(
            self.heads % self.kv_heads,
            "kv_heads",
            f"{self.kv_heads} key-value heads cannot serve {self.heads} heads in equal groups; give a number that "
            "divides heads",
        )
        _refuse(self.head_dim % 2, "head_dim", f"{self.head_dim} is odd; rotary positions turn pairs, give an even one")


@section
class PromptConfig:
    """What the language model reads.

    Attributes:
      instruction: Text before the history.
      history_items: Newest items that stand in the prompt one by one.
      title_tokens: Tokens of each item's title beside its injected tokens; 0 leaves titles out.
      user_tokens: Whether the user tokens are injected after the items.
      interactions: Whether each item's tokens carry the time, rating and review of its interaction (those that `user`
        reads).
      pooling: `last` (the end token's vector, as Qwen3-Embedding) or `mean` over valid tokens.
    """

    instruction: str = "Given the items a user chose, predict the next one.\nHistory:"
    history_items: Width = 20
    title_tokens: FewOrNone = 0
    user_tokens: bool = True
    interactions: bool = False
    pooling: Literal["last", "mean"] = "last"


@section
class MiningConfig:
    """Hard negatives of every training target, mined with the user stage's model when the joint stage begins.

    Attributes:
      count: Negatives of each target, beside the sampled or in-batch ones; 0 for none.
      margin: Share of the target's score, 0 to 1, above which an item may be a false negative and is passed over, as
        are the items of the user's training events.
    """

    count: WidthOrNone = 0
    margin: Share = 0.95


@section
class JointConfig:
    """Joint stage: Qwen3 reads item and user tokens; its pooled vector ranks the catalogue.

    Attributes:
      backbone: The language model.
      prompt: What it reads.
      candidates: What an item is scored by: the candidate `tower`, or the vector that the same `qwen3` makes of the
        item's title and tokens (negatives must not be `full`).
      train_user_qformer: Whether the User Q-Former continues to learn.
      train_item_qformer: Whether the Item Q-Former continues to learn (negatives must not be `full`).
      micro_batch: Histories encoded at a time, so that a batch need not fit in memory; 0 for all at once.
      mining: Hard negatives.
      loss: Ranking loss.
      optim: Optimizer and schedule.
    """

    backbone: BackboneConfig = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    candidates: Literal["tower", "qwen3"] = "tower"
    train_user_qformer: bool = True
    train_item_qformer: bool = False
    micro_batch: CountOrNone = 0
    mining: MiningConfig = MiningConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig(epochs=10, learning_rate=3e-3)

    def __post_init__(self) -> None:
        for key, wanted, why in (
            ("train_item_qformer", self.train_item_qformer, "it re-encodes the items of each batch"),
            ("candidates", self.candidates == "qwen3", "qwen3 reads a prompt for each item of a batch"),
            ("mining.count", self.mining.count, "mining adds negatives to drawn ones"),
        ):
            _refuse(
                wanted and self.loss.negatives == "full",
                key,
                f"{why}, so loss.negatives cannot be 'full'; set it to 'sampled' or 'in-batch'",
            )
        _refuse(
            self.mining.count and self.loss.negatives == "given",
            "mining.count",
            "loss.negatives: given has its own negatives of each target; set this to 0",
        )
        if not self.mining.count:
            _check_batch(self.loss, self.optim)


@section
class CountingConfig:
    """How pairs of items count beside trained vectors.

    What is not given is chosen on the validation cases (stage `score`), or is as the baselines without training have it
    where there are none to choose on.

    Attributes:
      window: Places over which a pair counts.
      decay: Factor of a pair's weight for each place between its items; 0 for 1 / distance.
      backward: Share of a pair's weight that counts for the earlier item after the later one.
      ties: Whether items of one moment are a `sequence`, in the order of the source, or a `set`, which is at distance 1
        in both directions and whose members are equally far from all others.
      damp_history: Power of the history item's popularity that divides the counts.
      damp_candidate: The same of the candidate's.
      scale: Counts enter as log(1 + count / scale); 0 for the counts themselves.
      newest: Newest items of a history that count.
      recency: Factor of a history item's weight for each newer one; 0 for 1 / place.
    """

    window: Few | None = None
    decay: Share | None = None
    backward: Share | None = None
    ties: Literal["sequence", "set"] | None = None
    damp_history: Share | None = None
    damp_candidate: Share | None = None
    scale: Weight | None = None
    newest: Few | None = None
    recency: Share | None = None


@section
class EvaluationConfig:
    """Evaluation on the full catalogue.

    Attributes:
      ks: Cut-offs of HR and NDCG.
      repeats: Whether an item that the user had before counts as a target and may be recommended. Without, the past is
        kept out of rankings and recommendations, and cases whose target is in it are left out and counted; with it,
        nothing is kept out. (`mask_seen` of older files says the opposite.)
      bootstrap: Bootstrap resamples of the users for the 95 % intervals.
      batch_size: Users scored at a time.
      new_item_weight: Factor of the frozen similarity that was learned in the score of items that training never saw,
        whose learned part says less; in recommendations too. A validation with `data.cold_share` tells what it should
        be: known items give way to new ones as it grows.
      cooccurrence_weight: What the co-occurrence of known events counts beside the vectors of the joint stage, in
        recommendations too; 0 for none. Default: chosen on the validation cases (stage `score`).
      text_weight: The same of the frozen texts' cosine, beyond what the joint stage learned.
      factor_weight: What factors of the counted pairs weigh in vectors that rank by themselves in a dense index: row
        `joint_vectors` of tables, `export --format index`; 0 for none. Default: chosen as the other two.
      recent_days: Window of the recent-popularity baseline, in days before the last training event; without
        timestamps the last tenth of the training events is used.
    """

    ks: Annotated[tuple[Count, ...], Len(1)] = (1, 5, 10, 20, 50)
    repeats: bool = False
    bootstrap: CountOrNone = 1_000
    batch_size: Count = 512
    # Chosen on the validation cases of amazon-beauty with `data.cold_share`: by the vectors alone, new items were then
    # found as often as known ones.
    new_item_weight: Weight = 1.75
    cooccurrence_weight: Weight | None = None
    text_weight: Weight | None = None
    factor_weight: Weight | None = None
    counting: CountingConfig = CountingConfig()
    recent_days: Annotated[float, Interval(gt=0, le=1e6)] = 30.0


@section
class SASRecConfig:
    """SASRec (Kang and McAuley 2018) with a softmax over the whole catalogue at every position.

    Attributes:
      width: Hidden width, and width of the item vectors, which are tied to the input.
      layers: Causal self-attention blocks.
      heads: Attention heads; divides `width`.
      max_history: Newest items that it reads; longer training sequences are cut into windows of this length.
      dropout: Dropout rate of inputs, attention weights and residual branches.
      temperature: Temperature of the cosine scores at the start; it is learned.
      batch_positions: Supervised positions per step.
      epochs: Most passes over the training sequences.
      learning_rate: Peak learning rate of AdamW; warm-up of one epoch, then cosine decay.
      weight_decay: Decoupled weight decay.
      patience: Epochs without a better validation NDCG@10 before training stops; 0 never stops early.
    """

    width: Width = 64
    layers: Few = 2
    heads: Few = 2
    max_history: Width = 50
    dropout: Rate = 0.3
    temperature: Temperature = 0.05
    batch_positions: Count = 1_024
    epochs: Count = 20
    learning_rate: LearningRate = 3e-3
    weight_decay: Weight = 0.01
    patience: CountOrNone = 5

    def __post_init__(self) -> None:
        _check_heads(self.heads, self.width)
        _check_decay(self.learning_rate, self.weight_decay)


@section
class BaselinesConfig:
    """Baselines that are trained; the training-free ones always run.

    Attributes:
      sasrec: Whether the evaluation also trains a SASRec.
      sasrec_options: Its size and schedule.
      sasrec_cooccurrence_weight: What co-occurrence counts beside it in a row of its own; 0 for no such row. Default:
        chosen on the validation cases, as `evaluation.cooccurrence_weight`.
      sasrec_counting: How pairs count there.
    """

    sasrec: bool = False
    sasrec_options: SASRecConfig = SASRecConfig()
    sasrec_cooccurrence_weight: Weight | None = None
    sasrec_counting: CountingConfig = CountingConfig()


@section
class MeshConfig:
    """How the devices of all processes share the work; the product of the sizes is their number.

    Attributes:
      data: Devices over which each batch is split; 0 for all that the other two leave.
      fsdp: Devices over which parameters and optimizer state are split; each batch is split over them too.
      tensor: Devices over which the widths inside layers are split.
    """

    data: CountOrNone = 0
    fsdp: Few = 1
    tensor: Few = 1


@section
class TrainingConfig:
    """What all training stages share.

    Attributes:
      dtype: Compute dtype: `auto` (bfloat16 on accelerators, float32 on CPU), `float32` or `bfloat16`.
      tables: Where item tables live in training: `auto` (on the device when they fit), `device` or `host`.
      device_table_gib: Largest table, in GiB, that `auto` puts on the device.
      workers: Grain worker processes; 0 reads in threads. It changes no batch and no order.
      keep: Newest checkpoints kept beside the best one.
      save_every_seconds: Wall time between checkpoints, beside those of the validations; 0 saves after each step.
      skip_non_finite: Batches with a non-finite loss or gradient that a stage leaves out before it stops.
      mesh: Which devices share what.
      distributed: Join the other processes of one run. SLURM, Open MPI, GKE and TPU pods are detected; elsewhere
        set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      compilation_cache: Folder of XLA's persistent compilation cache; empty for the user's cache folder.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tables: Literal["auto", "device", "host"] = "auto"
    device_table_gib: Weight = 2.0
    workers: FewOrNone = 0
    keep: Count = 1
    save_every_seconds: Annotated[float, Interval(ge=0, le=1e9)] = 60.0
    skip_non_finite: CountOrNone = 0
    mesh: MeshConfig = MeshConfig()
    distributed: bool = False
    compilation_cache: str = ""


@section
class Config:
    """The whole configuration of a run.

    Attributes:
      name: Name of the run; its folder is `runs/<name>` unless `--run` says otherwise.
      seed: Seed of initialization, dropout and data order.
    """

    name: str = "run"
    seed: Seed = 0
    data: DataConfig = DataConfig()
    fields: FieldsConfig = FieldsConfig()
    item: ItemConfig = ItemConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    user: UserConfig = UserConfig()
    joint: JointConfig = JointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        history, prompt = self.user.max_history, self.joint.prompt.history_items
        _refuse(
            prompt > history,
            "joint.prompt.history_items",
            f"{prompt} items cannot stand in the prompt, as histories end after user.max_history, {history}; lower "
            "it, or raise that",
        )
        _refuse(
            self.candidates.frozen and self.joint.candidates == "qwen3",
            "joint.candidates",
            "qwen3 makes the item vectors, which candidates.frozen takes from the text embeddings; choose one",
        )
        for stage, loss in (("user", self.user.loss), ("joint", self.joint.loss)):
            _refuse(
                loss.negatives == "given" and self.data.split != "samples",
                f"{stage}.loss.negatives",
                "'given' are the candidates of UniRec's samples; set data.split: samples, or another kind here",
            )
            _refuse(
                self.training.tables == "host" and loss.negatives == "full",
                f"{stage}.loss.negatives",
                "'full' scores the whole catalogue, whose tables training.tables: host keeps off the device; set "
                "this to 'sampled' or 'in-batch', or that to 'auto'",
            )


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 200, 200
_LARGEST_YAML = 4 * 2**20
_MOST_KEYS = 10_000


def load_config(path: str | Path) -> Config:
    """Reads a YAML file into a `Config`.

    Args:
      path: YAML file. Relative data paths in it start at its own folder; those of nothing there, at the working
        directory, so that shipped configurations find what `nqf data fetch` has put into it.

    Raises:
      ConfigError: Missing file, malformed YAML, unknown key (with the nearest known one) or a value of the
        wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    config = from_tree(Config, read_yaml(path) or {}, where=str(path))
    data = config.data
    try:
        updates = {key: _located(path, value) for key in DATA_PATHS if (value := getattr(data, key)) is not None}
    except (OSError, ValueError) as error:
        # Names with a NUL, longer than the system has them, or of links that go round.
        raise ConfigError(f"{path}: data: a path that cannot be one: {shown(str(error))}") from error
    # A folder beside the file wins over a hub name of the same spelling; hub names are left alone.
    return dataclasses.replace(config, data=dataclasses.replace(data, **updates))


def _located(config: Path, value: str) -> str:
    if files.is_address(value):
        return value
    places = [config.parent / value, Path(value)]
    return str(next((place for place in places if place.exists()), places[0]).resolve())


class _Loader(yaml.SafeLoader):
    """Makes plain values only, and refuses merged mappings that multiply at every level."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_MOST_KEYS:,} keys", node.start_mark)


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file; its tags execute nothing.

    Raises:
      ConfigError: Too large, not UTF-8, not YAML, or with a tag that is not a plain value's.
    """
    if path.stat().st_size > _LARGEST_YAML:
        raise ConfigError(f"{path}: larger than {_LARGEST_YAML:,} bytes; this is no file that a person wrote")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error


def shown(value: Any) -> str:
    """The value for an error message, cut where it is long.

    A YAML file of some lines can hold lists that name each other, which would be 10^9 words when written out.
    """
    return _SHOWN.repr(value)


def config_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved configuration as YAML."""
    Path(path).write_text(config_text(config), encoding="utf-8")


def to_tree(value: Any) -> Any:
    """Turns configuration dataclasses into plain dictionaries, lists and scalars (for YAML, JSON and hashing).

    Credentials in addresses are left out (`nqf.files.masked`): what this makes is written into files.
    """
    if dataclasses.is_dataclass(value):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_tree(element) for element in value]
    return files.masked(value) if isinstance(value, str) else value


def from_tree(cls: type[T], tree: Any, *, where: str = "config", base: T | None = None) -> T:
    """Builds a section from a plain dictionary.

    Args:
      cls: The section.
      tree: Some of its keys with their values. Lists are read as tuples, and text as a number where one is wanted:
        YAML reads 1e-4 (no dot) as text.
      where: What error messages begin with.
      base: Has the values of the other keys; those of `cls` itself if it is None.

    Raises:
      ConfigError: Names the key by its dotted path with what is wrong and what it may be.
    """
    try:
        return _build(cls, tree, base)
    except ConfigError as error:
        raise ConfigError(error.problem, key=error.key, where=where) from None


def _build(cls: type[T], tree: Any, base: T | None) -> T:
    if not isinstance(tree, dict):
        raise ConfigError(f"expected keys and values, found {shown(tree)}")
    if cls is EvaluationConfig and isinstance(tree.get("mask_seen"), bool):
        # What older files and runs have in its place.
        tree = {key: value for key, value in tree.items() if key != "mask_seen"} | {"repeats": not tree["mask_seen"]}
    hints, values = typing.get_type_hints(cls), {}
    for key, value in tree.items():
        hint = hints.get(key)
        if not dataclasses.is_dataclass(hint):
            values[str(key)] = _plain(hint, value)
            continue
        try:
            # A section's own defaults hold for the keys of it that are not given, not those of its type.
            values[key] = _build(typing.cast(type, hint), value, getattr(base or cls, key, None))
        except ConfigError as error:
            dotted = f"{key}.{error.key}" if error.key else key
            raise ConfigError(error.problem, key=dotted) from None
    return typing.cast(T, cls(**values) if base is None else dataclasses.replace(typing.cast(Any, base), **values))


def _plain(hint: Any, value: Any) -> Any:
    """What a section takes for a value as YAML has it; what cannot be read stays as it is, and is refused there."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _plain(inner[0], value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_plain(inner[0], element) for element in value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
