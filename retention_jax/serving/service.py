"""What the handlers of requests share."""

import threading
from typing import NamedTuple

from retention_jax.generation.conversation import Writer
from retention_jax.serving.engine import Engine
from retention_jax.serving.keys import Keys
from retention_jax.serving.metrics import Metrics
from retention_jax.serving.token_text import TokenText
from retention_jax.serving.transcripts import Transcripts


class Service(NamedTuple):
    """One model, served."""

    engine: Engine
    writer: Writer  # how prompts are written
    name: str  # of the model, for clients
    most_sequences: int  # that one HTTP request may ask for: more would never be admitted
    time_limit: float  # seconds until a request is given up, waiting included
    keys: Keys | None  # who may ask; None lets everybody
    transcripts: Transcripts
    token_text: TokenText
    metrics: Metrics
    created: int  # Unix seconds
    draining: threading.Event  # set once no more requests are taken
