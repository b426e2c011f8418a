"""The error of unusable tables."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the row or key, and what to do."""
