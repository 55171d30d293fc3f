"""Reading what was saved: lazy columns, data sets, checks, taking it elsewhere."""

from __future__ import annotations

from activation_extractor.store._batches import Batches
from activation_extractor.store._columns import Column
from activation_extractor.store._dataset import StoreDataset
from activation_extractor.store._export import Export, export
from activation_extractor.store._feature_statistics import FeatureStatistics
from activation_extractor.store._import import import_store
from activation_extractor.store._listing import ShardInfo
from activation_extractor.store._open import open_store
from activation_extractor.store._statistics import Statistics, statistics
from activation_extractor.store._store import Store
from activation_extractor.store._text_columns import TextColumn
from activation_extractor.store._verify import Damage, Verification, verify_store

__all__ = [
    "Batches",
    "Column",
    "Damage",
    "Export",
    "FeatureStatistics",
    "ShardInfo",
    "Statistics",
    "Store",
    "StoreDataset",
    "TextColumn",
    "Verification",
    "export",
    "import_store",
    "open_store",
    "statistics",
    "verify_store",
]
