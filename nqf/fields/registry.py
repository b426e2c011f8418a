"""Which encoder a modality has: the light ones by name, and pretrained ones that a stage passes in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.category import CategoryEncoder
from nqf.fields.encoder import CacheError, EncoderFactory, FieldEncoder, LightEncoder, Values, read_identity
from nqf.fields.geo import GeoEncoder
from nqf.fields.image import ImageEncoder
from nqf.fields.number import NumberEncoder
from nqf.fields.text import TextEncoder
from nqf.fields.time import TimeEncoder
from nqf.fields.vector import VectorEncoder

LIGHT: dict[str, type[LightEncoder]] = {
    "text": TextEncoder,
    "category": CategoryEncoder,
    "number": NumberEncoder,
    "time": TimeEncoder,
    "geo": GeoEncoder,
    "image": ImageEncoder,
    "vector": VectorEncoder,
}


def light_encoder(modality: str) -> type[LightEncoder]:
    """The light encoder class of a modality."""
    return LIGHT[modality]


def make_encoder(
    field: Field, config: FieldsConfig, values: Values, overrides: Mapping[str, EncoderFactory] | None = None
) -> FieldEncoder:
    """Makes the encoder of a field.

    Args:
      field: The field.
      config: Sizes of the light encoders.
      values: A sample of the field's distinct values; only light encoders are fitted on it.
      overrides: Modality to the factory of a pretrained encoder. Pretrained models live above `fields/`, so a
        stage passes them in.
    """
    if overrides and field.modality in overrides:
        return overrides[field.modality](field, config)
    return light_encoder(field.modality).fit(values, field, config)


def load_encoder(
    directory: Path, field: Field, config: FieldsConfig, overrides: Mapping[str, EncoderFactory] | None = None
) -> FieldEncoder:
    """Loads a saved encoder.

    Raises:
      CacheError: The files are damaged, or the encoder is a pretrained one and `overrides` gives none or another.
    """
    identity = read_identity(directory)
    light = light_encoder(field.modality)
    if identity.get("kind") == light.kind:
        return light.load(directory)
    if not overrides or field.modality not in overrides:
        raise CacheError(
            f"{directory}: field '{field.name}' was encoded by '{identity.get('kind')}', which is not a light encoder; "
            f"pass the factory of the '{field.modality}' encoder"
        )
    encoder = overrides[field.modality](field, config)
    if encoder.identity != identity:
        raise CacheError(
            f"{directory}: field '{field.name}' was encoded by {identity}, but the configured encoder is "
            f"{encoder.identity}; configure the same one or build the cache again"
        )
    return encoder
