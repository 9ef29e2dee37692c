"""One upgrade of a real retrieval system, lived through on real images in a few minutes.

The stages are functions that hand each other files and vectors only: once the gallery is on the disk, no stage that
belongs to the upgrade can see its images. What needs them again (new/new, BCT new/new: the price that fct avoids)
reads the data set anew at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

import fct
from fct.data.fashion_mnist import CLASSES, ImageSplit, load_fashion_mnist
from fct.files import atomic_path, refuse_existing, write_text
from fct.metrics import RetrievalMetrics, evaluate, recall_at_k
from fct.ops.dispatch import default_threads
from fct.report import Example, ResultTable, Row, Verdict, judge, write_html, write_picture
from fct.retrieval import topk
from fct.spaces import EmbeddingSpace
from fct.training.transformation import fit_transformation
from fct.transform import transform_batch
from fct.transformation import Transformation

__all__ = ["QuickstartConfig", "QuickstartReport", "run_quickstart"]

OLD_CLASSES = 5
WITH, WITHOUT = "new/old, h with side-info", "new/old, h without side-info"
BCT_OLD, BCT_NEW = "BCT new/old", "BCT new/new"
"""


'''
