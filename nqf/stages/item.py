"""Item stage: the Item Q-Former learns to give back hidden fields and to bring consecutive items together."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import ItemConfig, OptimConfig
from nqf.fields.cache import FieldCache
from nqf.fields.encoder import unit_rows
from nqf.models.item_qformer import ItemOutput, ItemQFormer, read_fields
from nqf.ops.losses import info_nce, triplet_margin, unit, weighted_mean
from nqf.ops.pins import columns_to_batch, take_rows
from nqf.pipelines.batches import PairBatch
from nqf.pipelines.pairs import PairSource, pair_source
from nqf.stages.artifacts import restore_best
from nqf.stages.run import Run
from nqf.stages.stage import TRAINED, Stage
from nqf.training.program import Metrics, Program

ENCODE_CHUNK = 4_096
VALIDATION_ITEMS = 4_096
"""Held-out items that a validation reads at most; more would only narrow its error, which is below 2 % by then."""


def item_module(run: Run) -> ItemQFormer:
    """The Item Q-Former that fits the run's field cache and configuration."""
    cache = run.cache
    return ItemQFormer(
        fields=tuple((name, cache.modalities[name], cache.widths[name]) for name in cache.names),
        config=run.config.item.qformer,
        fusion=run.config.item.fusion,
        dtype=run.dtype,
    )


