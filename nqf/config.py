"""Configuration: frozen, keyword-only dataclasses, YAML files and typed overrides.

A YAML file gives any subset of the keys below; what it leaves out has the default that stands here. Every
stage saves the resolved configuration with the run, so a run folder says what made it.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml


class InputError(ValueError):
    """Something given that cannot be used; where its own words made the message enormous, the middle is left out."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1_500 else f"{message[:1_000]} (…) {message[-400:]}")


class ConfigError(InputError):
    """A configuration that cannot be used; the message names the file, the key and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
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

    items: int = 3_000
    users: int = 4_000
    min_events: int = 8
    max_events: int = 20
    unseen_share: float = 0.1
    missing_share: float = 0.1
    images: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tables come from and how they are split.

    Attributes:
      format: `synthetic`, `table` (CSV, TSV, JSONL, Parquet; plain or gz), `recbole` (.inter and .item),
        `amazon-2023` (raw meta and review JSONL) or `unirec` (the reference system's JSON files).
      items: Path of the item table; relative paths in a YAML file start at that file's folder.
      interactions: Path of the interaction table.
      schema: Path of the schema YAML.
      seed: Seed of the synthetic catalogue and of the cold-item draw.
      split: `leave-one-out` (last item test, the one before it validation) or `temporal` (global time cuts).
      valid_share: Share of the interactions between the two cuts of the temporal split.
      test_share: Share of the interactions after the second cut of the temporal split.
      cold_share: Share of the items, 0 to 1, removed from training altogether.
      refit: Train on what the validation holds out too, for the last model, when everything has been chosen without.
        Nothing can be selected then: all stages that rank keep their newest parameters.
      min_interactions: Users with fewer interactions are left out and counted.
      unknown_items: What to do with interactions whose item the catalogue lacks: `drop` (counted) or `refuse`.
      bad_values: What to do with numbers and times that do not parse: `missing` (counted) or `refuse`.
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
    seed: int = 0
    split: Literal["leave-one-out", "temporal"] = "leave-one-out"
    valid_share: float = 0.1
    test_share: float = 0.1
    cold_share: float = 0.0
    refit: bool = False
    min_interactions: int = 3
    unknown_items: Literal["drop", "refuse"] = "drop"
    bad_values: Literal["missing", "refuse"] = "missing"
    without: tuple[str, ...] = ()
    shuffle_ties: bool = False
    use_after_the_fact: bool = False
    synthetic: SyntheticConfig = SyntheticConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    text_width: int = 128
    text_features: int = 30_000
    image_encoder: str = "pca"
    image_width: int = 64
    category_width: int = 64
    number_frequencies: int = 8
    fit_sample: int = 100_000
    chunk_rows: int = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
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
      validate_every: Epochs between validations.
      patience: Validations without improvement before the stage stops; 0 never stops early.
    """

    batch_size: int = 128
    epochs: int = 10
    learning_rate: float = 1e-3
    adapter_learning_rate: float = 2e-4
    warmup_share: float = 0.05
    final_share: float = 0.05
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    validate_every: int = 1
    patience: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
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

    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp_width: int = 256
    queries: int = 2
    cross_every: int = 1
    dropout: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemConfig:
    """Item stage: masked field reconstruction and a contrastive loss on pairs from sequences.

    Attributes:
      qformer: Size of the Item Q-Former.
      fusion: How value, field name and modality meet: `add` (the paper), `concat` (then projected) or `none`.
      field_dropout: Probability that a present field is hidden from the encoder in training.
      reconstruction_weight: Weight of the masked field reconstruction.
      contrastive: `infonce` (in-batch), `triplet` (margin, as the reference) or `none`.
      contrastive_weight: Weight of the contrastive loss.
      margin: Margin of the triplet loss, in units of Euclidean distance.
      temperature: Temperature of InfoNCE over cosines.
      held_out_share: Share of the items, 0 to 1, never trained on, for validation of the reconstruction.
      optim: Optimiser and schedule.
    """

    # Hidden fields regularise already: dropout of 0.1 beside them explained less of the quick start's held-out items.
    qformer: QFormerConfig = QFormerConfig(dropout=0.0)
    fusion: Literal["add", "concat", "none"] = "add"
    field_dropout: float = 0.3
    reconstruction_weight: float = 1.0
    contrastive: Literal["infonce", "triplet", "none"] = "infonce"
    contrastive_weight: float = 0.25
    margin: float = 0.5
    temperature: float = 0.07
    held_out_share: float = 0.1
    # Of 0.01, 0.3, 1 and 3 a weight decay of 1 explained most of ml-100k's held-out items; on the quick start it beat
    # 0.01 as well.
    optim: OptimConfig = OptimConfig(batch_size=128, epochs=5, learning_rate=4e-3, warmup_share=0.1, weight_decay=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidatesConfig:
    """Candidate tower: what an item is scored by.

    Attributes:
      sources: Frozen inputs of the tower: `item` (Item Q-Former vectors), `fields` (each field's vectors apart,
        whitened), `text` (candidate text embeddings, of one document per item).
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
    """

    sources: tuple[Literal["item", "fields", "text"], ...] = ("item", "fields")
    text_width: int = 128
    width: int = 64
    free_vectors: bool = True
    free_dropout: float = 0.5
    transitions: bool = True
    frozen_similarity: bool = True
    temperature: float = 0.07
    learn_temperature: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Ranking loss of the user and joint stages.

    Attributes:
      negatives: `full` (the whole catalogue), `sampled` or `in-batch`.
      samples: Negatives per step of `sampled`.
      log_q: Correct in-batch and sampled scores by the log of the sampling probability.
      duplicate_cosine: Items whose frozen text embeddings have a larger cosine than this are no negatives for each
        other; 0 for no such limit.
      positions: Supervise `all` positions of the history or only the `last`.
    """

    negatives: Literal["full", "sampled", "in-batch"] = "full"
    samples: int = 4_096
    log_q: bool = True
    duplicate_cosine: float = 0.0
    positions: Literal["all", "last"] = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
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
      optim: Optimiser and schedule.
    """

    qformer: QFormerConfig = QFormerConfig(queries=2, layers=1)
    max_history: int = 50
    item_dropout: float = 0.0
    ratings: bool = True
    times: bool = True
    reviews: bool = True
    regression_weight: float = 0.1
    ranking_weight: float = 1.0
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig(epochs=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The Qwen3 that reads the prompt.

    Attributes:
      path: Local folder or hub name of pretrained weights: the base is frozen and LoRA is trained. Empty: a
        small Qwen3 of the sizes below, initialised at random and trained whole.
      width: Hidden width of the small model.
      layers: Decoder layers of the small model.
      heads: Query heads of the small model.
      kv_heads: Key-value heads of the small model.
      head_dim: Width of a head of the small model.
      mlp_width: Width of the gated feed-forward layer of the small model.
      vocabulary: Tokens of the byte-level BPE that is trained on the catalogue's text.
      dropout: Dropout of the residual branches of the small model in training.
      lora_rank: Rank of the adapters (pretrained base only).
      lora_alpha: Scale numerator of the adapters; the update is scaled by alpha / rank.
      lora_dropout: Dropout on the adapters' input.
      lora_targets: Projections that carry adapters.
      attention: Attention kernel: `auto`, `xla` or `cudnn`.
      remat: Recompute activations of each layer in the backward pass.
    """

    path: str = ""
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp_width: int = 192
    vocabulary: int = 2_048
    dropout: float = 0.1
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What the language model reads.

    Attributes:
      instruction: Text before the history.
      history_items: Newest items that stand in the prompt one by one.
      title_tokens: Tokens of each item's title beside its injected tokens; 0 leaves titles out.
      user_tokens: Whether the user tokens are injected after the items.
      pooling: `last` (the end token's vector, as Qwen3-Embedding) or `mean` over valid tokens.
    """

    instruction: str = "Given the items a user chose, predict the next one.\nHistory:"
    history_items: int = 20
    title_tokens: int = 0
    user_tokens: bool = True
    pooling: Literal["last", "mean"] = "last"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Hard negatives of every training target, mined with the user stage's model when the joint stage begins.

    Attributes:
      count: Negatives of each target, beside the sampled or in-batch ones; 0 for none.
      margin: Share of the target's score, 0 to 1, above which an item may be a false negative and is passed over, as
        are the items of the user's training events.
    """

    count: int = 0
    margin: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Joint stage: Qwen3 reads item and user tokens; its pooled vector ranks the catalogue.

    Attributes:
      backbone: The language model.
      prompt: What it reads.
      candidates: What an item is scored by: the candidate `tower`, or the vector that the same `qwen3` makes of the
        item's title and tokens (negatives must not be `full`).
      train_user_qformer: Whether the User Q-Former goes on learning.
      train_item_qformer: Whether the Item Q-Former goes on learning (negatives must not be `full`).
      micro_batch: Histories encoded at a time, so that a batch need not fit in memory; 0 for all at once.
      mining: Hard negatives.
      loss: Ranking loss.
      optim: Optimiser and schedule.
    """

    backbone: BackboneConfig = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    candidates: Literal["tower", "qwen3"] = "tower"
    train_user_qformer: bool = True
    train_item_qformer: bool = False
    micro_batch: int = 0
    mining: MiningConfig = MiningConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig(epochs=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on the full catalogue.

    Attributes:
      ks: Cut-offs of HR and NDCG.
      mask_seen: Whether the user's whole past is kept out of the ranking.
      bootstrap: Bootstrap resamples of the users for the 95 % intervals.
      batch_size: Users scored at a time.
      new_item_weight: Factor of the frozen similarity in the score of items that training never saw, whose learned
        part says less; in recommendations too. A validation with `data.cold_share` tells what it should be: known
        items give way to new ones as it grows.
      cooccurrence_weight: What the co-occurrence of known events (that of the baseline) counts beside the vectors of
        the joint stage, in recommendations too; 0 for none. Tables then show the vectors alone as well.
      recent_days: Window of the recent-popularity baseline, in days before the last training event; without
        timestamps the last tenth of the training events is used.
    """

    ks: tuple[int, ...] = (1, 5, 10, 20, 50)
    mask_seen: bool = True
    bootstrap: int = 1_000
    batch_size: int = 512
    # Chosen on the validation cases of amazon-beauty with `data.cold_share`: by the vectors alone, new items were then
    # found as often as known ones.
    new_item_weight: float = 1.75
    # How large the counts are depends on the data; on the built-in catalogue every weight above 1 cost something.
    cooccurrence_weight: float = 0.0
    recent_days: float = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
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
      patience: Epochs without a better validation NDCG@10 before training stops.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    max_history: int = 50
    dropout: float = 0.3
    temperature: float = 0.05
    batch_positions: int = 1_024
    epochs: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    patience: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """Baselines that are trained; the training-free ones always run.

    Attributes:
      sasrec: Whether the evaluation also trains a SASRec.
      sasrec_options: Its size and schedule.
      sasrec_cooccurrence_weight: What co-occurrence counts beside it in a row of its own, as
        `evaluation.cooccurrence_weight` has it beside the joint stage's vectors; 0 for no such row.
    """

    sasrec: bool = False
    sasrec_options: SASRecConfig = SASRecConfig()
    sasrec_cooccurrence_weight: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of all processes share the work; the product of the sizes is their number.

    Attributes:
      data: Devices over which each batch is split; 0 for all that the other two leave.
      fsdp: Devices over which parameters and optimizer state are split; each batch is split over them too.
      tensor: Devices over which the widths inside layers are split.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    device_table_gib: float = 2.0
    workers: int = 0
    keep: int = 1
    save_every_seconds: float = 60.0
    skip_non_finite: int = 0
    mesh: MeshConfig = MeshConfig()
    distributed: bool = False
    compilation_cache: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration of a run.

    Attributes:
      name: Name of the run; its folder is `runs/<name>` unless `--run` says otherwise.
      seed: Seed of initialisation, dropout and data order.
    """

    name: str = "run"
    seed: int = 0
    data: DataConfig = DataConfig()
    fields: FieldsConfig = FieldsConfig()
    item: ItemConfig = ItemConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    user: UserConfig = UserConfig()
    joint: JointConfig = JointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    training: TrainingConfig = TrainingConfig()


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 200, 200
_LARGEST_YAML = 4 * 2**20
_MOST_KEYS = 10_000

_PATH_KEYS = ("items", "interactions", "schema")


def load_config(path: str | Path) -> Config:
    """Reads a YAML file into a `Config`.

    Args:
      path: YAML file. Relative data paths in it start at its own folder.

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
        updates = {
            key: str((path.parent / getattr(data, key)).resolve())
            for key in _PATH_KEYS
            if getattr(data, key) is not None
        }
    except (OSError, ValueError) as error:
        # Names with a NUL, longer than the system has them, or of links that go round.
        raise ConfigError(f"{path}: data: a path that cannot be one: {shown(str(error))}") from error
    # A folder beside the file wins over a hub name of the same spelling; hub names are left alone.
    return dataclasses.replace(config, data=dataclasses.replace(data, **updates))


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
    """Turns configuration dataclasses into plain dictionaries, lists and scalars (for YAML, JSON and hashing)."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_tree(element) for element in value]
    return value


def from_tree(cls: type, tree: Any, *, where: str = "config", base: Any = None) -> Any:
    """Builds a configuration dataclass from a plain dictionary, checking names and types.

    Args:
      cls: The dataclass.
      tree: Some of its keys with their values.
      where: What error messages begin with.
      base: Has the values of the other keys; those of `cls` itself if it is None.

    Raises:
      ConfigError: Names the key by its dotted path, and the nearest known key for an unknown one.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys and values, found {type(tree).__name__}")
    hints = typing.get_type_hints(cls)
    defaults = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in defaults:
            near = difflib.get_close_matches(str(key), list(defaults), n=1)
            advice = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(defaults)}"
            raise ConfigError(f"{where}: unknown key {shown(str(key))}{advice}")
        # A section's own defaults hold for the keys of it that are not given, not those of its type.
        values[key] = _convert(hints[key], value, f"{where}: {key}", getattr(base or cls, key, None))
    return dataclasses.replace(base, **values) if base is not None else cls(**values)


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_tree(hint, value, where=where, base=default)
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: {shown(value)} is none of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {shown(value)}")
        return tuple(_convert(typing.get_args(hint)[0], element, where) for element in value)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(h for h in typing.get_args(hint) if h is not type(None)), value, where)
    if hint is float:
        # YAML reads 1e-4 (no dot) as a string.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise ConfigError(f"{where}: expected a number, found {shown(value)}") from None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"{where}: {shown(value)} is too large") from None
        raise ConfigError(f"{where}: expected a number, found {shown(value)}")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {shown(value)}")
    return value
