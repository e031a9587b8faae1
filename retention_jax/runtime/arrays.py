"""The one type alias that public signatures share."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray  # an array on a device or on the host