def empty_fields(cache: FieldCache, count: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values and presence of `count` items without any field, for shapes."""
    values = {name: np.zeros((count, cache.widths[name]), np.float32) for name in cache.names}
    return values, {name: np.zeros(count, bool) for name in cache.names}


def gather_fields(cache: FieldCache, items: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values float32 [B, W] and presence bool [B] of some items, read on the host."""
    pairs = {name: cache.gather(name, items) for name in cache.names}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def device_fields(cache: FieldCache) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each field's value table and row index, to be put on the device."""
    return {name: (np.asarray(cache.table(name).values), np.asarray(cache.table(name).rows)) for name in cache.names}


def take_fields(
    tables: dict[str, tuple[jax.Array, jax.Array]], items: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`gather_fields` on the device."""
    values, present = {}, {}
    for name, (table, index) in tables.items():
        rows = index[items]
        present[name] = rows >= 0
        taken = columns_to_batch(take_rows(table, jnp.maximum(rows, 0)))
        values[name] = jnp.where(present[name][:, None], taken.astype(jnp.float32), 0)
    return values, present


def tables_on_device(run: Run, size: int) -> bool:
    """Whether tables of `size` bytes go to the device, by `training.tables`."""
    training = run.config.training
    return training.tables == "device" or (training.tables == "auto" and size <= training.device_table_gib * 2**30)


def hide_fields(present: dict[str, jax.Array], rate: float, key: jax.Array) -> dict[str, jax.Array]:
    """Hides each present field with probability `rate`, but never all fields of an item."""
    names = list(present)
    mask_BxF = jnp.stack([present[name] for name in names], axis=1)
    keep_key, last_key = jax.random.split(key)
    draw = jax.random.uniform(keep_key, mask_BxF.shape)
    shown = mask_BxF & (draw >= rate)
    # Where everything would be hidden, one present field drawn at random stays.
    order = jnp.where(mask_BxF, jax.random.uniform(last_key, mask_BxF.shape), -1.0)
    spared = jax.nn.one_hot(jnp.argmax(order, axis=1), len(names), dtype=bool) & mask_BxF
    shown = jnp.where(jnp.any(shown, axis=1, keepdims=True), shown, spared)
    return {name: shown[:, index] for index, name in enumerate(names)}


def make_item_loss(
    module: ItemQFormer, config: ItemConfig, field_weights: dict[str, float], variances: dict[str, float]
) -> Any:
    """Masked reconstruction plus the contrastive loss.

    Args:
      module: The Item Q-Former.
      config: Weights and kinds of the losses.
      field_weights: Weight of each field in the reconstruction.
      variances: Mean squared error of each field's mean vector: every error is in units of it, so that 1 is the
        reconstruction loss of predicting the means, whatever the fields' widths and scales.
    """
    total, squared = sum(field_weights.values()), config.reconstruction == "squared"

    def loss_fn(params: Any, frozen: Any, batch: PairBatch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hide_key, dropout_key = jax.random.split(key)
        # Only the triplet reads the drawn negatives; InfoNCE takes the other pairs of the batch.
        lists = [0, 1, *([2] if config.contrastive == "triplet" else []), *([] if squared else [3])]
        if batch.values is not None:
            # [B, 4, ...] to the lists one after the other.
            values, present = jax.tree.map(
                lambda x: x[:, np.array(lists)].swapaxes(0, 1).reshape(-1, *x.shape[2:]), (batch.values, batch.present)
            )
        else:
            items = [batch.anchors, batch.positives, batch.negatives, batch.catalogue]
            values, present = take_fields(frozen, jnp.concatenate([items[which] for which in lists]))
        count = batch.anchors.shape[0]
        visible = hide_fields(present, config.field_dropout, hide_key)
        rngs = {"dropout": dropout_key}
        output = cast(ItemOutput, module.apply({"params": params}, values, visible, deterministic=False, rngs=rngs))

        # Every field that is present has to come back, hidden or not.
        errors = {
            name: jnp.square(output.reconstructions[name].astype(jnp.float32) - values[name]) for name in field_weights
        }
        if squared:
            reconstruction = squared_error(errors, present, field_weights, count)
        else:
            means = [
                weight * weighted_mean(jnp.mean(errors[name], axis=-1), present[name]) / variances[name]
                for name, weight in field_weights.items()
            ]
            reconstruction = cast(jax.Array, sum(means)) / total
        metrics = {"reconstruction": reconstruction}
        loss = config.reconstruction_weight * reconstruction
        anchors, positives = output.vector[:count], output.vector[count : 2 * count]
        if config.contrastive == "infonce":
            scores = unit(anchors) @ unit(positives).T / config.temperature
            # An item that the anchor's user also met is no negative, whoever it came from.
            contrastive = info_nce(scores, jnp.arange(count), allowed_MxC=~batch.known)
        elif config.contrastive == "triplet":
            # The reference makes the other two without a gradient.
            others = jax.lax.stop_gradient((positives, output.vector[2 * count : 3 * count]))
            contrastive = triplet_margin(anchors, *others, margin=config.margin)
        else:
            return loss, metrics
        metrics["contrastive"] = contrastive
        return loss + config.contrastive_weight * contrastive, metrics

    return loss_fn


def squared_error(
    errors: dict[str, jax.Array], present: dict[str, jax.Array], weights: dict[str, float], count: int
) -> jax.Array:
    """The reference's reconstruction loss: squared errors [B, W] summed over W, averaged over the present fields of the
    first `count` items, the anchors."""
    there = {name: weight * present[name][:count] for name, weight in weights.items()}
    summed = sum(jnp.sum(jnp.sum(errors[name][:count], axis=-1) * weight) for name, weight in there.items())
    return jnp.asarray(summed) / jnp.maximum(sum(jnp.sum(weight) for weight in there.values()), 1e-9)


def held_out_items(run: Run) -> np.ndarray:
    """bool [items], the share of items with a training event that the item stage keeps for validation."""
    warm = np.flatnonzero(~run.dataset.split.cold)
    count = max(1, round(run.config.item.held_out_share * len(warm))) if run.config.item.held_out_share else 0
    held = np.zeros(len(run.dataset.catalogue.item_ids), bool)
    held[np.random.default_rng(run.config.seed).permutation(warm)[:count]] = True
    return held


def field_means(cache: FieldCache, items: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """Per field the mean vector over some items' present values, and its mean squared error over the same items."""
    means = {}
    for name in cache.names:
        total, squares, count = np.zeros(cache.widths[name]), 0.0, 0
        for start in range(0, len(items), ENCODE_CHUNK):
            values, present = cache.gather(name, items[start : start + ENCODE_CHUNK])
            kept = values[present].astype(np.float64)
            total += kept.sum(axis=0)
            squares += float(np.square(kept).sum())
            count += len(kept)
        mean = total / max(count, 1)
        variance = (squares / max(count, 1) - float(np.square(mean).sum())) / cache.widths[name]
        means[name] = (mean.astype(np.float32), max(variance, 0.0))
    return means


def reconstruction_report(
    values: dict[str, np.ndarray],
    present: dict[str, np.ndarray],
    reconstructions: dict[str, np.ndarray],
    means: dict[str, tuple[np.ndarray, float]],
    value_rows: dict[str, np.ndarray],
) -> dict[str, dict[str, float]]:
    """Per field: mse, cosine, mean_mse (the mean vector's error), retrieval@1 among the distinct values, count.

    Retrieval@1 is the share of items whose reconstruction is nearer, by cosine, to their own value than to every
    other value that occurs among these items; equal values share a row and cannot be told apart.
    """
    report = {}
    for name, (mean, _) in means.items():
        kept = present[name]
        if not kept.any():
            continue
        true, made = values[name][kept], reconstructions[name][kept]
        rows, own = np.unique(value_rows[name][kept], return_inverse=True)
        table = np.zeros((len(rows), true.shape[1]), np.float32)
        table[own] = true
        similarity = unit_rows(made) @ unit_rows(table).T
        report[name] = {
            "mse": float(np.square(true - made).mean()),
            "mean_mse": float(np.square(true - mean).mean()),
            "cosine": float((unit_rows(true) * unit_rows(made)).sum(axis=1).mean()),
            "retrieval@1": float((similarity.argmax(axis=1) == own).mean()),
            "count": int(kept.sum()),
        }
    return report


def init_items(run: Run, module: ItemQFormer) -> Any:
    """Fresh parameters of the Item Q-Former."""
    return jax.jit(module.init)(jax.random.key(run.config.seed), *empty_fields(run.cache, 1))["params"]


def item_tables(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """The field tables if training keeps them on the device, else None (each batch then carries its rows)."""
    size = sum(run.cache.table(name).values.nbytes for name in run.cache.names)
    return device_fields(run.cache) if tables_on_device(run, size) else None


def item_data(run: Run, source: PairSource, optim: OptimConfig, on_device: bool) -> Any:
    """The batches of all epochs."""
    from nqf.pipelines.datasets import pair_dataset
    from nqf.training.mesh import batch_shard

    return pair_dataset(
        source,
        batch_size=optim.batch_size,
        epochs=optim.epochs,
        seed=run.config.seed,
        workers=run.config.training.workers,
        gather=None if on_device else lambda items: gather_fields(run.cache, items),
        shard=batch_shard(run.config.training.mesh),
    )


def item_program(run: Run, abstract: bool = False) -> Program:
    """What the item stage trains; when it is only planned, every field counts alike."""
    config, cache, dataset = run.config, run.cache, run.dataset
    held, module = held_out_items(run), item_module(run)
    source, frozen = pair_source(dataset.interactions, dataset.split, len(held), held), item_tables(run)
    means = {} if abstract else field_means(cache, source.trainable)
    # A field with one value only has no variance and nothing to learn.
    variances = {name: variance for name, (_, variance) in means.items() if variance > 1e-12}
    if abstract:
        variances = dict.fromkeys(cache.names, 1.0)
    weights_of = {field.name: field.weight for field in dataset.catalogue.schema.fields if field.name in cache.names}
    weights = {name: weight for name, weight in weights_of.items() if name in variances}
    squared = config.item.reconstruction == "squared"
    # Without held-out items the report is on training items and says so.
    checked = (np.flatnonzero(held) if held.any() else source.trainable)[:VALIDATION_ITEMS]

    # Read once, when the first validation asks for it.
    shown = functools.cache(lambda: gather_fields(cache, checked))

    def report_of(params: Any) -> dict[str, dict[str, float]]:
        values, present = shown()
        rows = {name: np.asarray(cache.table(name).rows)[checked] for name in cache.names}
        made = jax.device_get(read_fields(module, params, values, present).reconstructions)
        return reconstruction_report(values, present, made, means, rows)

    def validate(params: Any) -> Metrics:
        report = report_of(params)
        ratios = [entry["mse"] / max(entry["mean_mse"], 1e-12) for name, entry in report.items() if name in weights]
        metrics = {"explained": 1.0 - float(np.mean(ratios))}
        for name, entry in report.items():
            metrics |= {f"{name}/{key}": value for key, value in entry.items() if key != "count"}
        return metrics

    return Program(
        module=module,
        init=lambda: init_items(run, module),
        frozen=lambda: frozen,
        variables=lambda params: {"params": params},
        loss_fn=make_item_loss(module, config.item, weights_of if squared else weights, variances),
        data=lambda optim: item_data(run, source, optim, frozen is not None),
        optim=config.item.optim,
        seed=config.seed,
        validate=lambda: validate,
        score="explained",
        report=lambda params, metrics: {
            "explained": metrics["explained"],
            "validated_on": "held-out items" if held.any() else "training items",
            "reconstruction": report_of(params),
        },
    )


def load_items(run: Run) -> tuple[ItemQFormer, Any]:
    """The trained Item Q-Former: module and best parameters."""
    module = item_module(run)
    return module, restore_best(run.folder, "item", lambda: init_items(run, module))


ITEM = Stage(
    name="item",
    after=("fields",),
    reads=("seed", "item"),
    writes=TRAINED,
    checked=("item/checkpoints/BEST/**/*",),
    program=item_program,
)
