"""Neither side: adapters, models, text, metrics, aggregation methods, secure aggregation, wire."""

import os

# Flower, Ray and Hugging Face call home unless told not to. Flower and Hugging Face read their switches only once, when
# they are first imported, so these stand before every import of them; child processes, actors and workers inherit them.
os.environ.update(
    {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
)
