"""Checkpoints of the PyTorch system UniRec (github.com/ulab-uiuc/UniRec): its Q-Formers and its joint folder.

PyTorch is not needed, and a checkpoint cannot execute anything: see `nqf.interop.torch_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from nqf.config import QFormerConfig
from nqf.interop.peft import load_adapter
from nqf.interop.tensors import Table, assemble, layer_norm, linear
from nqf.interop.torch_file import CheckpointError, Config, Tensor, TorchFile
from nqf.models.qformer import LAYER_NORM_EPS, QFormer
from nqf.models.qwen3 import Qwen3Config

# The text branch of the BERT, which the reference's forward pass never reaches, and its constant positions.
_UNUSED = (
    r"qformer\.embeddings\.(word_embeddings\.weight|position_embeddings\.weight|position_ids)"
    r"|qformer\.encoder\.layer\.\d+\.(intermediate\.dense|output\.dense|output\.LayerNorm)\.(weight|bias)"
)


class ItemQFormerOutput(struct.PyTreeNode):
    """What the reference's item module returns.

    Attributes:
      query_outputs: Query tokens, float32 [B, Q, D].
      item_representation: Item vector, float32 [B, E].
      reconstructed_fields: Fields in the order of `fields`, float32 [B, F, E].
    """

    query_outputs: jax.Array
    item_representation: jax.Array
    reconstructed_fields: jax.Array


class UniRecItemQFormer(nn.Module):
    """The reference's item module (its models/qformer_model.py), without the parts that it never runs.

    Attributes:
      config: Size of the Q-Former.
      encoder_width: Width E of a field embedding.
      fields: Number F of fields.
    """

    config: QFormerConfig
    encoder_width: int
    fields: int

    @nn.compact
    def __call__(
        self, field_embeddings: jax.Array, field_mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> ItemQFormerOutput:
        """Encodes items.

        Args:
          field_embeddings: float32 [B, F, E].
          field_mask: bool or 0/1 [B, F]; all present by default. Of an item without any field the queries read
            nothing here; the reference lets them read the mean of its masked fields.
          deterministic: Whether dropout is off.
        """
        config = self.config
        queries = self.param("query_embeddings", nn.initializers.normal(1.0), (1, config.queries, config.width))
        mask = None if field_mask is None else field_mask.astype(bool)
        outputs_BxQxD = QFormer(config=config, name="qformer")(
            queries, field_embeddings, mask, deterministic=deterministic
        )
        representation = nn.Dense(self.encoder_width, name="item_representation_head")(outputs_BxQxD.mean(axis=1))
        decoded_BxQxE = nn.Dense(self.encoder_width, name="reconstruction_head")(outputs_BxQxD)
        fields_BxExF = nn.Dense(self.fields, name="field_projection")(decoded_BxQxE.transpose(0, 2, 1))
        return ItemQFormerOutput(
            query_outputs=outputs_BxQxD,
            item_representation=representation,
            reconstructed_fields=fields_BxExF.transpose(0, 2, 1),
        )


class UserQFormerOutput(struct.PyTreeNode):
    """Output of the reference's user module.

    Attributes:
      query_outputs: User tokens, float32 [B, U, D]; the reference computes them and returns only the prediction.
      predicted_item_tokens: Query tokens of the next item, float32 [B, Q, E].
    """

    query_outputs: jax.Array
    predicted_item_tokens: jax.Array


class UniRecUserQFormer(nn.Module):
    """The reference's user module (its training/user_qformer_training.py).

    Attributes:
      config: Size of the Q-Former.
      encoder_width: Width E of an item token.
      item_tokens: Query tokens Q of the predicted item.
    """

    config: QFormerConfig
    encoder_width: int
    item_tokens: int

    @nn.compact
    def __call__(
        self, sequence_tokens: jax.Array, sequence_mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> UserQFormerOutput:
        """Encodes histories: tokens float32 [B, S, E] and a mask, bool or 0/1 [B, S]."""
        config = self.config
        queries = self.param("query_embeddings", nn.initializers.normal(1.0), (1, config.queries, config.width))
        mask = None if sequence_mask is None else sequence_mask.astype(bool)
        outputs_BxUxD = QFormer(config=config, name="qformer")(
            queries, sequence_tokens, mask, deterministic=deterministic
        )
        hidden = nn.gelu(
            nn.Dense(config.width, name="prediction_head_0")(outputs_BxUxD.mean(axis=1)), approximate=False
        )
        # torch.nn.LayerNorm's default epsilon, not BERT's.
        hidden = nn.LayerNorm(epsilon=1e-5, name="prediction_head_2")(hidden)
        flat = nn.Dense(self.item_tokens * self.encoder_width, name="prediction_head_3")(hidden)
        tokens = flat.reshape(-1, self.item_tokens, self.encoder_width)
        return UserQFormerOutput(query_outputs=outputs_BxUxD, predicted_item_tokens=tokens)


def load_item_qformer(path: str | Path) -> tuple[UniRecItemQFormer, dict[str, Any], tuple[str, ...]]:
    """Loads `best_qformer_model.pth` of the reference's item training.

    Returns:
      The module, its float32 parameters and the field names in the order of the field axis.

    Raises:
      CheckpointError: Not such a file, or one that holds anything but tensors and the one configuration.
      ValueError: Missing, surplus or wrongly shaped tensors, all of them.
    """
    with TorchFile(path) as file:
        fields = file.entry("field_names", list)
        if not fields or not all(isinstance(field, str) for field in fields):
            raise CheckpointError(f"{path}: 'field_names' is not a list of field names")
        module, params = _item_qformer(file, file.entry("model_state_dict", dict), file.entry("config", Config))
        if module.fields != len(fields):
            raise CheckpointError(f"{path}: {len(fields)} field names, but the model reconstructs {module.fields}")
        return module, params, tuple(fields)


def load_user_qformer(path: str | Path) -> tuple[UniRecUserQFormer, dict[str, Any]]:
    """Loads `best_user_qformer_model.pth` of the reference's user training.

    Raises:
      CheckpointError, ValueError: As `load_item_qformer`.
    """
    with TorchFile(path) as file:
        state, bert = file.entry("model_state_dict", dict), file.entry("config", Config)
        width = _attribute(file, bert, "encoder_width", int)
        flat = file.shape(state, "prediction_head.3.bias", 1)[0]
        config = _qformer_config(file, bert)
        module = UniRecUserQFormer(config=config, encoder_width=width, item_tokens=flat // width)
        table = {"query_embeddings": ("query_embeddings",)}
        table |= qformer_table(config, prefix="qformer.", path=("qformer",))
        for index, rule in ((0, linear), (2, layer_norm), (3, linear)):
            table |= rule(f"prediction_head.{index}", (f"prediction_head_{index}",))
        return module, _params(file, module, table, state, width)


def load_joint(
    directory: str | Path, base: Qwen3Config, *, heads: int | None = None
) -> tuple[UniRecItemQFormer, dict[str, Any], Qwen3Config, dict[str, Any]]:
    """Loads a whole folder of the reference's joint training: the Q-Former, and the adapter of the language model.

    Args:
      directory: `.../best_model` or `.../latest_model`.
      base: Configuration of the language model that the adapter belongs to, Qwen3-Embedding-0.6B as published.
      heads: As `load_joint_qformer`.

    Returns:
      The Q-Former's module and parameters, then the base's configuration with the adapter's options and its `lora`
      collection. The embedding table that the folder holds for its placeholders, whose rows are always overwritten,
      is left out.

    Raises:
      CheckpointError, ValueError: As `load_joint_qformer` and `nqf.interop.peft.load_adapter`.
    """
    module, params = load_joint_qformer(directory, heads=heads)
    return module, params, *load_adapter(directory, base, ignore_embeddings=True)


def load_joint_qformer(directory: str | Path, *, heads: int | None = None) -> tuple[UniRecItemQFormer, dict[str, Any]]:
    """Loads the Q-Former of a folder that the reference's joint training saved (`qformer_model.bin`).

    Args:
      directory: `.../best_model` or `.../latest_model`.
      heads: Attention heads. The file holds weights only, from which heads cannot be told; the reference always
        uses heads 64 wide, which is the default.

    Raises:
      CheckpointError, ValueError: As `load_item_qformer`.
    """
    with TorchFile(Path(directory) / "qformer_model.bin") as file:
        state = file.tree
        if not isinstance(state, dict) or isinstance(state, Config):
            raise CheckpointError(f"{file.path}: expected a state dictionary")
        width = file.shape(state, "query_embeddings", 3)[2]
        layers = sorted({int(name.split(".")[3]) for name in state if str(name).startswith("qformer.encoder.layer.")})
        crossed = [
            layer for layer in layers if f"qformer.encoder.layer.{layer}.crossattention.self.key.weight" in state
        ]
        bert = {
            "hidden_size": width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads or max(width // 64, 1),
            "intermediate_size": file.shape(state, "qformer.encoder.layer.0.intermediate_query.dense.bias", 1)[0],
            "query_length": file.shape(state, "query_embeddings", 3)[1],
            "cross_attention_freq": crossed[1] - crossed[0] if len(crossed) > 1 else max(len(layers), 1),
            "encoder_width": file.shape(state, "reconstruction_head.bias", 1)[0],
            "hidden_dropout_prob": 0.2,
            "hidden_act": "gelu",
            "layer_norm_eps": LAYER_NORM_EPS,
        }
        return _item_qformer(file, state, bert)


def qformer_table(
    config: QFormerConfig, *, prefix: str = "", path: tuple[str, ...] = (), blip2: bool = False
) -> dict[str, tuple[str, ...]]:
    """Table of `nqf.models.qformer.QFormer` for `nqf.interop.tensors`.

    Args:
      config: Size of the Q-Former.
      prefix: Before every tensor name.
      path: Where the Q-Former lies in the parameter tree.
      blip2: Names of `transformers`' `Blip2QFormerModel` instead of the original BLIP-2's and UniRec's.
    """
    table = layer_norm(f"{prefix}{'layernorm' if blip2 else 'embeddings.LayerNorm'}", (*path, "layernorm"))
    for layer in range(config.layers):
        source = f"{prefix}encoder.layer.{layer}"
        kinds = ("attention", "crossattention") if layer % config.cross_every == 0 else ("attention",)
        for kind in kinds:
            here = (*path, f"layer_{layer}_{kind}")
            for name in ("query", "key", "value"):
                table |= linear(f"{source}.{kind}.{'attention' if blip2 else 'self'}.{name}", (*here, name))
            table |= linear(f"{source}.{kind}.output.dense", (*here, "dense"))
            table |= layer_norm(f"{source}.{kind}.output.LayerNorm", (*here, "LayerNorm"))
        here = (*path, f"layer_{layer}_output")
        table |= linear(f"{source}.intermediate_query.dense", (*here, "intermediate"))
        table |= linear(f"{source}.output_query.dense", (*here, "dense"))
        table |= layer_norm(f"{source}.output_query.LayerNorm", (*here, "LayerNorm"))
    return table


def _item_qformer(file: TorchFile, state: dict, bert: dict) -> tuple[UniRecItemQFormer, dict[str, Any]]:
    config, width = _qformer_config(file, bert), _attribute(file, bert, "encoder_width", int)
    fields = file.shape(state, "field_projection.bias", 1)[0]
    module = UniRecItemQFormer(config=config, encoder_width=width, fields=fields)
    table = {"query_embeddings": ("query_embeddings",)} | qformer_table(config, prefix="qformer.", path=("qformer",))
    for head in ("item_representation_head", "reconstruction_head", "field_projection"):
        table |= linear(head, (head,))
    return module, _params(file, module, table, state, width)


def _qformer_config(file: TorchFile, bert: dict) -> QFormerConfig:
    if bert.get("hidden_act") != "gelu" or bert.get("layer_norm_eps") != LAYER_NORM_EPS:
        raise CheckpointError(
            f"{file.path}: hidden_act {bert.get('hidden_act')!r} and layer_norm_eps {bert.get('layer_norm_eps')!r} are "
            f"not the reference's ('gelu' and {LAYER_NORM_EPS})"
        )
    sizes = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "queries": "query_length",
        "cross_every": "cross_attention_freq",
    }
    values = {ours: _attribute(file, bert, theirs, int) for ours, theirs in sizes.items()}
    if min(values.values()) < 1 or max(values.values()) > 2**16 or values["width"] % values["heads"]:
        raise CheckpointError(f"{file.path}: impossible sizes {values}")
    return QFormerConfig(**values, dropout=float(_attribute(file, bert, "hidden_dropout_prob", (int, float))))


def _attribute(file: TorchFile, bert: dict, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(bert.get(name), kind) or isinstance(bert[name], bool):
        raise CheckpointError(f"{file.path}: the configuration's {name!r} is {bert.get(name)!r}")
    return bert[name]


def _params(file: TorchFile, module: nn.Module, table: Table, state: dict, width: int) -> dict[str, Any]:
    states = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), states)["params"]
    shapes = {name: tensor.shape for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return assemble(table, abstract, shapes, lambda name: file.read(state[name]), where=str(file.path), ignore=_UNUSED)
