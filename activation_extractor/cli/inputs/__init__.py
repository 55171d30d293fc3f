"""The rows of a data set, as they come in files, folders and pipes."""

from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._open import open_source
from activation_extractor.cli.inputs._source import Kind, Reader, Row, Source

__all__ = ["BadRows", "Kind", "Reader", "Row", "Source", "open_source"]
