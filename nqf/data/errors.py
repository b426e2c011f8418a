"""The error of unusable tables, and what reading damaged arrays raises."""

import tokenize
import zipfile

from nqf.config import InputError

NPY_ERRORS = (
    OSError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError, zipfile.BadZipFile
)  # fmt: skip
"""What reading a damaged .npy or .npz raises; numpy parses headers with Python's tokenizer, which has errors too, and
allocates what they ask for."""

STRUCTURE_ERRORS = (KeyError, IndexError, TypeError, AttributeError, RecursionError)
"""What reading a file raises that is JSON, or an archive, but holds something else than it should."""


class DataError(InputError):
    """Data that cannot be used; the message names the file, the row or key, and what to do."""
