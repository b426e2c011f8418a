"""The reference system's files: its checkpoints (parity) and its candidate embeddings."""

from nqf.interop.unirec.checkpoint import (
    ItemQFormerOutput,
    UniRecItemQFormer,
    UniRecUserQFormer,
    UserQFormerOutput,
    load_item_qformer,
    load_joint,
    load_joint_qformer,
    load_user_qformer,
    qformer_table,
)
from nqf.interop.unirec.embeddings import read_candidate_embeddings

__all__ = [
    "ItemQFormerOutput",
    "UniRecItemQFormer",
    "UniRecUserQFormer",
    "UserQFormerOutput",
    "load_item_qformer",
    "load_joint",
    "load_joint_qformer",
    "load_user_qformer",
    "qformer_table",
    "read_candidate_embeddings",
]
