"""What is understood of the settings files of model folders: every other key is refused by its name.

A table maps a key to the values that are understood, or to `ANY` where the key is read by the loader or changes no
vector. The keys are those of transformers 2 to 5 and sentence-transformers 2 to 6.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nqf.files import read_json

ANY = None
_LISTED = 10
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings type_vocab_size image_size patch_size projection_dim"
)
Table = Mapping[str, Any]


def understood(tree: Mapping[str, Any], table: Table, *, where: str | Path) -> None:
    """Checks settings against a table. A key that is not in it may only be off: null, false or empty.

    Raises:
      ValueError: Names the file, every key that is not understood, and its value.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected an object, found {reprlib.repr(tree)}")
    errors = []
    for key, value in tree.items():
        values = table.get(key, ())
        if values is not ANY and value not in values and not (key not in table and value in (None, False, "", [], {})):
            reason = "is unknown" if key not in table else f"can only be {' or '.join(map(repr, values))}"
            errors.append(f"{reprlib.repr(key)[1:-1]} {reason} (it is {reprlib.repr(value)})")
    if errors:
        more = [f"{len(errors) - _LISTED} more"] if len(errors) > _LISTED else []
        raise ValueError(
            f"{where}: "
            + "; ".join(errors[:_LISTED] + more)
            + ". It may change the vectors; if it does not, remove it from the file"
        )


def read_understood(path: Path, table: Table) -> dict[str, Any]:
    """Reads a settings file, empty where there is none, and checks it.

    Raises:
      ValueError: As `understood`, or malformed.
    """
    tree = read_json(path) if path.is_file() else {}
    understood(tree, table, where=path)
    return tree


def check_sizes(tree: Mapping[str, Any], *, where: str | Path) -> None:
    """Checks that a model's sizes, where they are given, are positive whole numbers.

    Raises:
      ValueError: Names the file, every size that is none, and its value.
    """
    found = {key: tree[key] for key in _SIZES.split() if tree.get(key) is not None}
    errors = [f"{key} is {reprlib.repr(value)}" for key, value in found.items() if type(value) is not int or value < 1]
    if errors:
        raise ValueError(f"{where}: " + "; ".join(errors) + "; sizes are positive whole numbers")


def keys(names: str) -> dict[str, None]:
    """A table of keys, given in one string, whose values do not matter."""
    return dict.fromkeys(names.split(), ANY)


# What `save_pretrained` of any version writes for every model: names, training and text generation.
_COMMON: Table = keys(
    "model_type architectures transformers_version _name_or_path _commit_hash name_or_path torch_dtype dtype "
    "tokenizer_class use_cache initializer_range initializer_factor attention_dropout bos_token_id eos_token_id "
    "pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id eos_token_ids id2label label2id "
    "num_labels problem_type finetuning_task task_specific_params prefix return_dict use_return_dict "
    "output_attentions output_hidden_states output_past torchscript use_bfloat16 tf_legacy_loss tie_word_embeddings "
    "tie_encoder_decoder gradient_checkpointing chunk_size_feed_forward _attn_implementation attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal language "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
) | {"is_encoder_decoder": (False, None), "use_bidirectional_attention": (False, None)}
BERT: Table = {
    **_COMMON,
    # The sizes are checked against the tensors; dropout and the pooler's sizes have nothing to act on.
    **keys(_SIZES),
    **keys(
        "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout directionality pooler_fc_size "
        "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"
    ),
    # `nqf.models.bert.BertConfig` refuses other values.
    **keys("hidden_act layer_norm_eps position_embedding_type is_decoder add_cross_attention"),
}
"""`config.json` of a BERT."""
QWEN3: Table = {
    **_COMMON,
    **keys(_SIZES),
    **keys("rms_norm_eps rope_theta rope_parameters rope_scaling sliding_window max_window_layers layer_types"),
    # `nqf.models.qwen3.Qwen3Config` refuses other values.
    **keys("hidden_act attention_bias use_sliding_window"),
    "is_causal": (True, None),
    "partial_rotary_factor": (1.0, None),
}
"""`config.json` of a Qwen3."""
ROPE: Table = {"rope_theta": ANY, "rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0, None)}
"""`rope_parameters` of a Qwen3."""

CLIP: Table = {
    **_COMMON,
    **keys("logit_scale_init_value text_config text_config_dict vision_config"),
    # Where it says anything, it takes the place of `vision_config`.
    "vision_config_dict": (None, {}),
    # The vision tower's.
    **keys(_SIZES),
    **keys("hidden_act layer_norm_eps dropout"),
    "num_channels": (3,),
}
"""`config.json` of a CLIP, and its vision tower's part."""
CLIP_IMAGES: Table = {
    # `nqf.interop.clip` refuses what is not CLIP's.
    **keys("size crop_size do_resize do_center_crop do_rescale do_normalize do_convert_rgb resample rescale_factor"),
    **keys("image_mean image_std default_to_square"),
    # How arrays are handed over.
    **keys("processor_class data_format input_data_format return_tensors device disable_grouping image_seq_length"),
    "image_processor_type": tuple(f"CLIPImageProcessor{kind}" for kind in ("", "Fast", "Pil")),
    "feature_extractor_type": ("CLIPFeatureExtractor",),
}
"""`preprocessor_config.json` of a CLIP."""


def check_qwen3(tree: Mapping[str, Any], where: Path) -> None:
    """Checks `config.json` of a Qwen3 against `QWEN3` and `ROPE`.

    Raises:
      ValueError: As `understood`.
    """
    understood(tree, QWEN3, where=where)
    rope = tree.get("rope_parameters") or {}
    # A `rope_scaling` that says anything takes the place of `rope_parameters`, its `rope_theta` included.
    scaling = tree.get("rope_scaling") or {}
    for name, part in (("rope_parameters", rope), ("rope_scaling", scaling)):
        understood(part, ROPE if name == "rope_parameters" else {**ROPE, "rope_theta": ()}, where=f"{where}: {name}")
    if scaling and rope:
        raise ValueError(f"{where}: rope_scaling and rope_parameters are both given; remove one")
    if set(tree.get("layer_types") or []) - {"full_attention"}:
        raise ValueError(f"{where}: layer_types other than 'full_attention' are not supported")
