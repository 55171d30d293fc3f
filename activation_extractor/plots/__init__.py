"""Pictures of a store: rows as points, norms by layer, layers beside each other; needs the extra ``plot``.

Each function returns a ``matplotlib.figure.Figure`` of its own, which a notebook shows when it is the last expression
of a cell. No window opens and no global state is touched.
"""

from __future__ import annotations

from activation_extractor.plots._figures import norms, overview, projection, save_plot, similarity

__all__ = ["norms", "overview", "projection", "save_plot", "similarity"]
